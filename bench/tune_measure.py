"""Measure the candidates of one case on one GPU, against each other and torch's own GEMM.

A candidate is first compared with fp64; a wrong one is not timed. Then all run interleaved in CUDA graphs, L2
overwritten before each (timing.py), in heats: few rounds of all, more of the best, most of the last. The tables' choice
and torch's GEMM stay to the end, so that the last rounds compare with them.

    contender      "table" (the tables' choice), "candidate", or "cublas" (torch's GEMM)
    config         its fields; None of "cublas"
    verdict        "ok", or why it was not timed
    us_p20, us_p50, us_p80   of the last rounds it took part in, `rounds` of them; None: not timed
    ratio_p80      of those in the last rounds: its time over the tables' choice's, by round; below 1, faster by more
                   than noise
    max_rel_err    of the worst row of the worst tensor (gate.py), as a candidate may lose one; None: not finite
    chosen         whether this is the case's row (tune_rows.py)
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timing
from gate import Checked, checked, error_bound, worst_row_error
from ranks import Rank
from steps import Step, captured
from tables import Row
from tune_candidates import ARITHMETICS, name_of
from tune_cases import Case
from tune_filter import OK
from tune_rows import CANDIDATE, CUBLAS, TABLE, TORCH, Contender, choose, ratio_p80
from tune_workloads import Outputs, Workload, workload

from tpffn_triton.kernels._configs import Config

# A heat's rounds, and how many candidates go on; then the least and the most of the last rounds.
_CUDA = (((5, 8), (15, 3)), (20, 100))
_INTERPRETED = (((1, 2),), (2, 2))


class Measured(NamedTuple):
    """A case's measurements, and how many candidates there was no time for."""

    rows: list[Row]
    unreached: int


class Launched(Step):
    """Something that returns results by name, as a step; with graph, replayed as a CUDA graph that owns its results."""

    def __init__(self, compute: Callable[[], Outputs], graph: bool) -> None:
        self.mode, self.owned = "fwd_bwd", False
        self.results: Outputs = {}

        def run() -> None:
            self.results = compute()

        self.run: Callable[[], None] = run
        if graph:
            self.run, self.owned = captured(run, self.reset).replay, True
            for t in self.results.values():
                t.fill_(float("nan"))

    def reset(self) -> None:
        """Drop the last results."""
        if not self.owned:
            self.results = {}

    def __call__(self) -> None:
        """Compute."""
        self.run()

    def outputs(self) -> Outputs:
        """The last results, by name."""
        return self.results


def measure(rank: Rank, case: Case, configs: Sequence[Config], seconds: float) -> Measured:
    """Return a case's measurements; configs: the tables' choice first. About so many seconds are spent, of which at
    most half on making candidates ready."""
    begin = time.perf_counter()
    own, work = configs[0], workload(case, rank.device)
    truth = work.truth()
    steps: dict[Contender, Step] = {}
    rows: dict[Contender, Row] = {}
    unreached = 0
    bound = error_bound(ARITHMETICS[case.arithmetic], "gelu")
    for contender, compute in _contenders(work, configs):
        if contender not in (own, CUBLAS) and time.perf_counter() - begin > seconds / 2:
            unreached += 1
            continue
        kind = TORCH if contender is CUBLAS else TABLE if contender == own else CANDIDATE
        name = kind if contender is None else f"{kind} {name_of(contender)}"
        make = partial(Launched, compute, rank.device.type == "cuda")
        result = checked(name, make, truth, bound, rank, worst_row_error)
        if result.step is not None:
            steps[contender] = result.step
        rows[contender] = _row(case, contender, kind, result)
    del truth
    if own in steps:
        earlier, last = _heats(rank, steps, own, begin + seconds)
        for contender, ms in (earlier | last).items():
            rows[contender] |= _figures(ms)
        for contender, ms in last.items():
            rows[contender]["ratio_p80"] = ratio_p80(ms, last[own])
        rows[choose(last, own)]["chosen"] = True
    return Measured([*rows.values()], unreached)


def _contenders(work: Workload, configs: Sequence[Config]) -> Iterator[tuple[Contender, Callable[[], Outputs]]]:
    yield configs[0], partial(work.launch, configs[0])
    if work.torch is not None:
        yield CUBLAS, work.torch
    for config in configs[1:]:
        yield config, partial(work.launch, config)


def _heats(
    rank: Rank, steps: Mapping[Contender, Step], own: Config, deadline: float
) -> tuple[dict[Contender, list[float]], dict[Contender, list[float]]]:
    """Return contenders' ms in the heats, the last that each took part in, and in the last rounds."""
    cuda = rank.device.type == "cuda"
    clock: timing.Clock = timing.CudaClock(graph=True) if cuda else timing.HostClock()
    heats, bounds = _CUDA if cuda else _INTERPRETED
    earlier: dict[Contender, list[float]] = {}
    left = dict(steps)

    def run(rounds: int) -> dict[Contender, list[float]]:
        return {contender: t.ms for contender, t in timing.run_rounds(left, clock, rank, rounds).items()}

    def round_seconds() -> float:
        begin = time.perf_counter()
        run(1)
        return time.perf_counter() - begin

    for rounds, survivors in heats:
        earlier |= run(rounds)
        candidates = sorted((c for c in left if c not in (own, CUBLAS)), key=lambda c: float(np.median(earlier[c])))
        out = {*candidates[survivors:]}
        left = {contender: step for contender, step in left.items() if contender not in out}
    return earlier, run(timing.rounds_within(deadline - time.perf_counter(), bounds, round_seconds, rank))


def _row(case: Case, contender: Contender, kind: str, result: Checked) -> Row:
    nothing: dict[str, Any] = dict.fromkeys(("us_p20", "us_p50", "us_p80", "rounds", "ratio_p80"))
    config = None if contender is None else contender.meta
    error = max(result.errors.values(), default=None)
    error = error if error is not None and math.isfinite(error) else None
    found = {
        "contender": kind,
        "config": config,
        "verdict": result.refused or OK,
        "max_rel_err": error,
        "chosen": False,
    }
    return case._asdict() | found | nothing


def _figures(ms: Sequence[float]) -> dict[str, Any]:
    return timing.spread([1e3 * t for t in ms], "us") | {"rounds": len(ms)}
