"""The FFN under torch.func and forward-mode AD.

These need an autograd function's forward and setup_context apart, and a derivative of each function that they may
differentiate: first derivatives, reverse and forward, and vmap of both are there; second ones are refused.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from tpffn_triton.collectives import all_gather, all_reduce, reduce_scatter
from tpffn_triton.kernels.activations import halves
from tpffn_triton.passes import Call, backward, forward, prepare_backward
from tpffn_triton.reference import ACTIVATIONS

NO_SECOND_DERIVATIVES = "tpffn_triton has no second derivatives"


def transforming() -> bool:
    """Say whether a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class TransformableFFN(torch.autograd.Function):
    """y of (x, w1, w2, b1, b2, call), where call keeps nothing: what transforms batch or lift must be inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return forward(*inputs)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.wanted, _ = prepare_backward(ctx.needs_input_grad[:5], *inputs)
        # The same for both: vmap remembers the batch dims of one of them.
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        # torch.func.vjp calls back after its transform has ended: what it had wrapped is still wrapped.
        tensors = (None if t is None else unwrap_if_dead(t) for t in (dy, *ctx.saved_tensors[:4]))
        return *_Once.apply(backward, ctx.wanted, *tensors, None), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Once.apply(_tangent, ctx.wanted.call, *ctx.saved_tensors[:4], *tangents[:5])


def _tangent(call: Call, *tensors: Tensor | None) -> Tensor:
    """Return the tangent of y, for x, w1, w2, b1 and the tangents of these and b2. Rare, so through torch's operations
    rather than kernels of its own."""
    cast: list[Any] = [None if t is None else t.to(call.dtype) for t in tensors]
    x, w1, w2, b1, dx, dw1, dw2, db1, db2 = cast
    if call.sequence_parallel:
        x, dx = (None if t is None else all_gather(t.contiguous(), call.group) for t in (x, dx))
    pre_act = F.linear(x, w1, b1)
    act, pullback = torch.func.vjp(ACTIVATIONS[call.activation], pre_act)  # type: ignore[misc]
    # Each element of act depends on one element of pre_act, or on one of gate and one of up.
    (derivative,) = pullback(torch.ones_like(act))
    d_pre = torch.zeros_like(pre_act)
    d_pre = d_pre if dx is None else d_pre + F.linear(dx, w1)
    d_pre = d_pre if dw1 is None else d_pre + F.linear(x, dw1)
    d_pre = d_pre if db1 is None else d_pre + db1
    dy = F.linear((derivative * d_pre).unflatten(-1, (halves(call.activation), -1)).sum(-2), w2)
    dy = dy if dw2 is None else dy + F.linear(act, dw2)
    if call.group is not None:
        dy = reduce_scatter(dy, call.group) if call.sequence_parallel else all_reduce(dy, call.group)
    return dy if db2 is None else dy + db2


class _Once(torch.autograd.Function):
    """A derivative, which has none of its own: torch.func would drop those of kernels and collectives silently."""

    generate_vmap_rule = True

    @staticmethod
    def forward(derivative: Callable, *args: Any) -> Any:
        return derivative(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{NO_SECOND_DERIVATIVES}: its derivatives are once_differentiable")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{NO_SECOND_DERIVATIVES}: forward-mode AD of its derivatives")
