"""The two passes of the sharded FFN: what is computed and communicated, in which order.

    x   [..., H]    replicated over the group      y   [..., H]   replicated; or both this rank's slice of dim 0
    w1  [W, H]      b1 [W]                         w2  [H, F/P]   b2 [H], added once, by rank 0
    pre_act, d_pre  [M, W], act [M, F/P]; M the product of x's leading dims, W = F/P or, where the activation is
                    gated, 2F/P: gate above (in pre_act: left of) up

    forward   y, pre_act = ffn_forward(x, w1, b1, w2, b2 on rank 0)     one launch or two (kernels/forward.py)
              y          = all_reduce(y)
    backward  d_pre, act, db_partial = linear_dact(dy, w2, pre_act)
              dx           = all_reduce(dgrad(d_pre, w1))        started here ...
              dw1, dw2, db1, db2 = weight_grads(d_pre, x, dy, act, db_partial)
                                                                 ... waited for here

Megatron-LM's two linears are two autograd functions, so dx's all-reduce hides behind dw1 alone; here it hides behind
every weight and bias gradient. Gradients nobody asks for are not computed, and what only they need is not saved: with
one weight alone, each gradient is an operator of its own.

With sequence parallelism x [S/P, ...] is gathered before linear_act, and reduce-scatter takes the all-reduce's place.
Backward gathers dy and then, since the slice alone is kept, x: in flight behind linear_dact, dgrad and whatever of the
gradients does without x, so these are not one operator: db1 = column_sum(db_partial), dw2 = wgrad(dy, act), and then
dw1 = wgrad(d_pre, x), db2 = column_sum(dy). To compute again it needs x first; dy is then in flight behind linear_act.
db2 is of this rank's tokens.

With row chunks, y's all-reduce of each is in flight behind the GEMM of the next. With reduce_dtype the partial sums of
y and dx are stored, sent and added in that dtype, and rounded once more at the end.

Batch-invariant: tiles and launches of forward do not depend on M, and y's partial sums are gathered and added in the
order of ranks: P / 2 times the bytes of a ring all-reduce.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpffn_triton import ops
from tpffn_triton.agreement import agree_on_gradient
from tpffn_triton.collectives import check_not_batched, start_all_gather, start_all_reduce, start_reduce_scatter, wait
from tpffn_triton.cost_model import rows_of_a_chunk


@dataclass  # torch.func takes a tuple apart; freezing costs a call 0.7 µs
class Call:
    """What a call asks for beside its tensors."""

    activation: str
    keep: str  # what backward needs of forward: "pre_act", "act" or "nothing"
    group: Any  # the process group; None for one rank
    dtype: torch.dtype  # to compute in
    reduce_dtype: torch.dtype  # to add partial sums in
    sequence_parallel: bool  # with a group only
    chunks: int  # of y's rows, at most
    fuse: bool  # weight gradients go to main_grad
    batch_invariant: bool = False  # with sequence_parallel False and one chunk


@dataclass
class Wanted:
    """Which gradients backward owes, and of what shape and dtype."""

    call: Call
    needs: tuple[bool, ...]  # x, w1, w2, b1, b2
    dtypes: tuple[torch.dtype | None, ...]  # the same five
    shape: torch.Size  # of x
    weights: tuple[Tensor, Tensor] | None  # where their main_grad is written: w1 and w2 themselves

    @property
    def d_pre(self) -> bool:
        """Whether d_pre is needed."""
        need_x, need_w1, _, need_b1, _ = self.needs
        return need_x or need_w1 or need_b1

    @property
    def all_dy(self) -> bool:
        """Whether dy of all tokens is needed: for everything but db2."""
        return self.d_pre or self.needs[2]

    @property
    def recompute(self) -> bool:
        """Whether Linear1 is computed again."""
        return self.call.keep == "nothing" and self.all_dy


def as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """View [..., H] as [M, H] with a contiguous last dim and rows that do not overlap; copies or casts if it must."""
    if t.dim() != 2:
        t = t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)
    if t.dtype != dtype:
        t = t.to(dtype)
    if not t.is_contiguous() and (t.stride(1) != 1 or t.stride(0) < t.shape[1]):
        t = t.contiguous()
    return t


def as_vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def forward(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Return y, and pre_act or act, whichever backward is to keep."""
    activation, keep, dtype = call.activation, call.keep, call.dtype
    if call.batch_invariant and call.group is not None:
        for t in (x, w1, w2, b1, b2):
            if t is not None:
                check_not_batched("an all-gather", t)  # of y, but before y is computed
    kernels = ops.kernels(x, w1, w2, b1, b2)
    b1, b2 = as_vector(b1, dtype), as_vector(b2, dtype)
    tokens = as_rows(x, dtype)
    if call.sequence_parallel:
        tokens = wait(_start_gather(tokens, call))
    w1, w2 = as_rows(w1, dtype), as_rows(w2, dtype)
    if call.group is not None and call.group.rank() > 0:
        b2 = None
    if call.group is not None and call.chunks > 1:
        act, pre_act = kernels.linear_act(tokens, w1, b1, activation, keep == "pre_act")
        kept = act if keep == "act" else pre_act
        y = _linear2_by_chunks(kernels, act, w2, b2, call).to(dtype)
    else:
        y, kept = kernels.ffn_forward(tokens, w1, b1, w2, b2, activation, keep, call.reduce_dtype, call.batch_invariant)
        del tokens
        if call.group is not None:
            y = (_sum_in_order(y, call) if call.batch_invariant else wait(_start_sum(y, call))).to(dtype)
    # Not view: autograd refuses to modify a view in place, as `y += residual` does.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, x.shape), kept


