"""Where each peer exists; and those that need a GPU, rehearsed on a CPU.

Stand-ins for their libraries check the calls, and compute in torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import gate
import nvmath_peer
import ranks
import steps
import vendor_peers
import workloads
from implementations import IMPLEMENTATIONS
from peer import Place, importable
from peer_implementations import PEERS, listing

pytestmark = pytest.mark.cpu_only
CPU = torch.device("cpu")
ALONE = ranks.Rank(0, 1, CPU, 1, None)


HOPPER = Place("cuda", "bf16", "gelu_tanh", (9, 0))


def test_the_list_says_who_is_here_and_how_to_install_the_others() -> None:
    printed = listing(Place("cpu", "fp32", "silu"))
    assert printed.startswith("peers for silu, fp32, cpu:\n")
    for name in PEERS:
        assert f"\n  {name} " in printed
    assert "\n  eager                yes" in printed
    assert "\n  addmm-epilogue       no" in printed
    assert "computes gelu, relu on cpu, not silu" in printed
    assert "runs on cuda alone, not on cpu" in printed


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("nvmath", nvmath_peer.MODULE, "pip install 'nvmath-python[cu1"),
        ("quack", vendor_peers.QUACK_MODULE, "pip install quack-kernels"),
        (
            "transformer-engine",
            vendor_peers.TE_MODULE,
            "pip install --no-build-isolation 'transformer_engine[pytorch]'",
        ),
    ],
)
def test_what_is_not_installed_says_how(name: str, module: str, install: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    PEERS[name].missing.cache_clear()
    reason = PEERS[name].reason_against(HOPPER)
    PEERS[name].missing.cache_clear()
    assert reason.startswith(f"needs {module} (")
    assert install in reason


def test_peers_exist_where_they_compute_what_is_asked_for() -> None:
    def refusal(name: str, *place: Any) -> str | None:
        return PEERS[name].reason_against(Place(*place))

    addmm = {
        device: [a for a in ("gelu", "gelu_tanh", "relu", "silu") if not refusal("addmm-epilogue", device, "fp32", a)]
        for device in ("cpu", "cuda")
    }
    assert addmm == {"cpu": ["gelu", "relu"], "cuda": ["gelu_tanh", "relu"]}
    capability = "needs compute capability 9.0, this device has 8.0"
    assert refusal("quack", "cuda", "bf16", "gelu_tanh", (8, 0)) == capability
    assert refusal("nvmath", "cuda", "fp32", "gelu_tanh") == "takes bf16, fp16, not fp32"
    assert refusal("liger", "cuda", "bf16", "gelu") == "computes geglu_tanh, swiglu on cuda, not gelu"
    assert refusal("compile-max-autotune", "cuda", "bf16", "gelu") is None
    assert PEERS["fused-triton"].launchers is IMPLEMENTATIONS["fused-triton"].launchers


def test_what_cannot_be_imported_is_missing_whatever_it_raises(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "no_driver_here.py").write_text("raise RuntimeError('libcuda is missing\\nand more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = importable("no_driver_here", "driver")(HOPPER)
    assert reason == "needs no_driver_here (libcuda is missing): pip install driver"
    assert importable("json", "json")(HOPPER) is None


def problem_of(activation: str, tokens: int, ffn: int) -> workloads.Problem:
    shape = workloads.Shape("", 1, tokens, 32, ffn, 1)
    return workloads.shard(workloads.draw(shape, "bf16", activation, CPU), 0, 1, activation)


def check(forward: Any, problem: workloads.Problem, activation: str, modes: tuple[str, ...] = workloads.MODES) -> None:
    """Run each mode twice; both results are right."""
    for mode in modes:
        reference = workloads.expected(problem, mode, activation)
        step = steps.Step(forward, problem, None, mode)
        for _ in range(2):
            error, tensor = gate.worst_error(step, reference, ALONE)
            assert error < 1e-2, (mode, tensor)


def padded(rows: int) -> int:
    return -(-rows // 8) * 8


class FakeMatmul:
    """nvmath.linalg.advanced.Matmul of column-major results: what its epilogues take, and that operands stay alike."""

    log: ClassVar[list[str]] = []
    inputs: ClassVar = {"GELU_BIAS": "bias", "GELU_AUX_BIAS": "bias", "DGELU_BGRAD": "gelu_aux"}

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape[1] == b.shape[0]
        assert 1 in a.stride()
        assert 1 in b.stride()
        self.a, self.b = a, b

    def plan(self, *, epilog: str, epilog_inputs: dict[str, torch.Tensor]) -> None:
        rows, columns = self.a.shape[0], self.b.shape[1]
        (name,) = epilog_inputs
        assert name == self.inputs[epilog]
        assert epilog_inputs[name].shape == ((rows, 1) if name == "bias" else (padded(rows), columns))
        assert epilog_inputs[name].stride(0) == 1
        self.epilog, self.given = epilog, epilog_inputs[name]
        self.log.append(f"plan {epilog}")

    def autotune(self) -> None:
        self.log.append(f"tune {self.epilog}")

    def reset_operands(self, *, a: torch.Tensor, b: torch.Tensor, epilog_inputs: dict[str, torch.Tensor]) -> None:
        (given,) = epilog_inputs.values()
        for old, new in ((self.a, a), (self.b, b), (self.given, given)):
            assert (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype)
        self.a, self.b, self.given = a, b, given
        self.log.append(f"reset {self.epilog}")

    def execute(self) -> Any:
        def by_columns(t: torch.Tensor) -> torch.Tensor:
            return t.to(self.a.dtype).t().contiguous().t()

        product = self.a.float() @ self.b.float()
        if self.epilog == "DGELU_BGRAD":
            pre = self.given[: product.shape[0]].float().requires_grad_()
            with torch.enable_grad():
                (d_pre,) = torch.autograd.grad(F.gelu(pre, approximate="tanh"), pre, product)
            return by_columns(d_pre), {"dgelu_bgrad": d_pre.sum(1).to(self.a.dtype)}
        pre = product + self.given.float()
        result = by_columns(F.gelu(pre, approximate="tanh"))
        if self.epilog == "GELU_BIAS":
            return result
        aux = F.pad(pre, (0, 0, 0, padded(pre.shape[0]) - pre.shape[0]), value=float("nan"))
        return result, {"gelu_aux": by_columns(aux)}


@pytest.mark.parametrize(("tokens", "ffn"), [(24, 48), (1, 48), (5, 20)])
def test_nvmath_plans_once_and_resets_its_operands(tokens: int, ffn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = SimpleNamespace(**{name: name for name in FakeMatmul.inputs})
    module = SimpleNamespace(Matmul=FakeMatmul, MatmulEpilog=names)
    monkeypatch.setitem(sys.modules, nvmath_peer.MODULE, module)
    monkeypatch.setattr(FakeMatmul, "log", [])
    forward = nvmath_peer.build("gelu_tanh")
    check(forward, problem_of("gelu_tanh", tokens, ffn), "gelu_tanh")
    trained = ["GELU_AUX_BIAS", "DGELU_BGRAD"]
    assert FakeMatmul.log == [
        *("plan GELU_BIAS", "tune GELU_BIAS", "reset GELU_BIAS"),
        *(f"{how} {epilog}" for epilog in trained for how in ("plan", "tune")),
        *(f"reset {epilog}" for epilog in trained),
    ]
    # Another number of tokens is another plan.
    check(forward, problem_of("gelu_tanh", tokens + 8, ffn), "gelu_tanh", ("fwd",))
    assert FakeMatmul.log[9:] == ["plan GELU_BIAS", "tune GELU_BIAS", "reset GELU_BIAS"]


@pytest.mark.parametrize("activation", vendor_peers.LIGER)
def test_liger_gets_gate_and_up(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = vendor_peers.LIGER[activation]
    activate = F.silu if activation == "swiglu" else lambda t: F.gelu(t, approximate="tanh")
    monkeypatch.setitem(
        sys.modules, module, SimpleNamespace(**{name: SimpleNamespace(apply=lambda a, b: activate(a) * b)})
    )
    check(vendor_peers.build_liger(activation), problem_of(activation, 24, 48), activation)


@pytest.mark.parametrize("activation", vendor_peers.QUACK)
@pytest.mark.parametrize("tuned", [False, True])
def test_quack_gets_its_own_names_and_our_layout(activation: str, tuned: bool, monkeypatch) -> None:
    given: dict[str, Any] = {}

    def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None, tuned=True, concat_layout=False):
        given.update(activation=activation, tuned=tuned)
        pre = F.linear(x, weight1, bias1)
        plain = {
            "gelu_tanh_approx": lambda t: F.gelu(t, approximate="tanh"),
            "silu": F.silu,
            "relu": F.relu,
            "relu_sq": lambda t: F.relu(t).square(),
        }
        if activation in plain:
            assert not concat_layout
            return F.linear(plain[activation](pre), weight2, bias2)
        gate_, up = pre.chunk(2, -1) if concat_layout else (pre[..., ::2], pre[..., 1::2])
        activate = plain["silu" if activation == "swiglu" else "gelu_tanh_approx"]
        return F.linear(activate(gate_) * up, weight2, bias2)

    monkeypatch.setitem(sys.modules, vendor_peers.QUACK_MODULE, SimpleNamespace(mlp_func=mlp_func))
    check(vendor_peers.build_quack(tuned)(activation), problem_of(activation, 24, 48), activation)
    assert given == {"activation": vendor_peers.QUACK[activation], "tuned": tuned}


class Basic(torch.nn.Module):
    """A basic operation of Transformer Engine's Linear: it owns one of the parameters."""

    def __init__(self, name: str, *size: int) -> None:
        super().__init__()
        self.register_parameter(name, torch.nn.Parameter(torch.full(size, float("nan"))))


class FakeLinear(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert (device, dtype) == (CPU, torch.bfloat16)
        self.basic_ops = torch.nn.ModuleList([Basic("weight", outputs, inputs), Basic("bias", outputs)])
        self.weight, self.bias = self.basic_ops[0].weight, self.basic_ops[1].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.basic_ops[0].weight, self.basic_ops[1].bias
        assert weight is self.weight
        assert bias is self.bias
        return F.linear(x, weight, bias)


def test_transformer_engine_computes_with_our_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(
        Linear=FakeLinear, GELU=lambda: torch.nn.GELU(approximate="tanh"), Sequential=torch.nn.Sequential
    )
    monkeypatch.setitem(sys.modules, vendor_peers.TE_MODULE, ops)
    forward = vendor_peers.build_transformer_engine("gelu_tanh")
    check(forward, problem_of("gelu_tanh", 24, 48), "gelu_tanh")
    check(forward, problem_of("gelu_tanh", 8, 16), "gelu_tanh")
