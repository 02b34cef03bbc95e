"""Compute the sharded FFN: one autograd function that owns the order of computation and communication.

    x   [..., H]    replicated over the group      y   [..., H]   replicated
    w1  [F/P, H]    b1 [F/P]                       w2  [H, F/P]   b2 [H], added once, by rank 0
    act, pre_act, d_pre  [M, F/P], M the product of x's leading dims

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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton import ops
from tpffn_triton.agreement import LayerKind, agree, reject
from tpffn_triton.collectives import all_reduce, resolve_group, start_all_reduce, wait
from tpffn_triton.validation import check_ffn_arguments, check_modes


def ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
    tp_group: "dist.ProcessGroup | DeviceMesh | None" = None,
    sequence_parallel: bool = False,
    save: str = "pre_act",
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T + b2 of the full weights, of which this rank holds shards.

    x, y         [..., H], the same on every rank of tp_group; fp32, bf16 or fp16 (fp64 on the native CPU path)
    w1, b1       [F/P, H], [F/P]: this rank's output features of Linear1
    w2, b2       [H, F/P], [H]: this rank's input features of Linear2; the same b2 on every rank
    activation   "gelu", "gelu_tanh", "silu", "relu" or "relu2"
    tp_group     None (no parallelism), a ProcessGroup or a 1-D DeviceMesh
    save         what backward keeps beside x: "pre_act", one [M, F/P] tensor, or "nothing", at one more GEMM

    Outside of torch.compile, the group's first call with a kind of layer (w1's shape, dtype, activation, b2, whether x
    needs a gradient) also compares the ranks' arguments (agreement.py): make it before capturing a CUDA graph.

    Raises: TypeError, ValueError: arguments that do not fit, with their values, before any launch or collective.
    """
    group = resolve_group(tp_group)
    try:
        check_modes(activation, save, sequence_parallel)
        check_ffn_arguments(x, w1, w2, b1, b2)
    except (TypeError, ValueError) as error:
        # Compiled calls compare nothing: nobody would be listening.
        if group is not None and not torch.compiler.is_compiling():
            device, w1_shape = getattr(x, "device", torch.device("cpu")), getattr(w1, "shape", None)
            reject(group, device, w1_shape, error)
        raise
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, b1, b2))
    if group is not None and not torch.compiler.is_compiling():
        dx_needed = differentiable and x.requires_grad
        kind = LayerKind(w1.shape, (x.dtype, x.device.type, activation, b2 is None, dx_needed))
        agree(group, x.device, kind, lambda: _description(x, w1, b2, activation, dx_needed))
    if differentiable:
        return _FFN.apply(x, w1, w2, b1, b2, activation, save, group)
    w1, w2, b1, b2 = _dense(w1, w2, b1, b2)
    act, _ = ops.linear_act(_rows(x), w1, b1, activation, False)
    return _linear2(act, w2, b2, group).view(x.shape)


def _description(x: Tensor, w1: Tensor, b2: Tensor | None, activation: str, dx_needed: bool) -> str:
    tensors = f"x {list(x.shape)} and w1 {list(w1.shape)} in {x.dtype} on {x.device.type}"
    return f"{tensors}, {activation}, {'no b2' if b2 is None else 'b2'}, {'dx' if dx_needed else 'no dx'}"


def _rows(t: Tensor) -> Tensor:
    """View [..., H] as [M, H] with a contiguous last dim and rows that do not overlap; copies where it must."""
    rows = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    return rows


def _dense(w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> tuple:
    """Return the parameters as the kernels read them; copies those that are transposed or expanded views."""
    return _rows(w1), _rows(w2), None if b1 is None else b1.contiguous(), None if b2 is None else b2.contiguous()


def _linear2(act: Tensor, w2: Tensor, b2: Tensor | None, group: "dist.ProcessGroup | None") -> Tensor:
    if group is None:
        return ops.linear(act, w2, b2)
    return all_reduce(ops.linear(act, w2, b2 if group.rank() == 0 else None), group)


class _FFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        activation: str,
        save: str,
        group: "dist.ProcessGroup | None",
    ) -> Tensor:
        need_x, need_w1, need_w2, need_b1, _ = ctx.needs_input_grad[:5]
        need_d_pre = need_x or need_w1 or need_b1
        rows = _rows(x)
        w1, w2, b1, b2 = _dense(w1, w2, b1, b2)
        act, pre_act = ops.linear_act(rows, w1, b1, activation, need_d_pre and save == "pre_act")
        recompute = save == "nothing" and (need_d_pre or need_w2)
        ctx.save_for_backward(
            rows if need_w1 or recompute else None,
            w1 if need_x or recompute else None,
            w2 if need_d_pre else None,
            b1 if recompute else None,
            pre_act if need_d_pre and not recompute else None,
            # Without d_pre nothing recomputes the activation, so dw2 needs it kept.
            act if need_w2 and not need_d_pre and not recompute else None,
        )
        ctx.activation, ctx.group, ctx.recompute = activation, group, recompute
        ctx.need_d_pre, ctx.shape = need_d_pre, x.shape
        return _linear2(act, w2, b2, group).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_w1, need_w2, need_b1, need_b2 = ctx.needs_input_grad[:5]
        rows, w1, w2, b1, pre_act, act = ctx.saved_tensors
        dx = dw1 = dw2 = db1 = db2 = None
        dy = _rows(dy)
        if ctx.recompute:
            act, pre_act = ops.linear_act(rows, w1, b1, ctx.activation, ctx.need_d_pre)
        if ctx.need_d_pre:
            need_act = need_w2 and not ctx.recompute
            d_pre, recomputed_act, db1 = ops.linear_dact(dy, w2, pre_act, ctx.activation, need_act, need_b1)
            act = recomputed_act if need_act else act
            if need_x:
                dx = ops.dgrad(d_pre, w1)
                if ctx.group is not None:
                    dx = start_all_reduce(dx, ctx.group)
        if need_w2:
            dw2 = ops.wgrad(dy, act)
        if need_w1:
            dw1 = ops.wgrad(d_pre, rows)
        if need_b2:
            db2 = ops.column_sum(dy)
        if dx is not None:
            dx = (dx if ctx.group is None else wait(dx)).view(ctx.shape)
        return dx, dw1, dw2, db1 if need_b1 else None, db2, None, None, None