def _linear2_by_chunks(kernels: Any, act: Tensor, w2: Tensor, b2: Tensor | None, call: Call) -> Tensor:
    """Return Linear2 of act [M, F/P], summed over the group: y [M, H], or this rank's rows of it."""
    rows = rows_of_a_chunk(act.shape[0], call.chunks)
    if torch.compiler.is_compiling():  # where collectives return new tensors
        parts = [kernels.linear(chunk, w2, b2, call.reduce_dtype) for chunk in act.split(rows)]
        return torch.cat([wait(started) for started in [_start_sum(part, call) for part in parts]])
    y = act.new_empty((act.shape[0], w2.shape[0]), dtype=call.reduce_dtype)
    started = []
    for chunk, part in zip(act.split(rows), y.split(rows), strict=True):
        kernels.linear_into(part, chunk, w2, b2)
        started.append(_start_sum(part, call))
    for part in started:
        wait(part)
    return y


def _sum_in_order(partial: Tensor, call: Call) -> Tensor:
    """Add the ranks' partial sums [M, H] in fp32, from rank 0 on. A ring adds a message's parts in different orders,
    and where they begin depends on M."""
    parts = wait(start_all_gather(partial, call.group)).unflatten(0, (call.group.size(), -1)).unbind()
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total


def _start_sum(partial: Tensor, call: Call) -> Tensor:
    """Begin to add the ranks' partial sums [M, H], which are consumed."""
    return (start_reduce_scatter if call.sequence_parallel else start_all_reduce)(partial, call.group)


