"""List what one rank does in forward and backward, in order: GEMMs, passes over memory, collectives; and what is alive.

The order is that of passes.py (column_row) and partitioned.py. Tensors by name: those of plan.py, and

    own_x, own_y, own_dy, own_dx    this rank's features
    partial_*                       this rank's terms of a sum
    full_*                          all features, or all tokens, of what a rank has a part of
    *_by_rank                       features by rank, [P, M, ...]: collectives join and cut dim 0
    db1_partial                     sums of d_pre over PARTIAL_ROWS tokens each, in fp32

A tensor lives from the operation that writes it to the last that reads it; parameters, x, dy, results, and what is kept
for backward, to the end of the pass. What a collective reads lives until its result is used; an all-reduce is in place.
What is computed at once is allocated at once. Not counted: what a sum over tokens keeps between its passes, and what a
GEMM library allocates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from tpffn_triton.partitionings import GATHER, KEEP, REDUCE_SCATTER, SPLIT, Partitioning

PARAMETERS = ("w1", "b1", "w2", "b2")
RESULTS = ("y", "dx", "dw1", "db1", "dw2", "db2")


@dataclass(frozen=True)
class Operation:
    """A GEMM, which has a formula; a pass over memory; or a collective, whose kernel is its kind and whose name that of
    the tensor: its result is used after the operations named in `behind`. Those in a row with the same `at_once` are
    one operator."""

    pass_: str
    name: str
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    formula: str = ""
    behind: tuple[str, ...] = ()
    at_once: str = ""

    @property
    def is_collective(self) -> bool:
        return self.kernel in ("all_reduce", "all_gather", "reduce_scatter")


class Schedule:
    """The operations of both passes; tensors in `absent` are left out, and what would write nothing else."""

    def __init__(self, absent: Collection[str]) -> None:
        self.operations: list[Operation] = []
        self.absent = absent
        self.pass_ = "forward"

    def add(
        self, name: str, kernel: str, io: str, formula: str = "", behind: Sequence[str] = (), at_once: str = ""
    ) -> None:
        """Append an operation; io is "what it reads -> what it writes"."""
        reads, writes = (tuple(t for t in side.split() if t not in self.absent) for side in io.split("->"))
        hiding = tuple(other for other in behind if other not in self.absent)
        if writes:
            self.operations.append(Operation(self.pass_, name, kernel, reads, writes, formula, hiding, at_once))

    def gather_features(self, of: str, full: str, behind: Sequence[str] = ()) -> None:
        """Begin to gather the features of a tensor; `joined` ends it."""
        self.add(of.removeprefix("own_"), "all_gather", f"{of} -> {full}_by_rank", behind=behind)

    def joined(self, full: str) -> None:
        self.add(f"join_{full.removeprefix('full_')}", "copy", f"{full}_by_rank -> {full}")


def schedule(
    p: Partitioning, tp: int, *, save: str, sequence_parallel: bool, gated: bool, absent: Collection[str]
) -> list[Operation]:
    """Return the operations of one layer; save and sequence_parallel are column_row's."""
    s = Schedule(absent)
    _forward(s, p, tp, "pre_act" if save == "pre_act" else "", sequence_parallel)
    s.pass_ = "backward"
    _backward(s, p, tp, save == "nothing", sequence_parallel, gated)
    return s.operations


def _forward(s: Schedule, p: Partitioning, tp: int, kept: str, sequence_parallel: bool) -> None:
    x, partial_y = "x", "partial_y" if tp > 1 else "y"
    at_once = "ffn_forward" if (p.linear1, p.linear2) == ("column", "row") else ""
    if sequence_parallel:
        s.add("x", "all_gather", "x -> full_x")
        x = "full_x"
    if p.linear1 == "column":
        s.add("linear1", "linear_act", f"{x} w1 b1 -> hidden {kept}", f"{x} @ w1.T", at_once=at_once)
    else:
        s.add("split_x", "copy", "x -> own_x")
        s.add("linear1", "linear", "own_x w1 -> partial_pre_act", "own_x @ w1.T")
        if p.pre_act == REDUCE_SCATTER:
            s.add("order_pre_act", "copy", "partial_pre_act -> pre_act_by_rank")
            s.add("pre_act", "reduce_scatter", "pre_act_by_rank -> pre_act")
        else:
            s.add("pre_act", "all_reduce", "partial_pre_act -> pre_act")
        if "b1" not in s.absent:
            s.add("add_b1", "add_bias", "pre_act b1 -> pre_act")
        s.add("act", "activation", "pre_act -> hidden")
    hidden = "hidden"
    if p.hidden == GATHER:
        s.gather_features("hidden", "full_hidden")
        s.joined("full_hidden")
        hidden = "full_hidden"
    if p.linear2 == "row":
        s.add("linear2", "linear", f"{hidden} w2 b2 -> {partial_y}", f"{hidden} @ w2.T", at_once=at_once)
        if tp > 1:
            s.add("y", "reduce_scatter" if sequence_parallel else "all_reduce", "partial_y -> y")
    else:
        s.add("linear2", "linear", f"{hidden} w2 b2 -> own_y", f"{hidden} @ w2.T")
        s.gather_features("own_y", "y")
        s.joined("y")


