"""ffn(): the public function, and its place in autograd. What it computes is in passes.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton.agreement import LayerKind, agree, reject, reporting
from tpffn_triton.collectives import resolve_group
from tpffn_triton.cost_model import forward_chunks as best_chunks
from tpffn_triton.kernels._configs import arithmetic_of
from tpffn_triton.machines import Machine
from tpffn_triton.passes import Call, backward, forward, prepare_backward
from tpffn_triton.transforms import TransformableFFN, transforming
from tpffn_triton.validation import check_dtypes, check_main_grads, check_modes, check_shapes

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    reduce_dtype: torch.dtype | None = None,
    forward_chunks: int | Machine = 1,
    batch_invariant: bool = False,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T + b2 of the full weights, of which this rank holds shards.

    x, y         [..., H], the same on every rank of tp_group; fp32, bf16 or fp16 (fp64 on the native CPU path)
    w1, b1       [F/P, H], [F/P]: this rank's output features of Linear1; gated: [2F/P, H], [2F/P], gate above up
    w2, b2       [H, F/P], [H]: this rank's input features of Linear2; the same b2 on every rank
    activation   "gelu", "gelu_tanh", "silu", "relu", "relu2", or gated "geglu", "geglu_tanh", "swiglu"
    tp_group     None (no parallelism), a ProcessGroup or a 1-D DeviceMesh
    sequence_parallel
                 x, y [S/P, ..., H] are this rank's slice of dim 0, of one size on all ranks: an all-gather of x and a
                 reduce-scatter of y take the all-reduce's place. b2's gradient is of this rank's tokens
    save         what backward keeps beside x: "pre_act", [M, F/P] or [M, 2F/P], or "nothing", at one more GEMM
    gradient_accumulation_fusion
                 backward adds weight gradients to `w1.main_grad` and `w2.main_grad` (contiguous, fp32) instead of
                 returning them; a weight with an attribute `grad_added_to_main_grad` gets it set to True and a
                 gradient of zeros, so that hooks on it fire (Megatron-LM's convention)
    reduce_dtype in which the ranks' partial sums of y and dx are stored, sent and added: None (as computed) or fp32
    forward_chunks
                 Linear2 in so many row chunks at most, y's all-reduce of each behind the GEMM of the next; or, by the
                 cost model, as many as take the least time on a Machine. Chunks are added in another order than the
                 whole, so bits differ; with torch.func transforms always 1
    batch_invariant
                 the bits of a token's y depend on that token alone, not on M nor on the other tokens: one choice of
                 tiles for every M, and over a group a gather, added in the order of ranks, for the all-reduce. Not of
                 gradients; fp32, bf16 and fp16; without sequence_parallel and forward_chunks

    One dtype for all tensors; under torch.autocast each is cast to autocast's, y has it, and each gradient has its
    tensor's dtype: fp32 weights get fp32 gradients straight from the fp32 accumulators.

    Outside of torch.compile, the group's first call with a kind of layer (w1's shape, dtype, activation, b2, whether x
    needs a gradient), and a call or a backward that is not the one expected after those before it, also compare the
    ranks' arguments over the group's store (agreement.py).

    Raises: TypeError, ValueError: arguments that do not fit, with their values, before any launch or collective.
    CollectiveError: a collective failed, or a rank did not come to compare, within the group's timeout.
    """
    group = resolve_group(tp_group)
    # Compiled calls compare nothing.
    comparing = None if torch.compiler.is_compiling() else group
    try:
        check_modes(activation, save, sequence_parallel, reduce_dtype, forward_chunks, batch_invariant)
        dtype = check_dtypes(x, w1, w2, b1, b2)
        if batch_invariant and dtype == torch.float64:
            raise ValueError("batch_invariant computes in fp32, bf16 or fp16, got torch.float64")
        check_shapes(x, w1, w2, b1, b2, activation)
        if sequence_parallel and x.dim() < 2:
            raise ValueError(
                f"sequence_parallel: x must be [S/P, ..., H], this rank's slice of dim 0; got {[*x.shape]}"
            )
        if gradient_accumulation_fusion and torch.is_grad_enabled():
            check_main_grads(w1, w2)
        chunks: Any = forward_chunks
        if isinstance(forward_chunks, Machine):
            chunks = _best_chunks(forward_chunks, x, w2, group, dtype, reduce_dtype)
    except (TypeError, ValueError) as error:
        if comparing is not None:
            reject(comparing, error)
        raise
    need_x = need_d_pre = need_w1 = need_w2 = need_b2 = False
    if torch.is_grad_enabled():
        need_x, need_w1, need_w2 = x.requires_grad, w1.requires_grad, w2.requires_grad
        need_d_pre = need_x or need_w1 or (b1 is not None and b1.requires_grad)
        need_b2 = b2 is not None and b2.requires_grad
    keep = "nothing"
    # A transform hides which gradients are wanted.
    if save == "pre_act" and (need_d_pre or need_w2) and not transforming():
        # Without d_pre nothing recomputes the activation, so dw2 needs it kept.
        keep = "pre_act" if need_d_pre else "act"
    call = Call(
        activation,
        keep,
        group,
        dtype,
        reduce_dtype if reduce_dtype is not None and group is not None and dtype.itemsize < 4 else dtype,
        sequence_parallel and group is not None,
        1 if transforming() else chunks,
        gradient_accumulation_fusion,
        batch_invariant,
    )
    if comparing is not None:
        options = [activation, "no b2" if b2 is None else "b2", "dx" if need_x else "no dx"]
        if sequence_parallel:
            gathered = ["dy"] * (need_d_pre or need_w2)
            gathered += ["x"] * (need_w1 or (keep == "nothing" and (need_d_pre or need_w2)))
            options += ["sequence_parallel", f"backward gathers {' and '.join(gathered) or 'nothing'}"]
        if batch_invariant:
            options.append("batch_invariant")
        if call.reduce_dtype != dtype:
            options.append(f"reduce_dtype={call.reduce_dtype}")
        kind = LayerKind(w1.shape, dtype, x.device.type, tuple(options))
        agree(comparing, kind, call.chunks, ("b2",) if sequence_parallel else ("x", "b2"), x, w1, w2, b1, b2)
    inputs = x, w1, w2, b1, b2, call
    if transforming():
        return reporting(group, TransformableFFN.apply, *inputs)
    if need_d_pre or need_w2 or need_b2:
        # Not reported: checkpointing ends a recomputation by an exception out of apply.
        return _FFN.apply(*inputs)
    return reporting(group, forward, *inputs)[0]