def prepare_backward(
    needs: tuple[bool, ...], x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: Call
) -> tuple[Wanted, tuple[Tensor | None, ...]]:
    """Return what backward is to do, and which of (x, w1, w2, b1) it needs for that (None: not)."""
    wanted = Wanted(
        call,
        needs,
        (x.dtype, w1.dtype, w2.dtype, None if b1 is None else b1.dtype, None if b2 is None else b2.dtype),
        x.shape,
        (w1, w2) if call.fuse else None,
    )
    need_x, need_w1, *_ = needs
    return wanted, (
        x if need_w1 or wanted.recompute else None,
        w1 if need_x or wanted.recompute else None,
        w2 if wanted.d_pre else None,
        b1 if wanted.recompute else None,
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
    need_d_pre, recompute, slices = wanted.d_pre, wanted.recompute, call.sequence_parallel
    gather_dy = slices and wanted.all_dy
    if group is not None:
        agree_on_gradient(group, dy, not slices, need_x or gather_dy)
    kernels = ops.kernels(dy, x, w1, w2, b1)
    present: Any = (None if t is None else as_rows(t, dtype) for t in (x, w1, w2))
    x, w1, w2 = present
    own_dy = dy = as_rows(dy, dtype)
    # One gather at a time: two at once would both come late.
    if slices and recompute:
        x = wait(_start_gather(x, call))
    if gather_dy:
        dy = _start_gather(dy, call)
    act, pre_act = (kept, None) if keep == "act" else (None, kept)
    if recompute:
        act, pre_act = kernels.linear_act(x, w1, as_vector(b1, dtype), activation, need_d_pre)
    if gather_dy:
        dy = wait(dy)
    x_in_flight = slices and need_w1 and not recompute
    if x_in_flight:
        x = _start_gather(x, call)
    dx = dw1 = dw2 = db1 = db2 = None
    if need_d_pre:
        d_pre, again, db_partial = kernels.linear_dact(dy, w2, pre_act, activation, need_w2 and act is None, need_b1)
        act = again if act is None else act
        del again, pre_act  # each tensor is let go of before the next one is allocated
        if need_x:
            dx = kernels.dgrad(d_pre, w1, call.reduce_dtype)
            if group is not None:
                dx = _start_sum(dx, call)
    if need_w1 and need_w2 and not x_in_flight:
        biases = db_partial if need_b1 else None, own_dy if need_b2 else None
        dw1, dw2, db1, db2 = _weight_grads(kernels, (d_pre, x, dy, act), biases, wanted)
        del act, dy, biases
    else:
        if need_b1:
            db1 = kernels.column_sum(db_partial, wanted.dtypes[3])
            del db_partial
        if need_w2:
            dw2 = _weight_grad(kernels, dy, act, wanted, 1)
        del act, dy
        if need_w1:
            dw1 = _weight_grad(kernels, d_pre, wait(x) if x_in_flight else x, wanted, 0)
        if need_b2:
            db2 = kernels.column_sum(own_dy, wanted.dtypes[4])
    if dx is not None:
        dx = (dx if group is None else wait(dx)).view(wanted.shape).to(wanted.dtypes[0])
    return dx, dw1, dw2, db1 if need_b1 else None, db2 if need_b2 else None


def _start_gather(t: Any, call: Call) -> Tensor:
    """Begin to join this rank's rows with the others'."""
    return start_all_gather(t.contiguous(), call.group)


def _weight_grads(kernels: Any, matrices: tuple, biases: tuple, wanted: Wanted) -> tuple[Tensor | None, ...]:
    if wanted.weights is None:
        return kernels.weight_grads(*matrices, *biases, *wanted.dtypes[1:])
    weights: Any = wanted.weights
    w1, w2 = weights
    db1, db2 = kernels.weight_grads_accumulate(w1.main_grad, w2.main_grad, *matrices, *biases, *wanted.dtypes[3:])
    return _added(w1), _added(w2), db1, db2


def _weight_grad(kernels: Any, dy: Tensor, x: Tensor | None, wanted: Wanted, which: int) -> Tensor | None:
    if wanted.weights is None:
        return kernels.wgrad(dy, x, wanted.dtypes[1 + which])
    weight: Any = wanted.weights[which]
    kernels.wgrad_accumulate(weight.main_grad, dy, x)
    return _added(weight)


def _added(weight: Any) -> Tensor | None:
    """Return the gradient of a weight whose main_grad has been added to."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
