"""The registered operators: both CPU implementations are right, fake outputs have the real shapes, modes see them."""

import contextlib

import pytest
import torch
from acceptance import assert_accurate
from launches import RecordOperators
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import tpffn_triton as tp
from tpffn_triton import backends, native, ops, reference
from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, halves

M, H, F = 6, 32, 48


def calls(device="cpu", dtype=torch.float32):
    """Return name → arguments of one call of every operator."""

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    x, w1, w2, pre_act = randn(M, H), randn(F, H), randn(H, F), randn(M, F)
    return {
        "ffn_forward": (x, w1, randn(F), w2, randn(H), "gelu", "pre_act"),
        "ffn_forward gated": (x, randn(2 * F, H), randn(2 * F), w2, None, "swiglu", "act", torch.float32),
        "ffn_forward keeping nothing": (x, w1, None, w2, None, "relu", "nothing"),
        "linear_act": (x, w1, randn(F), "gelu", True),
        "linear_act gated": (x, randn(2 * F, H), randn(2 * F), "swiglu", True),
        "linear": (pre_act, w2, randn(H)),
        "linear of another dtype": (pre_act, w2, None, torch.float32),
        "linear_into": (torch.ones(M, H, device=device), pre_act, w2, randn(H)),
        "linear_dact": (x, w2, pre_act, "gelu", True, True),
        "linear_dact gated": (x, w2, randn(M, 2 * F), "geglu", True, True),
        "dgrad": (pre_act, w1),
        "dgrad of another dtype": (pre_act, w1, torch.float32),
        "wgrad": (pre_act, x),
        "wgrad of another dtype": (pre_act, x, torch.float32),
        "wgrad_accumulate": (torch.ones(F, H, device=device), pre_act, x),
        "column_sum": (x,),
        "weight_grads": (pre_act, x, x, pre_act, randn(1, F), x),
        "weight_grads of other dtypes": (
            *(pre_act, x, x, pre_act, randn(1, F).float(), x),
            *(torch.float32, torch.float32, dtype, torch.float32),
        ),
        "weight_grads without biases": (pre_act, x, x, pre_act, None, None),
        "weight_grads_accumulate": (
            *(torch.ones(F, H, device=device), torch.ones(H, F, device=device)),
            *(pre_act, x, x, pre_act, randn(1, F), None),
        ),
    }


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype, device):
    """Schema, fake implementation and dispatch hold under torch's own checker."""
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(torch.ops.tpffn, name.split()[0]).default
    library.opcheck(op, calls(device, dtype)[name], test_utils=checks)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("gated", ["", " gated"])
def test_fake_shapes_without_optional_outputs(flags, gated):
    args = calls()
    for name, call in (
        ("linear_act", (*args["linear_act" + gated][:4], flags[0])),
        ("linear_dact", (*args["linear_dact" + gated][:4], *flags)),
    ):
        op = getattr(ops.REGISTERED, name)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in call))
        assert [t.shape for t in fake] == [t.shape for t in op(*call)]


def test_operators_show_in_profiles_and_to_dispatch_modes(device):
    """Ordinary calls go around the dispatcher; not so where somebody looks."""
    layer = tp.TensorParallelFFN(H, F, device=device)
    x = torch.randn(M, H, device=device, requires_grad=True)
    expected = ["ffn_forward", "linear_dact", "dgrad", "weight_grads"]
    names = []
    with RecordOperators(names):
        layer(x).sum().backward()
    assert names == expected
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    events = {event.key: event.count for event in profile.key_averages()}
    assert all(events[f"tpffn::{name}"] == expected.count(name) for name in expected)


@pytest.mark.usefixtures("implementation")
def test_vmap_over_any_dim(device):
    """An operator by itself, its batch in the last dim: elements are not contiguous there."""
    dy, weight = torch.randn(M, F, 3, device=device), torch.randn(F, H, device=device)
    mine = torch.func.vmap(lambda t: torch.ops.tpffn.dgrad(t, weight), in_dims=2)(dy)
    torch.testing.assert_close(mine, torch.stack([dy[:, :, i] @ weight for i in range(3)]), rtol=1e-4, atol=1e-4)
    empty = torch.func.vmap(lambda t: tp.ffn(t, weight, weight.t().contiguous()))(torch.empty(0, M, H, device=device))
    assert empty.shape == (0, M, H)


@pytest.mark.usefixtures("implementation")
def test_modes_see_the_operators(device):
    """The dispatcher is passed by only where nobody looks."""

    class Names(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    layer, x = tp.TensorParallelFFN(H, F, device=device), torch.randn(M, H, device=device)
    with torch.no_grad(), Names() as functions:
        layer(x)
    names = []
    with torch.no_grad(), RecordOperators(names):
        layer(x)
    assert names == ["ffn_forward"]
    assert [name for name in functions.seen if name.endswith(".default")] == ["ffn_forward.default"]


@pytest.mark.parametrize("mode", [None, FakeTensorMode], ids=["meta", "fake"])
def test_shapes_without_data(mode):
    """On the meta device and with fake tensors, forward and backward."""
    device = "meta" if mode is None else "cpu"
    with contextlib.nullcontext() if mode is None else mode():
        layer = tp.TensorParallelFFN(H, F, activation="swiglu", device=device)
        x = torch.empty(2, 3, H, device=device, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == (2, 3, H)
    assert layer.linear_fc1.weight.grad.shape == (2 * F, H)


def test_every_list_of_activations_is_the_same():
    """Kernels, native path and reference know the same names."""
    assert set(native._ACTIVATE) == set(reference.ACTIVATIONS) == set(ACTIVATIONS)
    assert set(native._BACKWARD) == set(PLAIN_ACTIVATIONS) >= set(GATED_ACTIVATIONS.values())


@pytest.mark.cpu_only
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_path_with_and_without_onednn(activation, dtype, onednn, monkeypatch):
    monkeypatch.setattr(native, "_onednn_takes", lambda *tensors: onednn)
    W = halves(activation) * F
    x, w1, b1 = (t.to(dtype) for t in (torch.randn(M, H), torch.randn(W, H) / 8, torch.randn(W)))
    pre_act = torch.nn.functional.linear(x.double(), w1.double(), b1.double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(native.dgrad(x @ w1.t(), w1), x @ w1.t() @ w1, **tolerance)
    torch.testing.assert_close(native.wgrad(x, x), x.t() @ x, **tolerance)
    for save in (True, False):
        act, saved = native.linear_act(x, w1, b1, activation, save)
        torch.testing.assert_close(act.double(), reference.ACTIVATIONS[activation](pre_act), **tolerance)
        assert saved.shape == (M, W) if save else saved is None


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_forward_is_as_accurate_as_eager(dtype):
    """With the features of a real layer: where K is small, libraries add in one order."""
    x, w1, b1 = (t.to(dtype) for t in (torch.randn(256, 1024), torch.randn(512, 1024) / 32, torch.randn(512)))
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), w1.double(), b1.double()))
    eager = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1))
    act, _ = native.linear_act(x, w1, b1, "gelu", False)
    assert_accurate("act", act, eager, exact)


def test_the_choice_of_backend_is_logged_once(caplog):
    backends._ready.clear()
    with caplog.at_level("INFO", logger="tpffn_triton"):
        for _ in range(3):
            backends.implementation("cpu")
    assert [r.getMessage() for r in caplog.records] == [
        f"tpffn_triton: cpu tensors are computed by {tp.backend('cpu')}"
    ]