def _backward(s: Schedule, p: Partitioning, tp: int, recompute: bool, sequence_parallel: bool, gated: bool) -> None:
    x, dy = "x" if p.linear1 == "column" else "own_x", "dy" if p.linear2 == "row" else "own_dy"
    d_pre, hidden = "d_pre", "full_hidden" if p.hidden == GATHER else "hidden"
    if sequence_parallel:
        # To recompute it needs x first, and dy arrives meanwhile.
        x, dy = "full_x", "full_dy"
        if recompute:
            s.add("x", "all_gather", "x -> full_x")
            s.add("dy", "all_gather", "dy -> full_dy", behind=("linear1_recompute",))
        else:
            s.add("dy", "all_gather", "dy -> full_dy")
            s.add("x", "all_gather", "x -> full_x", behind=("d_hidden", "dx"))
    if recompute:
        s.add("linear1_recompute", "linear_act", f"{x} w1 b1 -> pre_act hidden", f"{x} @ w1.T")
    if p.linear2 == "column":
        s.add("split_dy", "copy", "dy -> own_dy")

    early = p.hidden != KEEP or p.pre_act == REDUCE_SCATTER  # a collective comes before dx
    # Where x is still to arrive, what does without it is not computed with dw1.
    at_once = "" if early or (sequence_parallel and not recompute) else "weight_grads"

    def gradients_of_linear2() -> None:
        s.add("dw2", "wgrad", f"{dy} {hidden} -> dw2", f"{dy}.T @ {hidden}", at_once=at_once)
        s.add("db2", "column_sum", f"{'dy' if sequence_parallel else dy} -> db2", at_once=at_once)

    if p.hidden == KEEP:
        made = "d_pre db1_partial" if recompute else "d_pre hidden db1_partial"
        s.add("d_hidden", "linear_dact", f"{dy} w2 pre_act -> {made}", f"{dy} @ w2")
        if early:
            s.gather_features("d_pre", "full_d_pre", ("db1", "dw2", "db2"))
            s.add("db1", "column_sum", "db1_partial -> db1")
            gradients_of_linear2()
            s.joined("full_d_pre")
            d_pre = "full_d_pre"
    else:
        s.add("d_hidden", "dgrad", f"{dy} w2 -> partial_d_hidden", f"{dy} @ w2")
        if p.hidden == GATHER:
            s.add("order_d_hidden", "copy", "partial_d_hidden -> d_hidden_by_rank")
            s.add("d_hidden", "reduce_scatter", "d_hidden_by_rank -> d_hidden", behind=("dw2", "db2"))
        else:
            s.add("d_hidden", "all_reduce", "partial_d_hidden -> d_hidden", behind=("act", "dw2", "db2"))
            s.add("act", "activation", "pre_act -> hidden")
        gradients_of_linear2()
        s.add("dact", "dact", f"d_hidden pre_act -> d_pre {'gate_act' if gated else ''}")
        s.add("db1", "column_sum", "d_pre -> db1")
    behind = ("dw1",) if early else ("db1", "dw2", "dw1", "db2")
    if p.x == SPLIT:
        s.add("dx", "dgrad", f"{d_pre} w1 -> own_dx", f"{d_pre} @ w1")
        s.gather_features("own_dx", "dx", behind)
    else:
        s.add("dx", "dgrad", f"{d_pre} w1 -> {'partial_dx' if tp > 1 else 'dx'}", f"{d_pre} @ w1")
        if tp > 1:
            s.add("dx", "reduce_scatter" if sequence_parallel else "all_reduce", "partial_dx -> dx", behind=behind)
    if not early:
        s.add("db1", "column_sum", "db1_partial -> db1", at_once=at_once)
        gradients_of_linear2()
    s.add("dw1", "wgrad", f"{d_pre} {x} -> dw1", f"{d_pre}.T @ {x}", at_once=at_once)
    if p.x == SPLIT:
        s.joined("dx")


def peak_bytes(operations: Sequence[Operation], sizes: Mapping[str, int], saved: Collection[str], pass_: str) -> int:
    """Return the most bytes that are alive at once in a pass; sizes: bytes by tensor."""
    ours = (op for op in operations if op.pass_ == pass_)
    steps = [[*together] for _, together in groupby(ours, key=lambda op: op.at_once or op)]
    given = "x" if pass_ == "forward" else "dy"
    staying = {*PARAMETERS, "x", given, *saved, *RESULTS}
    alive = {name for name in (*PARAMETERS, "x", given, *(saved if pass_ == "backward" else ())) if name in sizes}
    computed = {op.name: number for number, step in enumerate(steps) for op in step if not op.is_collective}
    last_read: dict[str, int] = {}
    for number, step in enumerate(steps):
        for op in step:
            hiding = [computed[name] for name in op.behind]
            last_read |= {name: max(number, *hiding, last_read.get(name, 0)) for name in op.reads}
    most = 0
    for number, step in enumerate(steps):
        for op in step:
            if op.kernel == "all_reduce":
                alive -= {*op.reads}
            alive |= {*op.writes}
        most = max(most, sum(sizes[name] for name in alive))
        alive = {name for name in alive if name in staying or last_read.get(name, -1) > number}
    return most
