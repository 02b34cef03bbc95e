"""Count, on one rank, the bytes that collectives and layers send over gloo, beside those that the plan says.

    planned     ring accounting of the plan: tensor bytes that all ranks send
    algorithm   tensor bytes of what gloo runs in place of that ring (below)
    tcp         payload of every rank's own TCP sockets, without retransmissions: exact, and the same in every run
    wire        IP packets on the loopback interface: payload, headers, acknowledgements, retransmissions; the last
                three differ from run to run

What gloo runs, from its source and torch's, and what the counts above it come to:

    all_reduce      a ring, 2(P-1)·N elements as planned: gloo/allreduce.cc, ring()
    all_gather      a ring, (P-1)·N as planned: gloo/allgather.cc
    reduce_scatter  an all-reduce of a copy, of which each rank keeps its part: 2(P-1)·N, twice what is planned:
                    torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, reduce_scatter_tensor_coalesced()
    any message     three headers of 48 bytes: sender ready, receiver ready, the message's own (gloo/transport/tcp/
                    pair.cc). A ring's round is two messages or more, none above 1 MiB in an all-reduce

Readings are taken between calls, while every rank waits: ranks meet over the group's store, which is a file (ranks.run)
and so sends nothing. Each case is called once before: connections open then, and layers compare their arguments.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import checkout  # noqa: F401
import environment
import network
import ring
import torch
import workloads
from comm_measure import collective
from ranks import Rank
from torch import Tensor
from workloads import DTYPES, Problem, Shape

from tpffn_triton import ffn
from tpffn_triton.group_store import GroupStore, store_of
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_comparison import STRATEGIES, Strategy
from tpffn_triton.plan_records import Collective, FFNPlan

TIMES_PLANNED = {"reduce_scatter": 2}  # what gloo's algorithm sends over what the plan's ring does, where it differs
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Settings:
    """What to count: a layer's shape with P, how often to repeat each case."""

    shape: Shape
    dtype: str
    activation: str
    repeats: int
    command: str


class Case(NamedTuple):
    """One call to count, and the collectives that the plan has for it; pass_ is a layer's."""

    kind: str
    name: str
    pass_: str | None
    planned: tuple[Collective, ...]
    call: Callable[[], object]


def plans(settings: Settings) -> dict[str, FFNPlan]:
    """Return each layer's plan. Raises: ValueError: sizes that a layer refuses."""
    shape = settings.shape
    sizes = (shape.batch, shape.seq, shape.hidden, shape.ffn, shape.tp)
    return {
        name: plan_ffn(*sizes, dtype=settings.dtype, activation=settings.activation, **strategy.options)
        for name, strategy in STRATEGIES.items()
    }


def measure(rank: Rank, settings: Settings) -> list[dict[str, Any]]:
    """Return one row a case, rank 0's the ones to report; bytes are of one call, all ranks together."""
    assert rank.group is not None
    store = store_of(rank.group)
    assert store is not None
    shape = settings.shape
    about = {
        "shape": shape.name,
        **{name: getattr(shape, name) for name in ("batch", "seq", "hidden", "ffn", "tp")},
        "dtype": settings.dtype,
        "activation": settings.activation,
        "repeats": settings.repeats,
    }
    about |= environment.describe(rank) | {"command": settings.command}
    rows = []
    for case in _cases(rank, settings):
        rank.say(f"P={rank.world_size}: {case.name} {case.pass_ or ''}")
        of_case = {"kind": case.kind, "case": case.name, "pass": case.pass_}
        rows.append(of_case | _count(store, case, settings.repeats) | about)
    return rows