def _best_chunks(
    machine: Machine,
    x: Tensor,
    w2: Tensor,
    group: "dist.ProcessGroup | None",
    dtype: torch.dtype,
    reduce_dtype: torch.dtype | None,
) -> int:
    if torch.compiler.is_compiling():
        raise ValueError("forward_chunks must be a number under torch.compile: the cost model would choose for one M")
    if group is None or dtype == torch.float64:
        return 1
    name = "tf32" if x.is_cuda and arithmetic_of(dtype) == "tf32" else DTYPE_NAMES[dtype]
    hidden, features = w2.shape
    reduced_itemsize = (reduce_dtype or dtype).itemsize
    return best_chunks(machine, x.numel() // max(hidden, 1), hidden, features, group.size(), name, reduced_itemsize)


class _FFN(torch.autograd.Function):
    """y of (x, w1, w2, b1, b2, call), for ordinary calls: Function.apply binds the arguments of one that can be
    transformed by inspection, at 20 µs a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, kept = reporting(inputs[5].group, forward, *inputs)
        ctx.wanted, saved = prepare_backward(ctx.needs_input_grad[:5], *inputs)
        ctx.save_for_backward(*saved, kept if inputs[5].keep != "nothing" else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return *reporting(ctx.wanted.call.group, backward, ctx.wanted, dy, *saved), None
