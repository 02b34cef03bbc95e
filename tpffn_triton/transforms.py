"""The FFN under torch.func and forward-mode AD.

These need an autograd function's forward and setup_context apart, and a derivative of each function that they may
differentiate: first derivatives, reverse and forward, and vmap of both are there; second ones are refused.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from tpffn_triton.collectives import all_reduce
from tpffn_triton.passes import Wanted, backward, forward, prepare_backward
from tpffn_triton.reference import ACTIVATIONS
from tpffn_triton.sharding import halves


def transforming() -> bool:
    """Say whether a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


class TransformableFFN(torch.autograd.Function):
    """(y, what backward keeps) of (x, w1, w2, b1, b2, call)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        y, kept = forward(*inputs)
        return y, y.new_empty((0,)) if kept is None else kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.wanted, saved = prepare_backward(ctx.needs_input_grad[:5], *inputs)
        ctx.save_for_backward(*saved, output[1])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        # torch.func.vjp calls back after its transform has ended: what it had wrapped is still wrapped.
        tensors = (None if t is None else unwrap_if_dead(t) for t in (dy, *ctx.saved_tensors))
        return *_BackwardOnce.apply(ctx.wanted, *tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        # Rare, so through torch's operations rather than kernels of its own.
        activation, _, group, dtype, _ = ctx.wanted.call
        x, w1, w2, b1, _ = _cast(ctx.saved_tensors, dtype)
        dx, dw1, dw2, db1, db2 = _cast(tangents[:5], dtype)
        pre_act = F.linear(x, w1, b1)
        act, pullback = torch.func.vjp(ACTIVATIONS[activation], pre_act)  # type: ignore[misc]
        # Each element of act depends on one element of pre_act, or on one of gate and one of up.
        (derivative,) = pullback(torch.ones_like(act))
        d_pre = torch.zeros_like(pre_act)
        d_pre = d_pre if dx is None else d_pre + F.linear(dx, w1)
        d_pre = d_pre if dw1 is None else d_pre + F.linear(x, dw1)
        d_pre = d_pre if db1 is None else d_pre + db1
        dy = F.linear((derivative * d_pre).unflatten(-1, (halves(activation), -1)).sum(-2), w2)
        dy = dy if dw2 is None else dy + F.linear(act, dw2)
        dy = dy if group is None else all_reduce(dy, group)
        return dy if db2 is None else dy + db2, None


class _BackwardOnce(torch.autograd.Function):
    """The backward pass, which has no derivative: under torch.func the kernels would drop it silently."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wanted: Wanted, *tensors: Any) -> tuple[Tensor | None, ...]:
        return backward(wanted, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("tpffn_triton has no second derivatives: its backward is once_differentiable")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError("tpffn_triton has no second derivatives: forward-mode AD of its backward")
