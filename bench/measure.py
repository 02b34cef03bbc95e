"""Measure every chosen implementation on one rank: check all against fp64, then time, then weigh the memory.

One row a shape, dtype, mode and implementation. A wrong implementation is refused: not timed, no row.

    max_rel_err             ‖out − ref‖ / ‖ref‖ (Frobenius) of the worst tensor (y, dx, dw1, db1, dw2, db2) on
                            any rank; ref is fp64 on inputs rounded to the dtype
    error_vs_unfused        max_rel_err over that of `unfused`
    ms_p20, ms_p50, ms_p80  time of a step (timing.py)
    comm_ms, compute_ms     median of a step's exposed communication; ms_p50 less that
    comm_ms_least           the same of the rank that waits least: without the wait for slower ranks
    tflops                  one rank's GEMM FLOPs over ms_p50
    roofline_pct            least possible time on this device (environment.py) over ms_p50
    peak_mem_bytes          one eager step's (memory.py), the most of any rank
"""

import statistics
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import environment
import memory
import timing
import workloads
from exchanged_launchers import launched_by
from gate import error_bound, matmul_precision, worst_error
from implementations import IMPLEMENTATIONS, Implementation, chosen
from ranks import Rank
from steps import Step, make_step
from workloads import Shape


@dataclass(frozen=True)
class Settings:
    """What to measure; impls None means all that exist here, rounds None as many as fit.

    one_shard   there are fewer GPUs than P: rank 0's shard alone, without a group
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    impls: tuple[str, ...] | None
    activation: str
    sequence_parallel: bool
    rounds: int | None
    graph: bool
    quick: bool
    one_shard: bool
    command: str


def measure(rank: Rank, settings: Settings) -> dict[str, list]:
    """Return {"rows": [...], "refused": [why something has no row, ...]}; rank 0's is the one to report.

    Without a group, a problem that raises is reported in `refused` and leaves the other problems' rows alone.
    """
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    compared = {dtype: chosen(settings.impls, rank.device.type, dtype) for dtype in settings.dtypes}
    surroundings = environment.describe(rank) | {"command": settings.command}
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            try:
                with matmul_precision(dtype):
                    measured, wrong = _measure_problem(rank, settings, shape, dtype, compared[dtype])
            except Exception as error:
                if rank.group is not None:  # the others may be waiting for this rank: ranks.py stops them
                    raise
                traceback.print_exc()
                measured, wrong = [], [f"{shape.name}, {dtype} failed: {type(error).__name__}: {error}"]
            rows += [row | surroundings for row in measured]
            refused += wrong
    return {"rows": rows, "refused": refused}


def _measure_problem(
    rank: Rank, settings: Settings, shape: Shape, dtype: str, compared: Sequence[Implementation]
) -> tuple[list[dict[str, Any]], list[str]]:
    rank.say(f"{shape.name} {dtype}: computing the fp64 reference")
    full = workloads.draw(shape, dtype, settings.activation, rank.device)
    own = workloads.shard(full, rank.rank, shape.tp if settings.one_shard else rank.world_size, settings.activation)
    most = "fwd_bwd" if "fwd_bwd" in settings.modes else "fwd"
    if settings.one_shard:
        reference = workloads.expected(own, most, settings.activation)
    else:
        slices = settings.sequence_parallel
        reference = workloads.expected(full, most, settings.activation, rank.rank, rank.world_size, slices)
        own = workloads.own_tokens(own, rank.rank, rank.world_size) if slices else own
    del full
    bound = error_bound(dtype, settings.activation)
    errors: dict[tuple[str, str], float] = {}
    steps: dict[str, dict[str, Step]] = {mode: {} for mode in settings.modes}
    refused = []
    for implementation in compared:
        forward = implementation.build(settings.activation, settings.sequence_parallel)
        for mode in settings.modes:
            make = partial(make_step, forward, own, rank.group, mode, settings.graph)
            step = launched_by(rank.device.type, implementation.launchers, make)
            name = implementation.name
            error, tensor = worst_error(step, reference, rank)
            if error <= bound:
                errors[mode, name], steps[mode][name] = error, step
            else:
                refused.append(
                    f"{name} ({shape.name}, {dtype}, {mode}) is wrong: {tensor} is off by {error:.2g} "
                    f"(Frobenius, against fp64), allowed {bound:.2g}"
                )
                rank.say(f"refused: {refused[-1]}")
    del reference
    rows = []
    for mode in settings.modes:
        if steps[mode]:
            own_errors = {name: errors[mode, name] for name in steps[mode]}
            rows += _time_mode(rank, settings, shape, dtype, mode, steps[mode], own_errors)
    return rows, refused


def _time_mode(
    rank: Rank,
    settings: Settings,
    shape: Shape,
    dtype: str,
    mode: str,
    steps: dict[str, Step],
    errors: dict[str, float],
) -> list[dict[str, Any]]:
    rank.say(f"{shape.name} {dtype} {mode}: timing {', '.join(steps)}")
    times, rounds = timing.time_rounds(steps, rank, graph=settings.graph, quick=settings.quick, rounds=settings.rounds)
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        t = times[name]
        spread = timing.spread(t.ms, "ms")
        p50 = spread["ms_p50"]
        # Unknown where a part of the communication is missing, or hidden inside a graph.
        split = not settings.one_shard and not (settings.graph and rank.group is not None)
        comm_ms = statistics.median(t.comm_ms) if split else None
        plain = partial(Step, step.forward, step.problem, step.group, step.mode)
        eager = launched_by(rank.device.type, IMPLEMENTATIONS[name].launchers, plain)
        passes = shape.pass_floors(mode, dtype, settings.activation)
        floor = environment.floor_ms(environment.device_name(rank.device), dtype, passes)
        rows.append(
            {
                "impl": name,
                "mode": mode,
                "shape": shape.name,
                "batch": shape.batch,
                "seq": shape.seq,
                "hidden": shape.hidden,
                "ffn": shape.ffn,
                "tp": shape.tp,
                "dtype": dtype,
                "activation": settings.activation,
                "sequence_parallel": settings.sequence_parallel,
                "graph": settings.graph,
                "iters": rounds,
                **spread,
                "comm_ms": comm_ms,
                "comm_ms_least": statistics.median(t.comm_ms_least) if split else None,
                "compute_ms": p50 if settings.one_shard else None if comm_ms is None else p50 - comm_ms,
                "communication_included": not settings.one_shard,
                "tflops": shape.flops(mode, settings.activation) / p50 / 1e9,
                "roofline_pct": None if floor is None else 100 * floor / p50,
                "speedup_vs_unfused": None,
                "speedup_vs_unfused_onednn": None,
                "speedup_vs_megatron": None,
                "max_rel_err": errors[name],
                "error_vs_unfused": None,
                "peak_mem_bytes": memory.peak_bytes(eager, rank),
            }
        )
    _compare(rows)
    return rows


def _compare(rows: list[dict[str, Any]]) -> None:
    """Fill in what relates each row to the baselines and to Megatron's MLP, where those are present."""
    by_name = {row["impl"]: row for row in rows}
    for baseline, field in (
        ("unfused", "speedup_vs_unfused"),
        ("unfused-onednn", "speedup_vs_unfused_onednn"),
        ("megatron", "speedup_vs_megatron"),
    ):
        if baseline in by_name:
            for row in rows:
                row[field] = by_name[baseline]["ms_p50"] / row["ms_p50"]
    eager_error = by_name["unfused"]["max_rel_err"] if "unfused" in by_name else 0
    if eager_error > 0:
        for row in rows:
            row["error_vs_unfused"] = row["max_rel_err"] / eager_error
