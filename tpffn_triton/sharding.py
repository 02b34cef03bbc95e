"""Cut full FFN weights into a rank's shards, and put shards together again.

    w1 [F, H], b1 [F]   cut along F: rank r holds rows r·F/P ... (r+1)·F/P     (column-parallel)
    w2 [H, F]           cut along F: rank r holds those columns                (row-parallel)
    b2 [H]              replicated

With a gated activation w1 is [2F, H] and b1 [2F], F gate rows above F up rows; rank r holds rows r·F/P ... (r+1)·F/P of
each half, gate above up again: the rows that meet in f(gate) · up stay together.

So it is for column_row; the other partitionings cut along the dims that `Partitioning.cuts` names. Biases may be None.

Source: Megatron-LM's column- and row-parallel linears, in nn.Linear's [out, in] layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tpffn_triton.kernels.activations import halves
from tpffn_triton.partitionings import partitioning_of
from tpffn_triton.validation import (
    check_activation,
    check_partitioned_shapes,
    check_positive,
    check_shapes,
    check_tensors,
)

FFNShard = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
NAMES = ("w1", "b1", "w2", "b2")


def shard_ffn(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    rank: int,
    world_size: int,
    *,
    activation: str,
    partitioning: str = "column_row",
) -> FFNShard:
    """Return rank's contiguous (w1 [F/P, H], b1 [F/P], w2 [H, F/P], b2 [H]); they may share the inputs' memory. Gated:
    w1 [2F/P, H], b1 [2F/P]. Other partitionings: `Partitioning.shard_shapes`.

    Raises: TypeError, ValueError: unknown activation or partitioning, shapes that do not fit, sizes not divisible by
    world_size, or a rank outside of it (the message shows the values).
    """
    check_activation(activation)
    p = partitioning_of(partitioning)
    check_tensors(None, w1, w2, b1, b2)
    check_shapes(None, w1, w2, b1, b2, activation)
    check_positive("world_size", world_size)
    hidden_size, ffn_hidden_size = w2.shape
    p.check_divisible(hidden_size, ffn_hidden_size, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside of world_size {world_size}")

    def own(name: str, t: Tensor | None) -> Tensor | None:
        dim = p.cuts[name]
        if t is None or dim is None:
            return t
        part = _by_halves(name, t, activation).chunk(world_size, dim + 1)[rank]
        return part.flatten(0, 1).contiguous()

    cut: tuple = tuple(map(own, NAMES, (w1, b1, w2, b2)))
    return cut


def unshard_ffn(shards: Sequence[FFNShard], *, activation: str, partitioning: str = "column_row") -> FFNShard:
    """Return the full (w1, b1, w2, b2) of the shards of rank 0, 1, ...: the exact inverse of `shard_ffn`.

    Raises: ValueError: no shards, unknown activation or partitioning, shards that do not fit or differ in shape, or
    that differ in what is replicated (the message says where).
    """
    check_activation(activation)
    p = partitioning_of(partitioning)
    if not shards:
        raise ValueError("unshard_ffn needs at least one shard")
    described = [tuple(None if t is None else tuple(t.shape) for t in shard) for shard in shards]
    if len(set(described)) > 1:
        raise ValueError(f"shards differ in shape: {described}")
    w1, b1, w2, b2 = shards[0]
    check_tensors(None, w1, w2, b1, b2)
    check_partitioned_shapes(None, w1, w2, b1, b2, activation, p, len(shards))

    def joined(name: str, parts: Sequence) -> Tensor | None:
        dim, first = p.cuts[name], parts[0]
        if first is not None and dim is not None:
            return torch.cat([_by_halves(name, t, activation) for t in parts], dim + 1).flatten(0, 1)
        for rank, t in enumerate(parts if first is not None else ()):
            if not torch.equal(t, first):
                raise ValueError(f"{name} is replicated, but rank {rank}'s differs from rank 0's")
        return first

    full: tuple = tuple(map(joined, NAMES, zip(*shards, strict=True)))
    return full


def _by_halves(name: str, t: Tensor, activation: str) -> Tensor:
    """View [rows, ...] as [halves, rows / halves, ...]: gate rows and up rows are cut each by themselves."""
    count = halves(activation) if name in ("w1", "b1") else 1
    return t.unflatten(0, (count, t.shape[0] // count))