def _cases(rank: Rank, settings: Settings) -> Iterator[Case]:
    """Yield nothing, each kind and size of collective in the plans, the textbook ring of y, and each layer's passes."""
    yield Case("nothing", "nothing", None, (), lambda: None)
    group, planned = rank.group, plans(settings)
    assert group is not None
    different = {(c.kind, c.elements): c for plan in planned.values() for c in plan.collectives}
    for (kind, elements), record in sorted(different.items()):
        t = torch.zeros(elements, dtype=DTYPES[settings.dtype])
        yield Case("collective", kind, None, (record,), collective(kind, t, rank))
    (of_y,) = (c for c in planned["column_row"].collectives if c.pass_ == "forward")
    y = torch.zeros(of_y.elements, dtype=DTYPES[settings.dtype])
    yield Case("ring", "textbook ring", None, (of_y,), lambda: ring.all_reduce(y, group))
    full = workloads.draw(settings.shape, settings.dtype, settings.activation, rank.device)
    for name, plan in planned.items():
        passes = _passes(rank, full, settings.activation, STRATEGIES[name])
        for pass_, call in zip(PASSES, passes, strict=True):
            yield Case("layer", name, pass_, tuple(c for c in plan.collectives if c.pass_ == pass_), call)


def _passes(rank: Rank, full: Problem, activation: str, strategy: Strategy) -> tuple[Callable, Callable]:
    """Return a layer's forward, and its backward of the last forward that has had none."""
    own = workloads.shard(full, rank.rank, rank.world_size, activation, strategy.partitioning)
    layer = functools.partial(partitioned_ffn, partitioning=strategy.partitioning)
    if strategy.sequence_parallel:
        layer = functools.partial(ffn, sequence_parallel=True)
        own = workloads.own_tokens(own, rank.rank, rank.world_size)
    given = own.x, own.w1, own.w2, own.b1, own.b2
    outputs: list[Tensor] = []
    return (
        lambda: outputs.append(layer(*given, activation=activation, tp_group=rank.group)),
        lambda: outputs.pop().backward(own.dy),
    )


def _count(store: GroupStore, case: Case, repeats: int) -> dict[str, Any]:
    """Return a row's figures: what one call sends."""
    case.call()
    wire, own = _reading(store)
    results = [case.call() for _ in range(repeats)]
    wire_then, own_then = _reading(store)
    sent = network.sent_between(own, own_then)
    figures = {"payload": sent.bytes - sent.retransmitted, "retransmitted": sent.retransmitted}
    if isinstance(results[0], ring.Counts):
        figures |= {"rounds": results[0].rounds, "elements": results[0].elements}
    every = [json.loads(facts["sent"]) for facts in store.exchange({"sent": json.dumps(figures)})]
    per_rank = [rank["payload"] / repeats for rank in every]
    planned_bytes = sum(c.sent_total_bytes for c in case.planned)
    return {
        "planned": [{"kind": c.kind, "tensor": c.tensor, "elements": c.elements} for c in case.planned],
        "planned_rounds": sum(c.rounds for c in case.planned),
        "planned_elements": sum(c.sent_total for c in case.planned),
        "planned_bytes": planned_bytes,
        "planned_bytes_per_rank": sum(c.sent_per_rank * (c.bytes // c.elements) for c in case.planned),
        "algorithm_bytes": sum(c.sent_total_bytes * TIMES_PLANNED.get(c.kind, 1) for c in case.planned),
        "tcp_bytes": sum(per_rank),
        "tcp_bytes_per_rank": per_rank,
        "ratio": sum(per_rank) / planned_bytes if planned_bytes else None,
        "wire_bytes": (wire_then.bytes - wire.bytes) / repeats,
        "packets": (wire_then.packets - wire.packets) / repeats,
        "retransmitted_bytes": sum(rank["retransmitted"] for rank in every) / repeats,
        "ring_rounds": every[0].get("rounds"),
        "ring_elements_per_rank": [rank["elements"] for rank in every] if "elements" in every[0] else None,
    }


def _reading(store: GroupStore) -> tuple[network.Interface, dict[str, network.Sent]]:
    """Return the counters between two points at which all ranks meet."""
    store.exchange({"reading": "counters"})
    found = network.quiet_loopback(), network.tcp_sent()
    store.exchange({"reading": "done"})
    return found
