"""The kernels' CPU counterparts: same names, arguments and results, through torch and oneDNN.

Where Linear1's pre-activation need not be kept, oneDNN (`mkldnn._linear_pointwise`) applies the activation as it writes
the GEMM's output, in fp32 and bf16. That op takes neither fp16 nor fp64 and records no gradient, so it appears here
alone, behind our own autograd function. The other fp32 GEMMs go to oneDNN too, except on an Intel CPU, where MKL is as
fast and its error smaller. Measured in fp32, 1024³ on one core of an Intel Xeon: oneDNN takes 0.97× MKL's time for
x @ w.T, 1.08× for dy @ w, 1.28× for dy.T @ x. On AMD CPUs MKL is reported to be up to twice as slow.

Shapes, dtypes and results: kernels/, by the same names. fp64 works here too.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS
from tpffn_triton.reference import ACTIVATIONS

_ACTIVATE = ACTIVATIONS | {"relu2": lambda z: F.relu(z).square_()}
# act'(z) times the gradient; of a gated activation: its gate's.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda d, z: torch.ops.aten.gelu_backward(d, z),
    "gelu_tanh": lambda d, z: torch.ops.aten.gelu_backward(d, z, approximate="tanh"),
    "silu": lambda d, z: torch.ops.aten.silu_backward(d, z),
    "relu": lambda d, z: torch.ops.aten.threshold_backward(d, z, 0),
    "relu2": lambda d, z: F.relu(z).mul_(2).mul_(d),
}
# oneDNN's post-operation and algorithm of each activation it knows.
_ONEDNN = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", ""), "relu": ("relu", "")}


def _onednn_takes(*dtypes_of: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and all(t.dtype in dtypes and t.numel() > 0 for t in dtypes_of)
    )


@functools.lru_cache
def _mkl_is_fast() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text() and torch.backends.mkl.is_available()
    except OSError:
        return False


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _mkl_is_fast() and _onednn_takes(x, weight, dtypes=(torch.float32,)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre_act: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (act(x @ weight.T + bias), pre-activation or None)."""
    fused = activation in _ONEDNN and not save_pre_act
    if fused and _onednn_takes(x, weight, dtypes=(torch.float32, torch.bfloat16)):
        post_op, algorithm = _ONEDNN[activation]
        act = torch.ops.mkldnn._linear_pointwise(x, weight, bias, post_op, [], algorithm)
        return act, None
    pre_act = _linear(x, weight, bias)
    return activate(pre_act, activation), pre_act if save_pre_act else None


def activate(pre_act: Tensor, activation: str) -> Tensor:
    """Return act(pre_act), on any device."""
    if activation not in GATED_ACTIVATIONS:
        return _ACTIVATE[activation](pre_act)
    gate, up = pre_act.chunk(2, dim=1)
    return _ACTIVATE[GATED_ACTIVATIONS[activation]](gate).mul_(up)


def linear(a: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return a @ weight.T + bias, in out_dtype without rounding to a's first."""
    if out_dtype not in (None, a.dtype):
        a, weight, bias = a.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype)
    return _linear(a, weight, bias)


def ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (act(x @ w1.T + b1) @ w2.T + b2 in out_dtype, what to keep: the pre-activation, act or None)."""
    act, pre_act = linear_act(x, w1, b1, activation, keep == "pre_act")
    return linear(act, w2, b2, out_dtype), act if keep == "act" else pre_act


def linear_into(out: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write a @ weight.T + bias to out."""
    out.copy_(linear(a, weight, bias, out.dtype))


def linear_dact(
    dy: Tensor, weight: Tensor, pre_act: Tensor, activation: str, need_act: bool, db_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ((dy @ weight) ⊙ act'(pre_act), act(pre_act) or None, the first's column sums or None)."""
    d_pre, value = dact(dgrad(dy, weight), pre_act, activation, need_act)
    return d_pre, value, None if db_dtype is None else d_pre.sum(0, dtype=db_dtype)


def dact(d_act: Tensor, pre_act: Tensor, activation: str, need_act: bool) -> tuple[Tensor, Tensor | None]:
    """Return (d_act ⊙ act'(pre_act), act(pre_act) or None), on any device; d_act is consumed."""
    if activation not in GATED_ACTIVATIONS:
        return _BACKWARD[activation](d_act, pre_act), activate(pre_act, activation) if need_act else None
    plain = GATED_ACTIVATIONS[activation]
    gate, up = pre_act.chunk(2, dim=1)
    value = _ACTIVATE[plain](gate)
    d_pre = torch.empty_like(pre_act)
    d_gate, d_up = d_pre.chunk(2, dim=1)
    torch.mul(d_act, value, out=d_up)
    value = value.mul_(up) if need_act else None
    d_gate.copy_(_BACKWARD[plain](d_act.mul_(up), gate))
    return d_pre, value


def dgrad(dy: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return dy @ weight, in out_dtype without rounding to dy's first."""
    return linear(dy, weight.t(), None, out_dtype)


def wgrad(dy: Tensor, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return dy.T @ x, in out_dtype without rounding to dy's first."""
    dtype = out_dtype or dy.dtype
    return _linear(dy.t().to(dtype), x.t().to(dtype), None)


def wgrad_accumulate(dw: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy.T @ x to dw."""
    dw.addmm_(dy.t().to(dw.dtype), x.to(dw.dtype))


def column_sum(src: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return the sum of src's rows."""
    return src.sum(0, dtype=out_dtype or src.dtype)
