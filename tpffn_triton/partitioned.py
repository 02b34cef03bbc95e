"""Run the FFN in any of the four partitionings, forward and backward, with the kernels and collectives of `ffn`.

`ffn` is column_row, with everything that a model wants of it. This is what it is compared with: one pair of passes for
all, which partitionings.py's table steers, each with the fusion and the overlap that its collectives leave room for.

    x, y, dy, dx    [..., H]    whole on every rank; M the product of the leading dims
    w1, b1, w2, b2              cut as `Partitioning.cuts` says; W = F, gated 2F
    pre_act         [M, W/P], in row_column [M, W];  hidden [M, F/P], with a column-parallel Linear2 [M, F]

    forward     Linear1, bias and activation in one kernel if column-parallel; else its partial sums are exchanged
                first, and bias and activation are passes over memory
    backward    d_hidden and d_pre in one kernel if Linear2 is row-parallel; else the partial sums of d_hidden are
                exchanged first. Linear2's gradients are computed behind the first exchange, Linear1's behind that of
                dx; in column_row, where dx's is the first, both and the biases' in one operator

Collectives join dim 0: those along features take one more copy, as they do in Megatron-LM's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton import native, ops
from tpffn_triton.agreement import LayerKind, agree, agree_on_gradient, reject, reporting
from tpffn_triton.collectives import resolve_group, start_all_gather, start_all_reduce, start_reduce_scatter, wait
from tpffn_triton.kernels.activations import halves
from tpffn_triton.partitionings import PARTITIONINGS, Partitioning, partitioning_of
from tpffn_triton.passes import as_rows, as_vector
from tpffn_triton.transforms import transforming
from tpffn_triton.validation import check_activation, check_dtypes, check_partitioned_shapes


@torch.compiler.disable(reason="partitioned_ffn is there to be compared; tpffn_triton.ffn compiles")
def partitioned_ffn(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    partitioning: str,
    activation: str = "gelu",
    tp_group: "dist.ProcessGroup | DeviceMesh | None" = None,
) -> Tensor:
    """Return act(x @ w1.T + b1) @ w2.T + b2 of the full weights, of which this rank holds shards.

    x, y          [..., H], the same on every rank; dtypes as in `ffn`
    partitioning  "column_row" (the shards of `ffn`), "row_row", "column_column" or "row_column"
    w1, b1        Linear1 column-parallel: [W/P, H], [W/P]; row-parallel: [W, H/P], and b1 [W/P] (row_row) or [W]
    w2, b2        Linear2 row-parallel: [H, F/P], [H]; column-parallel: [H/P, F], [H/P]
    tp_group      None (no parallelism: all four are the same), a ProcessGroup or a 1-D DeviceMesh

    Ranks compare their arguments as those of `ffn` do. Backward computes and exchanges all gradients, wanted or not. Of
    first order; eager, also where torch.compile surrounds it.

    Raises: TypeError, ValueError: arguments that do not fit, with their values, before any launch or collective.
    RuntimeError: under torch.func. CollectiveError: a collective failed, or a rank did not come to compare, within the
    group's timeout.
    """
    if transforming():
        raise RuntimeError("partitioned_ffn is not for torch.func's transforms; tpffn_triton.ffn is")
    group = resolve_group(tp_group)
    try:
        p = partitioning_of(partitioning)
        check_activation(activation)
        dtype = check_dtypes(x, w1, w2, b1, b2)
        check_partitioned_shapes(x, w1, w2, b1, b2, activation, p, 1 if group is None else group.size())
    except (TypeError, ValueError) as error:
        if group is not None:
            reject(group, error)
        raise
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, b1, b2))
    if group is None:
        p = PARTITIONINGS["column_row"]  # nothing is cut
    else:
        options = (activation, p.name, "no b1" if b1 is None else "b1", "no b2" if b2 is None else "b2")
        kind = LayerKind(w1.shape, dtype, x.device.type, (*options, "gradients" if recorded else "no gradients"))
        replicated = ("x", *(name for name, dim in p.cuts.items() if dim is None))
        agree(group, kind, 1, replicated, x, w1, w2, b1, b2)
    return _PartitionedFFN.apply(x, w1, w2, b1, b2, _Call(p, activation, group, dtype, recorded))


@dataclass
class _Call:
    partitioning: Partitioning
    activation: str
    group: Any  # the process group; None for one rank
    dtype: torch.dtype  # to compute in
    recorded: bool  # backward may come

    def by_rank(self, kind: str | None, t: Tensor, blocks: int = 1) -> Tensor:
        """Lay the features of t [M, blocks · n] out by rank for a reduce-scatter, which cuts dim 0. Blocks, gate and
        up, are cut each by itself. Apart from `start`, so that t is free when that allocates."""
        if kind != "reduce_scatter" or self.group is None:
            return t
        ranks, (tokens, features) = self.group.size(), t.shape
        parts = t.view(tokens, blocks, ranks, features // blocks // ranks)
        return parts.permute(2, 0, 1, 3).contiguous().view(ranks * tokens, features // ranks)

    def start(self, kind: str | None, t: Tensor) -> Tensor:
        """Begin a collective; a reduce-scatter's t is laid out by rank."""
        if kind is None or self.group is None:
            return t
        if kind == "all_gather":
            return start_all_gather(t.contiguous(), self.group)
        return (start_all_reduce if kind == "all_reduce" else start_reduce_scatter)(t, self.group)

    def finish(self, kind: str | None, started: Tensor, blocks: int = 1) -> Tensor:
        """Return the result of a collective that `start` began."""
        if kind is None or self.group is None:
            return started
        result = wait(started)
        if kind != "all_gather":
            return result
        ranks, (rows, features) = self.group.size(), result.shape
        parts = result.view(ranks, rows // ranks, blocks, features // blocks)
        return parts.permute(1, 2, 0, 3).contiguous().view(rows // ranks, ranks * features)

    def own_features(self, t: Tensor) -> Tensor:
        """Return this rank's part of the features of t [M, n]: a copy, which does not keep the whole alive."""
        if self.group is None:
            return t
        return t.chunk(self.group.size(), dim=1)[self.group.rank()].clone(memory_format=torch.contiguous_format)


class _PartitionedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.call, ctx.shape = inputs[5], inputs[0].shape
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
        y, saved = reporting(ctx.call.group, _forward, *inputs)
        if ctx.call.recorded:
            ctx.save_for_backward(*saved)
        # Not view: autograd refuses to modify a view in place, as `y += residual` does.
        return torch.ops.aten._unsafe_view(y, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, *grads = reporting(ctx.call.group, _backward, dy, *ctx.saved_tensors, ctx.dtypes, ctx.call)
        return dx.view(ctx.shape).to(ctx.dtypes[0]), *grads, None


def _forward(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, call: _Call
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return y [M, H], and what backward needs: Linear1's input, w1, w2, pre_act, and hidden if it was gathered."""
    p, activation, dtype = call.partitioning, call.activation, call.dtype
    kernels = ops.kernels(x, w1, w2, b1, b2)
    kept, weights = x, (w1, w2)  # not their copies in autocast's dtype
    x, w1, w2 = (as_rows(t, dtype) for t in (x, w1, w2))
    b1, b2 = as_vector(b1, dtype), as_vector(b2, dtype)
    # Each tensor is let go of before the next one is allocated.
    if p.linear1 == "column":
        hidden, pre_act = kernels.linear_act(x, w1, b1, activation, call.recorded)
    else:
        kept = x = call.own_features(x)
        kind, count = p.pre_act.forward, halves(activation)
        pre_act = call.start(kind, call.by_rank(kind, kernels.linear(x, w1, None), count))
        pre_act = call.finish(kind, pre_act, count)
        if b1 is not None:
            pre_act += b1
        hidden = native.activate(pre_act, activation)
    hidden = call.start(p.hidden.forward, hidden)
    hidden = call.finish(p.hidden.forward, hidden)
    if p.linear2 == "row" and call.group is not None and call.group.rank() > 0:
        b2 = None  # one rank adds it
    y = kernels.linear(hidden, w2, b2)
    gathered = None if p.hidden.forward is None else hidden
    del hidden
    y = call.start(p.y.forward, y)
    return call.finish(p.y.forward, y), (kept, *weights, pre_act, gathered)


def _backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre_act: Tensor,
    hidden: Any,
    dtypes: list[torch.dtype | None],
    call: _Call,
) -> tuple[Tensor | None, ...]:
    """Return (dx [M, H], dw1, dw2, db1, db2), None for a bias that is None. All are computed, wanted or not."""
    p, activation = call.partitioning, call.activation
    _, w1_dtype, w2_dtype, b1_dtype, b2_dtype = dtypes
    if call.group is not None:
        agree_on_gradient(call.group, dy, True, True)
    kernels = ops.kernels(dy, x, w1, w2)
    dy, x, w1, w2 = (as_rows(t, call.dtype) for t in (dy, x, w1, w2))
    if p.linear2 == "column":
        dy = call.own_features(dy)
    first = p.hidden.backward or p.pre_act.backward  # the exchange before Linear1's gradients, if there is one
    db1 = db2 = None
    if p.hidden.backward is None:
        d_pre, hidden, db_partial = kernels.linear_dact(dy, w2, pre_act, activation, True, b1_dtype is not None)
        if first is None:
            dx = call.start(p.x.backward, kernels.dgrad(d_pre, w1))
            sources = None if b1_dtype is None else db_partial, None if b2_dtype is None else dy
            dw1, dw2, db1, db2 = kernels.weight_grads(d_pre, x, dy, hidden, *sources, *dtypes[1:])
            del d_pre, hidden
            dx = call.finish(p.x.backward, dx)
            return dx, dw1, dw2, None if b1_dtype is None else db1, None if b2_dtype is None else db2
        d_pre = call.start(first, d_pre)
        if b1_dtype is not None:
            db1 = kernels.column_sum(db_partial, b1_dtype)
        del db_partial
    else:
        d_hidden = call.start(first, call.by_rank(first, kernels.dgrad(dy, w2)))
        hidden = native.activate(pre_act, activation) if hidden is None else hidden
    dw2 = kernels.wgrad(dy, hidden, w2_dtype)
    del hidden
    if b2_dtype is not None:
        db2 = kernels.column_sum(dy, b2_dtype)
    del dy
    if p.hidden.backward is not None:
        d_pre, _ = native.dact(call.finish(first, d_hidden), pre_act, activation, False)
        del d_hidden
        if b1_dtype is not None:
            db1 = kernels.column_sum(d_pre, b1_dtype)
    else:
        d_pre = call.finish(first, d_pre, halves(activation))
    dx = call.start(p.x.backward, kernels.dgrad(d_pre, w1))
    dw1 = kernels.wgrad(d_pre, x, w1_dtype)
    del d_pre
    return call.finish(p.x.backward, dx), dw1, dw2, db1, db2
