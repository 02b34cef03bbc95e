"""Cut full FFN weights into a rank's shards, and put shards together again.

    w1 [F, H], b1 [F]   cut along F: rank r holds rows r·F/P ... (r+1)·F/P     (column-parallel)
    w2 [H, F]           cut along F: rank r holds those columns                (row-parallel)
    b2 [H]              replicated

With a gated activation w1 is [2F, H] and b1 [2F], F gate rows above F up rows; rank r holds rows r·F/P ... (r+1)·F/P of
each half, gate above up again: the rows that meet in f(gate) · up stay together.

Biases may be None. Source: Megatron-LM's column- and row-parallel linears, in nn.Linear's [out, in] layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tpffn_triton.kernels.activations import halves
from tpffn_triton.validation import check_activation, check_divisible, check_shapes, check_tensors

FFNShard = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def shard_ffn(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, rank: int, world_size: int, *, activation: str
) -> FFNShard:
    """Return rank's contiguous (w1 [F/P, H], b1 [F/P], w2 [H, F/P], b2 [H]); they may share the inputs' memory. Gated:
    w1 [2F/P, H], b1 [2F/P].

    Raises: TypeError, ValueError: unknown activation, shapes that do not fit, F not divisible by world_size, or a rank
    outside of it (the message shows the values).
    """
    check_activation(activation)
    check_tensors(None, w1, w2, b1, b2)
    check_shapes(None, w1, w2, b1, b2, activation)
    F = w2.shape[1]
    check_divisible(F, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside of world_size {world_size}")
    own = slice(rank * F // world_size, (rank + 1) * F // world_size)

    def own_rows(t: Tensor) -> Tensor:
        return t.unflatten(0, (halves(activation), F))[:, own].flatten(0, 1).contiguous()

    return own_rows(w1), None if b1 is None else own_rows(b1), w2[:, own].contiguous(), b2


def unshard_ffn(shards: Sequence[FFNShard], *, activation: str) -> FFNShard:
    """Return the full (w1, b1, w2, b2) of the shards of rank 0, 1, ...: the exact inverse of `shard_ffn`.

    Raises: ValueError: no shards, unknown activation, or shards that differ in shape or in b2 (the message says where).
    """
    check_activation(activation)
    if not shards:
        raise ValueError("unshard_ffn needs at least one shard")
    described = [tuple(None if t is None else tuple(t.shape) for t in shard) for shard in shards]
    if len(set(described)) > 1:
        raise ValueError(f"shards differ in shape: {described}")
    w1s, b1s, w2s, b2s = zip(*shards, strict=True)
    for rank, b2 in enumerate(b2s):
        if b2 is not None and not torch.equal(b2, b2s[0]):
            raise ValueError(f"b2 is replicated, but rank {rank}'s differs from rank 0's")
    check_tensors(None, w1s[0], w2s[0], b1s[0], b2s[0])
    check_shapes(None, w1s[0], w2s[0], b1s[0], b2s[0], activation)

    def joined(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.unflatten(0, (halves(activation), -1)) for t in rows], dim=1).flatten(0, 1)

    return joined(w1s), None if b1s[0] is None else joined(b1s), torch.cat(w2s, dim=1), b2s[0]
