"""The kernels' CPU counterparts: same names, arguments and results, through torch and oneDNN.

GEMMs are torch's own. In bf16, where Linear1's pre-activation need not be kept, oneDNN (`mkldnn._linear_pointwise`)
applies the activation as it writes the GEMM's output; that op records no gradient, so it appears here alone, behind our
own autograd function. Not in fp32: oneDNN's GEMM rounds more than MKL's, to 1.1 times its error on an Intel Xeon and
1.6 times on an AMD EPYC (1024³), for 0.97 and 0.9 times its time.

Shapes, dtypes and results: kernels/, by the same names. fp64 works here too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS
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
# Of a batch-invariant forward, each a GEMM of its own.
ROWS_OF_A_BLOCK = 32
# oneDNN's post-operation and algorithm of each activation it knows.
_ONEDNN = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", ""), "relu": ("relu", "")}


def _onednn_takes(*tensors: Tensor) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and all(t.dtype == torch.bfloat16 and t.numel() > 0 for t in tensors)
    )


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre_act: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (act(x @ weight.T + bias), pre-activation or None)."""
    if activation in _ONEDNN and not save_pre_act and _onednn_takes(x, weight):
        post_op, algorithm = _ONEDNN[activation]
        act = torch.ops.mkldnn._linear_pointwise(x, weight, bias, post_op, [], algorithm)
        return act, None
    pre_act = F.linear(x, weight, bias)
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
    return F.linear(a, weight, bias)


def ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (act(x @ w1.T + b1) @ w2.T + b2 in out_dtype, what to keep: the pre-activation, act or None)."""
    if batch_invariant:
        return _by_blocks(x, w1, b1, w2, b2, activation, keep, out_dtype)
    act, pre_act = linear_act(x, w1, b1, activation, keep == "pre_act")
    return linear(act, w2, b2, out_dtype), act if keep == "act" else pre_act


def _by_blocks(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Do what ffn_forward does, ROWS_OF_A_BLOCK tokens at a time, the last ones beside zeros: a BLAS chooses its
    kernel, and with it the order of its sums, by the GEMM's shape. Whatever backward keeps, pre_act is rounded: not by
    oneDNN's activation, for a token's bits would depend on whether a gradient is wanted."""

    def of_block(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        act, pre_act = linear_act(rows, w1, b1, activation, True)
        return linear(act, w2, b2, out_dtype), {"pre_act": pre_act, "act": act}.get(keep)

    tokens = x.shape[0]
    blocks = max(1, -(-tokens // ROWS_OF_A_BLOCK))
    padded = x.new_zeros((blocks * ROWS_OF_A_BLOCK, x.shape[1]))
    padded[:tokens] = x
    results = [of_block(block) for block in padded.split(ROWS_OF_A_BLOCK)]
    last = tokens - (blocks - 1) * ROWS_OF_A_BLOCK

    def joined(parts: list) -> Tensor | None:
        # Never a view: y may be modified in place, and what is kept should keep no more alive.
        return None if parts[0] is None else torch.cat([*parts[:-1], parts[-1][:last]])

    y, kept = (joined([*parts]) for parts in zip(*results, strict=True))
    assert y is not None
    return y, kept


def linear_into(out: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write a @ weight.T + bias to out."""
    out.copy_(linear(a, weight, bias, out.dtype))


def linear_dact(
    dy: Tensor, weight: Tensor, pre_act: Tensor, activation: str, need_act: bool, need_db: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ((dy @ weight) ⊙ act'(pre_act), act(pre_act) or None, the first's partial column sums or None: here all
    rows are summed in the first)."""
    d_pre, value = dact(dgrad(dy, weight), pre_act, activation, need_act)
    if not need_db:
        return d_pre, value, None
    tokens, width = d_pre.shape
    dtype = torch.promote_types(d_pre.dtype, torch.float32)
    db_partial = d_pre.new_zeros((-(-tokens // PARTIAL_ROWS), width), dtype=dtype)
    db_partial[:1] = d_pre.sum(0, dtype=dtype)
    return d_pre, value, db_partial


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
    return F.linear(dy.t().to(dtype), x.t().to(dtype))


def wgrad_accumulate(dw: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy.T @ x to dw."""
    dw.addmm_(dy.t().to(dw.dtype), x.to(dw.dtype))


def column_sum(src: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return the sum of src's rows."""
    return src.sum(0, dtype=out_dtype or src.dtype)


def weight_grads(
    d_pre: Tensor,
    x: Tensor,
    dy: Tensor,
    act: Tensor,
    db_partial: Tensor | None,
    db2_src: Tensor | None,
    w1_dtype: torch.dtype | None = None,
    w2_dtype: torch.dtype | None = None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (d_pre.T @ x, dy.T @ act, the sums of the columns of the other two, None where one is)."""
    biases = _bias_grads(db_partial, db2_src, b1_dtype, b2_dtype)
    return wgrad(d_pre, x, w1_dtype), wgrad(dy, act, w2_dtype), *biases


def weight_grads_accumulate(
    dw1: Tensor,
    dw2: Tensor,
    d_pre: Tensor,
    x: Tensor,
    dy: Tensor,
    act: Tensor,
    db_partial: Tensor | None,
    db2_src: Tensor | None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Add d_pre.T @ x to dw1 and dy.T @ act to dw2; return the column sums."""
    wgrad_accumulate(dw1, d_pre, x)
    wgrad_accumulate(dw2, dy, act)
    return _bias_grads(db_partial, db2_src, b1_dtype, b2_dtype)


def _bias_grads(
    db_partial: Tensor | None, db2_src: Tensor | None, b1_dtype: torch.dtype | None, b2_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    db1 = None if db_partial is None else column_sum(db_partial, b1_dtype)
    return db1, None if db2_src is None else column_sum(db2_src, b2_dtype)
