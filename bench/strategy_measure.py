"""Measure on one rank every way to split the two layers: check each against fp64, then time its passes in turns.

    unsplit                       on one rank nothing is cut: the base of scaling
    column_row, row_row, column_column, row_column
                                  tpffn_triton/partitioned.py: the same kernels and collectives for all four
    column_row_sequence_parallel  ffn() on slices of the tokens

One row a shape, strategy and pass. A wrong strategy is refused: not timed, no row.

    ms_*, compute_ms, exposed_ms   timing.py; a backward follows its own forward, which is timed by itself
    times_column_row               a round's time over column_row's of the same pass, the median over rounds
    max_rel_err                    ‖out − ref‖ / ‖ref‖ (Frobenius) against fp64, the worst of y and the gradients

Each strategy has a group of its own: ranks compare the first calls of a group, and nothing of calls that repeat.
"""

from dataclasses import dataclass, replace
from typing import Any

import checkout  # noqa: F401
import comm_measure
import environment
import numpy as np
import timing
import torch
import torch.distributed as dist
import workloads
from gate import error_bound, worst_error
from implementations import IMPLEMENTATIONS, Forward, Group
from ranks import Rank
from steps import Step, passes_of
from torch import Tensor
from workloads import Shape

from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.plan_comparison import STRATEGIES, Strategy

UNSPLIT = "unsplit"
TIMED = {UNSPLIT: Strategy("unsplit")} | STRATEGIES


def timed_on(world_size: int) -> dict[str, Strategy]:
    """Return what is timed on so many ranks."""
    return {UNSPLIT: TIMED[UNSPLIT]} if world_size == 1 else STRATEGIES


@dataclass(frozen=True)
class Settings:
    """What to measure; rounds None: as many as fit. threads: of a CPU rank. machine: what to measure of it, if at
    all."""

    shapes: tuple[Shape, ...]
    dtype: str
    activation: str
    rounds: int | None
    quick: bool
    threads: int
    machine: comm_measure.Settings | None
    command: str


def measure(rank: Rank, settings: Settings) -> dict[str, Any]:
    """Return {"rows": [...], "refused": [why something has no row, ...], "machine": comm_measure's result or None}."""
    if rank.device.type == "cpu":
        rank = replace(rank, threads=settings.threads)
        torch.set_num_threads(settings.threads)
    machine = None
    if settings.machine is not None:
        with torch.no_grad():  # comm_measure turns gradients off
            machine = comm_measure.measure(rank, settings.machine)
    strategies = timed_on(rank.world_size)
    groups = {name: None if rank.group is None else dist.new_group() for name in strategies}
    surroundings = environment.describe(rank) | {"command": settings.command}
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for shape in settings.shapes:
        steps, errors, wrong = _checked(rank, settings, shape, strategies, groups)
        refused += wrong
        rows += [row | surroundings for row in _timed(rank, settings, shape, steps, errors)]
    return {"rows": rows, "refused": refused, "machine": machine}


def _checked(
    rank: Rank, settings: Settings, shape: Shape, strategies: dict[str, Strategy], groups: dict[str, Group]
) -> tuple[dict[tuple[str, str], Step], dict[str, float], list[str]]:
    """Return the passes of every strategy that is right by (strategy, pass), the strategies' errors, and what is wrong
    with the others."""
    rank.say(f"{shape.name}, P={rank.world_size}: comparing with fp64")
    full = workloads.draw(shape, settings.dtype, settings.activation, rank.device)
    reference = workloads.reference(full, "fwd_bwd", settings.activation)
    bound = error_bound(settings.dtype, settings.activation)
    steps: dict[tuple[str, str], Step] = {}
    errors: dict[str, float] = {}
    refused = []
    for name, s in strategies.items():
        forward, group = _forward(s, settings.activation), groups[name]
        own = workloads.shard(full, rank.rank, rank.world_size, settings.activation, s.partitioning)
        if s.sequence_parallel:
            own = workloads.own_tokens(own, rank.rank, rank.world_size)
        place = (rank.rank, rank.world_size, s.sequence_parallel, s.partitioning)
        expected = workloads.own_part(reference, full, settings.activation, *place)
        step = Step(forward, own, group, "fwd_bwd")
        error, tensor = worst_error(step, expected, rank)
        if error <= bound:
            # Ranks compare the second call of a group as well, because a backward is before it.
            step()
            errors[name] = error
            steps |= {(name, pass_): step for pass_, step in passes_of(forward, own, group).items()}
        else:
            refused.append(
                f"{name} ({shape.name}, P={rank.world_size}, {settings.dtype}) is wrong: {tensor} is off by "
                f"{error:.2g} (Frobenius, against fp64), allowed {bound:.2g}"
            )
            rank.say(f"refused: {refused[-1]}")
    return steps, errors, refused


def _forward(strategy: Strategy, activation: str) -> Forward:
    if strategy.sequence_parallel:
        return IMPLEMENTATIONS["fused"].build(activation, True)

    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        cut: dict[str, Any] = {"partitioning": strategy.partitioning, "tp_group": group}
        return partitioned_ffn(x, w1, w2, b1, b2, activation=activation, **cut)

    return forward


def _timed(
    rank: Rank, settings: Settings, shape: Shape, steps: dict[tuple[str, str], Step], errors: dict[str, float]
) -> list[dict[str, Any]]:
    if not steps:
        return []
    rank.say(f"{shape.name}, P={rank.world_size}: timing {', '.join(errors)}")
    times, rounds = timing.time_rounds(
        steps, rank, graph=False, quick=settings.quick, rounds=settings.rounds, together=2
    )
    rows = []
    for (name, pass_), t in times.items():
        base = times.get(("column_row", pass_))
        ratio = None if base is None else float(np.median(np.array(t.ms) / np.array(base.ms)))
        rows.append(
            {
                "strategy": name,
                "pass": pass_,
                "shape": shape.name,
                **{size: getattr(shape, size) for size in ("batch", "seq", "hidden", "ffn")},
                "tp": rank.world_size,
                "dtype": settings.dtype,
                "activation": settings.activation,
                "rounds": rounds,
                **t.figures(),
                "times_column_row": ratio,
                "max_rel_err": errors[name],
            }
        )
    return rows
