"""Megatron-LM's regions: collectives with a gradient, between which a layer of separate torch operations is parallel.

                                   forward                          backward
    copy_to_tp_region              identity                         all-reduce (sum)
    reduce_from_tp_region          all-reduce (sum)                 identity
    gather_from_sp_region          all-gather along dim 0           reduce-scatter, or this rank's slice
    reduce_scatter_to_sp_region    reduce-scatter along dim 0       all-gather
    scatter_to_sp_region           this rank's slice of dim 0       all-gather

The first pair surrounds a tensor-parallel layer on replicated tensors, the second one on slices of the sequence.
scatter_to_sp_region and gather_from_sp_region(reduce_grad=False) enter and leave the part of a model whose tensors are
slices. All are the identity without a group; gradients need not be contiguous.

Source: Shoeybi et al., "Megatron-LM" (2019), figure 3; Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022), figure 5.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpffn_triton.collectives import all_gather, all_reduce, check_splits, reduce_scatter


def _sum_of(t: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
    t = t.detach()
    return all_reduce(t.contiguous() if consume else t.clone(memory_format=torch.contiguous_format), group)


def _slice_of(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    return t.chunk(group.size())[group.rank()].clone(memory_format=torch.contiguous_format)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
        ctx.group, ctx.consume = group, consume
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of(dx, ctx.group, ctx.consume), None, None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
        return _sum_of(partial, group, consume)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy, None, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, reduce_grad: bool) -> Tensor:
        ctx.group, ctx.reduce_grad = group, reduce_grad
        return all_gather(x.contiguous(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        own = reduce_scatter(dy.contiguous(), ctx.group) if ctx.reduce_grad else _slice_of(dy, ctx.group)
        return own, None, None


class _ReduceScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(partial.contiguous(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy.contiguous(), ctx.group), None


class _ScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _slice_of(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return all_gather(dx.contiguous(), ctx.group), None


def copy_to_tp_region(x: Tensor, group: "dist.ProcessGroup | None", *, consume: bool = False) -> Tensor:
    """Enter the parallel region: forward identity, backward all-reduce of dx.

    consume: sum into dx itself, sparing a copy; right only where nothing else reads dx.
    """
    return x if group is None else _CopyToRegion.apply(x, group, consume)


def reduce_from_tp_region(partial: Tensor, group: "dist.ProcessGroup | None", *, consume: bool = False) -> Tensor:
    """Leave the parallel region: forward all-reduce of partial sums, backward identity.

    consume: sum into `partial` itself, sparing a copy; right only where nothing else reads it, backward included.
    """
    return partial if group is None else _ReduceFromRegion.apply(partial, group, consume)


def gather_from_sp_region(x: Tensor, group: "dist.ProcessGroup | None", *, reduce_grad: bool = True) -> Tensor:
    """Join slices [S/P, ...] to [S, ...]. Slices have one size on all ranks; they are not compared.

    reduce_grad: what follows is tensor-parallel, each rank's gradient a term of a sum, which backward reduce-scatters;
    False: what follows is replicated, and backward keeps this rank's slice of a gradient that all ranks hold.
    """
    return x if group is None else _GatherFromRegion.apply(x, group, reduce_grad)


def reduce_scatter_to_sp_region(partial: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Leave the parallel region for slices: partial sums [S, ...] to this rank's slice [S/P, ...] of their sum.

    Raises: ValueError: S is not divisible by P.
    """
    return partial if group is None else _ReduceScatterToRegion.apply(partial, group)


def scatter_to_sp_region(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Keep this rank's slice [S/P, ...] of a replicated [S, ...].

    Raises: ValueError: S is not divisible by P.
    """
    if group is None:
        return x
    check_splits(x, group.size())
    return _ScatterToRegion.apply(x, group)
