"""Work out what the ranks of one FFN layer send, how, and why. Terms: plan.py; when: plan_schedule.py.

A ring all-reduce of N elements cuts them into P chunks, the first N mod P one element longer. Reduce-scatter
and all-gather take P-1 rounds each. Rank r sends every chunk but r+1 in the first and every chunk but r+2 in
the second (mod P): 2N - chunk[r+1] - chunk[r+2] elements; all ranks together send 2(P-1)·N. Where features or tokens
are gathered or scattered, the chunks are the ranks' parts, all equal: (P-1)/P·N elements a rank.

Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053) for the partitioning, Korthikanti et al., "Reducing activation
recomputation in large transformer models" (arXiv:2205.05198) for sequence parallelism; Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009) for the ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tpffn_triton.partitionings import (
    COPY,
    GATHER,
    JOIN,
    KEEP,
    REDUCE,
    REDUCE_SCATTER,
    SPLIT,
    Partitioning,
    Region,
)
from tpffn_triton.plan_records import Collective, NoCommunication, Overlap, Reason, Tensor
from tpffn_triton.plan_schedule import Operation

# What needs no collective there, forward and backward, and why; or why it needs the one it has.
_AT_X: dict[Region, tuple[str, str]] = {
    COPY: (
        "x is whole on every rank, and a column-parallel Linear1 reads all of it",
        "each rank's features of d_pre give one term of dx: the terms are summed",
    ),
    SPLIT: (
        "x is whole on every rank, which takes the features that its w1 shard multiplies",
        "each rank has dx of its own features, and all ranks need all",
    ),
}
_AT_PRE_ACT: dict[Region, tuple[str, str]] = {
    KEEP: (
        "a rank's output features are whole sums, so bias and activation apply to them at once",
        "Linear1's gradients need d_pre of the rank's own features, which it has",
    ),
    REDUCE_SCATTER: (
        "each rank has a partial sum of every feature, and the activation is not linear: the sums come before bias and "
        "activation; Linear2 reads own features alone, so each rank gets those sums (gathering would not add)",
        "row-parallel Linear1 made every feature, so its gradients need d_pre of every feature; a rank has its own",
    ),
    REDUCE: (
        "each rank has a partial sum of every feature, and the activation is not linear: the sums come before bias and "
        "activation; column-parallel Linear2 reads every feature",
        "d_pre is whole on every rank, as row-parallel Linear1's gradients need it",
    ),
}
_AT_HIDDEN: dict[Region, tuple[str, str]] = {
    KEEP: (
        "a rank's features of the hidden are the input features of its w2 shard",
        "d_hidden of a rank's features needs its own w2 shard and all of dy, which it has",
    ),
    GATHER: (
        "column-parallel Linear2 reads every feature, and a rank has its own (not an all-to-all: every rank needs all)",
        "each rank's output features give one term of d_hidden of every feature; a rank needs the sum for its own",
    ),
    COPY: (
        "the hidden is whole on every rank, as column-parallel Linear2 reads it",
        "each rank's output features give one term of d_hidden, of which every rank needs the sum for every feature",
    ),
}
_AT_Y: dict[Region, tuple[str, str]] = {
    REDUCE: (
        "each rank's input features give one term of y: the terms are summed",
        "dy is whole on every rank, and row-parallel Linear2's gradients read all of it",
    ),
    JOIN: (
        "each rank has its own features of y, and all ranks need all",
        "dy is whole on every rank, which takes the features that its w2 shard made",
    ),
}
_AT_SLICES: dict[str, tuple[str, str]] = {
    "x": (
        "a rank has its own tokens, and column-parallel Linear1 reads all of them",
        "each rank's features of d_pre give one term of dx; a rank needs the sum for its own tokens",
    ),
    "y": (
        "each rank's input features give one term of y; a rank needs the sum for its own tokens",
        "a rank has dy of its own tokens, and Linear2's gradients read all of them, but for db2, which stays a part",
    ),
}


def ring_all_reduce(elements: int, world_size: int) -> tuple[int, int, int]:
    """Count a ring all-reduce: (most elements that any rank sends, elements sent by all, rounds)."""
    if world_size == 1:
        return 0, 0, 0
    chunk, longer = divmod(elements, world_size)
    # Only with a single shorter chunk is every pair of neighbouring chunks longer than 2·chunk.
    left_out = 2 * chunk + (longer == world_size - 1)
    return 2 * elements - left_out, 2 * (world_size - 1) * elements, 2 * (world_size - 1)


def ring_slices(elements: int, world_size: int) -> tuple[int, int, int]:
    """Count a ring all-gather or reduce-scatter of equal slices, `elements` all together; as ring_all_reduce."""
    rounds = world_size - 1
    return rounds * (elements // world_size), rounds * elements, rounds


def collectives(operations: Sequence[Operation], tensors: Mapping[str, Tensor], tp: int) -> Iterator[Collective]:
    """Yield the collectives in the order in which they start."""
    for op in operations:
        if not op.is_collective:
            continue
        # The full tensor is the larger side.
        payload = max((tensors[op.reads[0]], tensors[op.writes[0]]), key=lambda tensor: tensor.elements)
        count = ring_all_reduce if op.kernel == "all_reduce" else ring_slices
        most, total, rounds = count(payload.elements, tp)
        yield Collective(
            pass_=op.pass_,
            kind=op.kernel,
            tensor=op.name,
            elements=payload.elements,
            bytes=payload.bytes,
            sent_per_rank=most,
            sent_total=total,
            sent_total_bytes=total * (payload.bytes // payload.elements),
            rounds=rounds,
            amplification=total / payload.elements,
        )


def overlaps(operations: Sequence[Operation]) -> Iterator[Overlap]:
    """Yield which collectives run behind which kernels; the others are exposed."""
    for op in operations:
        if op.is_collective and op.behind:
            yield Overlap(op.pass_, op.name, op.behind)


def reasons(p: Partitioning, sequence_parallel: bool) -> Iterator[Reason]:
    """Yield why there is a collective, or none, at x, pre_act, hidden and y, in the order of the passes."""
    at = {
        "x": (p.x, _AT_X[p.x]),
        "pre_act": (p.pre_act, _AT_PRE_ACT[p.pre_act]),
        "hidden": (p.hidden, _AT_HIDDEN[p.hidden]),
        "y": (p.y, _AT_Y[p.y]),
    }
    if sequence_parallel:
        at["x"] = (GATHER, _AT_SLICES["x"])
        at["y"] = (REDUCE_SCATTER, _AT_SLICES["y"])
    for name, (region, (why, _)) in at.items():
        yield Reason("forward", name, region.forward, why)
    for name, (region, (_, why)) in reversed(at.items()):
        gradient = {"pre_act": "d_pre", "hidden": "d_hidden"}.get(name, f"d{name}")
        yield Reason("backward", gradient, region.backward, why)
    if sequence_parallel:
        yield Reason("backward", "x", "all_gather", "dw1 needs all tokens of x, of which the slice alone was kept")


def no_communication(given: Sequence[Reason], tp: int) -> Iterator[NoCommunication]:
    """Yield the linears that a reader may expect to communicate, and why they do not."""
    for pass_, step, points in (
        ("forward", "linear1", ("x", "pre_act")),
        ("forward", "linear2", ("hidden", "y")),
        ("backward", "linear2", ("dy", "d_hidden")),
        ("backward", "linear1", ("d_pre", "dx")),
    ):
        here = [reason for reason in given if reason.pass_ == pass_ and reason.at in points]
        if tp == 1:
            yield NoCommunication(pass_, step, "one rank holds every weight")
        elif not any(reason.kind for reason in here):
            yield NoCommunication(pass_, step, "; ".join(reason.why for reason in here))
