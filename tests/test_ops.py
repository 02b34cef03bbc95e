"""The registered operators: both CPU implementations are right, fake outputs have the real shapes, FLOPs count."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tpffn_triton as tp
from tpffn_triton import backends, native, ops, reference
from tpffn_triton.kernels.activations import PLAIN_ACTIVATIONS

M, H, F = 6, 32, 48


def calls(device="cpu", dtype=torch.float32):
    """Return name → arguments of one call of every operator."""

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    x, w1, w2, pre_act = randn(M, H), randn(F, H), randn(H, F), randn(M, F)
    return {
        "linear_act": (x, w1, randn(F), "gelu", True),
        "linear": (pre_act, w2, randn(H)),
        "linear_dact": (x, w2, pre_act, "gelu", True, True),
        "dgrad": (pre_act, w1),
        "wgrad": (pre_act, x),
        "column_sum": (x,),
    }


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype, device):
    """Schema, fake implementation and dispatch hold under torch's own checker."""
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.tpffn, name).default, calls(device, dtype)[name], test_utils=checks)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_fake_shapes_without_optional_outputs(flags):
    args = calls()
    for name, call in (
        ("linear_act", (*args["linear_act"][:4], flags[0])),
        ("linear_dact", (*args["linear_dact"][:4], *flags)),
    ):
        op = getattr(ops, name)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in call))
        assert [t.shape for t in fake] == [t.shape for t in op(*call)]


def test_flops_of_a_layer():
    """Six GEMMs of 2·M·H·F each, forward and backward."""
    layer = tp.TensorParallelFFN(H, F)
    x = torch.randn(2, 3, H, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * 2 * M * H * F
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * M * H * F


def test_every_list_of_activations_is_the_same():
    """Kernels, native path and reference know the same names."""
    assert set(native._ACTIVATE) == set(native._BACKWARD) == set(reference.ACTIVATIONS) == set(PLAIN_ACTIVATIONS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
def test_native_path_with_and_without_onednn(activation, dtype, onednn, monkeypatch):
    monkeypatch.setattr(native, "_onednn_takes", lambda *a, **k: onednn)
    if dtype == torch.bfloat16 and onednn:
        monkeypatch.setattr(native, "_onednn_takes", lambda *t, dtypes: dtype in dtypes)
    x, w1, b1 = (t.to(dtype) for t in (torch.randn(M, H), torch.randn(F, H) / 8, torch.randn(F)))
    pre_act = torch.nn.functional.linear(x.double(), w1.double(), b1.double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    monkeypatch.setattr(native, "_mkl_is_fast", lambda: not onednn)
    torch.testing.assert_close(native.dgrad(x @ w1.t(), w1), x @ w1.t() @ w1, **tolerance)
    torch.testing.assert_close(native.wgrad(x, x), x.t() @ x, **tolerance)
    for save in (True, False):
        act, saved = native.linear_act(x, w1, b1, activation, save)
        torch.testing.assert_close(act.double(), reference.ACTIVATIONS[activation](pre_act), **tolerance)
        assert saved.shape == ((M, F) if save else (0,))


@pytest.mark.cpu_only
def test_error_of_the_native_forward_in_fp32():
    """oneDNN's fused Linear1 may round a little more than torch's own GEMM: the one exemption from acceptance.py."""
    x, w1, b1 = torch.randn(256, 1024), torch.randn(512, 1024) / 32, torch.randn(512)
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), w1.double(), b1.double()))
    eager = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1))
    act, _ = native.linear_act(x, w1, b1, "gelu", False)
    assert (act - exact).norm() <= 1.3 * (eager - exact).norm()


def test_the_choice_of_backend_is_logged_once(caplog):
    backends._announce.cache_clear()
    with caplog.at_level("INFO", logger="tpffn_triton"):
        for _ in range(3):
            backends.implementation("cpu")
    assert [r.getMessage() for r in caplog.records] == [
        f"tpffn_triton: cpu tensors are computed by {tp.backend('cpu')}"
    ]
