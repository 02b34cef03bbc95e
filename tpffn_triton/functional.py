"""ffn(): the public function, and its place in autograd. What it computes is in passes.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton.agreement import LayerKind, agree, reject, report
from tpffn_triton.collectives import resolve_group
from tpffn_triton.passes import Call, backward, forward, prepare_backward
from tpffn_triton.transforms import TransformableFFN, transforming
from tpffn_triton.validation import check_dtypes, check_main_grads, check_modes, check_shapes


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
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T + b2 of the full weights, of which this rank holds shards.

    x, y         [..., H], the same on every rank of tp_group; fp32, bf16 or fp16 (fp64 on the native CPU path)
    w1, b1       [F/P, H], [F/P]: this rank's output features of Linear1; gated: [2F/P, H], [2F/P], gate above up
    w2, b2       [H, F/P], [H]: this rank's input features of Linear2; the same b2 on every rank
    activation   "gelu", "gelu_tanh", "silu", "relu", "relu2", or gated "geglu", "geglu_tanh", "swiglu"
    tp_group     None (no parallelism), a ProcessGroup or a 1-D DeviceMesh
    save         what backward keeps beside x: "pre_act", [M, F/P] or [M, 2F/P], or "nothing", at one more GEMM
    gradient_accumulation_fusion
                 backward adds weight gradients to `w1.main_grad` and `w2.main_grad` (contiguous, fp32) instead of
                 returning them; a weight with an attribute `grad_added_to_main_grad` gets it set to True and a
                 gradient of zeros, so that hooks on it fire (Megatron-LM's convention)

    One dtype for all tensors; under torch.autocast each is cast to autocast's, y has it, and each gradient has its
    tensor's dtype: fp32 weights get fp32 gradients straight from the fp32 accumulators.

    Outside of torch.compile, the group's first call with a kind of layer (w1's shape, dtype, activation, b2, whether x
    needs a gradient), and a call that differs from what followed the one before it last time, also compare the ranks'
    arguments over the group's store (agreement.py).

    Raises: TypeError, ValueError: arguments that do not fit, with their values, before any launch or collective.
    CollectiveError: a collective failed, or a rank did not come to compare, within the group's timeout.
    """
    group = resolve_group(tp_group)
    # Compiled calls compare nothing.
    comparing = None if torch.compiler.is_compiling() else group
    kind: Any = None
    try:
        check_modes(activation, save, sequence_parallel)
        dtype = check_dtypes(x, w1, w2, b1, b2)
        need_d_pre = need_w2 = need_b2 = False
        if torch.is_grad_enabled():
            need_d_pre = x.requires_grad or w1.requires_grad or (b1 is not None and b1.requires_grad)
            need_w2, need_b2 = w2.requires_grad, b2 is not None and b2.requires_grad
        if comparing is not None:
            dx = "dx" if need_d_pre and x.requires_grad else "no dx"
            options = (activation, "no b2" if b2 is None else "b2", dx)
            kind = LayerKind(w1.shape, dtype, x.device.type, options)
        check_shapes(x, w1, w2, b1, b2, activation)
        if gradient_accumulation_fusion and torch.is_grad_enabled():
            check_main_grads(w1, w2)
    except (TypeError, ValueError) as error:
        if comparing is not None:
            reject(comparing, error)
        raise
    if comparing is not None:
        agree(comparing, kind, (x.shape, dtype), x, w1, w2, b1, b2)
    keep = "nothing"
    # A transform hides which gradients are wanted.
    if save == "pre_act" and (need_d_pre or need_w2) and not transforming():
        # Without d_pre nothing recomputes the activation, so dw2 needs it kept.
        keep = "pre_act" if need_d_pre else "act"
    inputs = x, w1, w2, b1, b2, Call(activation, keep, group, dtype, gradient_accumulation_fusion)
    try:
        if transforming():
            return TransformableFFN.apply(*inputs)
        return _FFN.apply(*inputs) if need_d_pre or need_w2 or need_b2 else forward(*inputs)[0]
    except Exception as error:
        if comparing is not None:
            report(comparing, error)
        raise


class _FFN(torch.autograd.Function):
    """y of (x, w1, w2, b1, b2, call), for ordinary calls: Function.apply binds the arguments of one that can be
    transformed by inspection, at 20 µs a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, kept = forward(*inputs)
        ctx.wanted, saved = prepare_backward(ctx.needs_input_grad[:5], *inputs)
        ctx.save_for_backward(*saved, kept if inputs[5].keep != "nothing" else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group = ctx.wanted.call.group
        try:
            return *backward(ctx.wanted, dy, *ctx.saved_tensors), None
        except Exception as error:
            if group is not None and not torch.compiler.is_compiling():
                report(group, error)
            raise
