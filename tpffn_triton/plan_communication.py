"""Work out what the ranks of one tensor-parallel FFN layer send, and behind which kernels. Terms: plan.py.

    replicated           forward  all_reduce y                               backward  all_reduce dx
    sequence-parallel    forward  all_gather x, reduce_scatter y             backward  all_gather dy, all_gather x,
                                                                                       reduce_scatter dx

A ring all-reduce of N elements cuts them into P chunks, the first N mod P one element longer. Reduce-scatter
and all-gather take P-1 rounds each. Rank r sends every chunk but r+1 in the first and every chunk but r+2 in
the second (mod P): 2N - chunk[r+1] - chunk[r+2] elements; all ranks together send 2(P-1)·N. With sequence parallelism
the chunks are the slices of dim 0, all equal: (P-1)/P·N elements a rank.

Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053) for the partitioning, Korthikanti et al., "Reducing activation
recomputation in large transformer models" (arXiv:2205.05198) for sequence parallelism; Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009) for the ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tpffn_triton.plan_report import Collective, NoCommunication, Overlap, Tensor


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


def collectives(tensors: Mapping[str, Tensor], tp: int, sequence_parallel: bool) -> tuple[Collective, ...]:
    """Return the collectives in the order in which they start; none for one rank."""
    if tp == 1:
        return ()
    if not sequence_parallel:
        return tuple(
            _collective(pass_, "all_reduce", tensors[name], name, ring_all_reduce(tensors[name].elements, tp))
            for pass_, name in (("forward", "y"), ("backward", "dx"))
        )
    ways = (
        ("forward", "all_gather", "full_x", "x"),
        ("forward", "reduce_scatter", "partial_y", "y"),
        ("backward", "all_gather", "full_dy", "dy"),
        ("backward", "all_gather", "full_x", "x"),
        ("backward", "reduce_scatter", "partial_dx", "dx"),
    )
    return tuple(
        _collective(pass_, kind, tensors[full], name, ring_slices(tensors[full].elements, tp))
        for pass_, kind, full, name in ways
    )


def _collective(pass_: str, kind: str, payload: Tensor, name: str, counts: tuple[int, int, int]) -> Collective:
    most, total, rounds = counts
    return Collective(
        pass_=pass_,
        kind=kind,
        tensor=name,
        elements=payload.elements,
        bytes=payload.bytes,
        sent_per_rank=most,
        sent_total=total,
        sent_total_bytes=total * (payload.bytes // payload.elements),
        rounds=rounds,
        amplification=total / payload.elements,
    )


def overlaps(tp: int, sequence_parallel: bool, save: str, bias: bool) -> tuple[Overlap, ...]:
    """Return which collectives run behind which kernels, by the order of passes.py; the others are exposed."""
    if tp == 1:
        return ()
    gradients = ("dw2", "dw1", "db2") if bias else ("dw2", "dw1")
    behind = [Overlap("backward", "dx", gradients)]
    if sequence_parallel and save == "pre_act":
        behind.insert(0, Overlap("backward", "x", ("d_hidden", "dx")))
    elif sequence_parallel:
        # Linear1 is computed again, from x: dy has that GEMM's time to arrive.
        behind.insert(0, Overlap("backward", "dy", ("linear1_recompute",)))
    return tuple(behind)


def no_communication(tp: int, gated: bool, sequence_parallel: bool) -> Iterator[NoCommunication]:
    """Yield the steps that a reader may expect to communicate, and why they do not."""
    if tp == 1:
        for pass_ in ("forward", "backward"):
            for step in ("linear1", "linear2"):
                yield NoCommunication(pass_, step, "one rank holds every weight")
        return
    if not sequence_parallel:
        made = "gate and up features make" if gated else "output features are"
        why = f"x is replicated, and a rank's {made} the input features of its w2 shard"
        yield NoCommunication("forward", "linear1", why)
        why = "dy is replicated; a rank's d_hidden needs only its w2 shard, its dw2 only its hidden"
        yield NoCommunication("backward", "linear2", why)
    else:
        yield NoCommunication("forward", "activation", "every rank has all tokens of its own features")
        why = "each rank's is its own tokens' part, which reduce_replicated_grads sums"
        yield NoCommunication("backward", "db2", why)
