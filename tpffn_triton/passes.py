"""The two passes of the sharded FFN: what is computed and communicated, in which order.

    x   [..., H]    replicated over the group      y   [..., H]   replicated
    w1  [W, H]      b1 [W]                         w2  [H, F/P]   b2 [H], added once, by rank 0
    pre_act, d_pre  [M, W], act [M, F/P]; M the product of x's leading dims, W = F/P or, where the activation is
                    gated, 2F/P: gate above (in pre_act: left of) up

    forward   act, pre_act = linear_act(x, w1, b1)      one kernel
              y            = all_reduce(linear(act, w2, b2 on rank 0))
    backward  d_pre, act, db1 = linear_dact(dy, w2, pre_act)
              dx           = all_reduce(dgrad(d_pre, w1))        started here ...
              dw2          = wgrad(dy, act)
              dw1          = wgrad(d_pre, x)
              db2          = column_sum(dy)
                                                                 ... waited for here

Megatron-LM's two linears are two autograd functions, so dx's all-reduce hides behind dw1 alone; here it hides behind
every weight and bias gradient. Gradients nobody asks for are not computed, and what only they need is not saved.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpffn_triton import ops
from tpffn_triton.agreement import agree_on_gradient
from tpffn_triton.collectives import all_reduce, start_all_reduce, wait


@dataclass(frozen=True)  # torch.func takes a tuple apart
class Call:
    """What a call asks for beside its tensors."""

    activation: str
    keep: str  # what backward needs of forward: "pre_act", "act" or "nothing"
    group: "dist.ProcessGroup | None"
    dtype: torch.dtype  # to compute in
    fuse: bool  # weight gradients go to main_grad


@dataclass
class Wanted:
    """Which gradients backward owes, and of what shape and dtype."""

    call: Call
    needs: tuple[bool, ...]  # x, w1, w2, b1, b2
    dtypes: tuple[torch.dtype | None, ...]  # the same five
    shape: torch.Size  # of x
    weights: tuple[Tensor, Tensor] | None  # where their main_grad is written: w1 and w2 themselves


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """View [..., H] as [M, H] with a contiguous last dim and rows that do not overlap; copies or casts if it must."""
    if t.dim() != 2:
        t = t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)
    if t.dtype != dtype:
        t = t.to(dtype)
    if not t.is_contiguous() and (t.stride(1) != 1 or t.stride(0) < t.shape[1]):
        t = t.contiguous()
    return t


def _vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def forward(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Return y, and pre_act or act, whichever backward is to keep."""
    activation, keep, group, dtype = call.activation, call.keep, call.group, call.dtype
    kernels = ops.kernels(x, w1, w2, b1, b2)
    b1, b2 = _vector(b1, dtype), _vector(b2, dtype)
    act, pre_act = kernels.linear_act(_rows(x, dtype), _rows(w1, dtype), b1, activation, keep == "pre_act")
    w2 = _rows(w2, dtype)
    if group is None:
        y = kernels.linear(act, w2, b2)
    else:
        y = all_reduce(kernels.linear(act, w2, b2 if group.rank() == 0 else None), group)
    # Not view: autograd refuses to modify a view in place, as `y += residual` does.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, x.shape), act if keep == "act" else pre_act


def prepare_backward(
    needs: tuple[bool, ...], x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: Call
) -> tuple[Wanted, tuple[Tensor | None, ...]]:
    """Return what backward is to do, and which of (x, w1, w2, b1) it needs for that (None: not)."""
    need_x, need_w1, need_w2, need_b1, _ = needs
    need_d_pre = need_x or need_w1 or need_b1
    recompute = call.keep == "nothing" and (need_d_pre or need_w2)
    wanted = Wanted(
        call,
        needs,
        (x.dtype, w1.dtype, w2.dtype, None if b1 is None else b1.dtype, None if b2 is None else b2.dtype),
        x.shape,
        (w1, w2) if call.fuse else None,
    )
    return wanted, (
        x if need_w1 or recompute else None,
        w1 if need_x or recompute else None,
        w2 if need_d_pre else None,
        b1 if recompute else None,
    )


def backward(
    wanted: Wanted,
    dy: Tensor,
    x: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    b1: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return (dx, dw1, dw2, db1, db2), None where not wanted; kept: forward's second result."""
    call = wanted.call
    activation, keep, group, dtype = call.activation, call.keep, call.group, call.dtype
    need_x, need_w1, need_w2, need_b1, need_b2 = wanted.needs
    need_d_pre = need_x or need_w1 or need_b1
    if group is not None:
        agree_on_gradient(group, dy)
    kernels = ops.kernels(dy, x, w1, w2, b1)
    x, w1, w2 = (None if t is None else _rows(t, dtype) for t in (x, w1, w2))
    dy = _rows(dy, dtype)
    act, pre_act = (kept, None) if keep == "act" else (None, kept)
    if keep == "nothing" and (need_d_pre or need_w2):
        act, pre_act = kernels.linear_act(x, w1, _vector(b1, dtype), activation, need_d_pre)
    dx = dw1 = dw2 = db1 = db2 = None
    if need_d_pre:
        db1_dtype = wanted.dtypes[3] if need_b1 else None
        d_pre, again, db1 = kernels.linear_dact(dy, w2, pre_act, activation, need_w2 and act is None, db1_dtype)
        act = again if act is None else act
        if need_x:
            dx = kernels.dgrad(d_pre, w1)
            if group is not None:
                dx = start_all_reduce(dx, group)
    if need_w2:
        dw2 = _weight_grad(kernels, dy, act, wanted, 1)
    if need_w1:
        dw1 = _weight_grad(kernels, d_pre, x, wanted, 0)
    if need_b2:
        db2 = kernels.column_sum(dy, wanted.dtypes[4])
    if dx is not None:
        dx = (dx if group is None else wait(dx)).view(wanted.shape).to(wanted.dtypes[0])
    return dx, dw1, dw2, db1 if need_b1 else None, db2


def _weight_grad(kernels: Any, dy: Tensor, x: Tensor | None, wanted: Wanted, which: int) -> Tensor | None:
    if wanted.weights is None:
        return kernels.wgrad(dy, x, wanted.dtypes[1 + which])
    weight: Any = wanted.weights[which]
    kernels.wgrad_accumulate(weight.main_grad, dy, x)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
