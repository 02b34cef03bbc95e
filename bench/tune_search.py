"""Search case by case within a budget: filter the candidates of a kernel while the one before is measured."""

import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import ranks
import torch
from budget import Budget
from ranks import Rank
from tables import Row
from tune_cases import Case
from tune_filter import OK, Filter, FilterFailed, OutOfTime
from tune_measure import measure
from tune_rows import CANDIDATE, TABLE, State

from tpffn_triton.kernels._configs import Config

# A case is not begun with less.
LEAST_S = 2.0
Candidates = Mapping[Case, Sequence[Config]]


class Found(NamedTuple):
    """What a search could not do: cases and candidates left out for lack of time, and what was wrong or failed."""

    left_out: list[str]
    failed: list[str]


def by_kernel(candidates: Candidates) -> dict[str, list[Config]]:
    """Return kernel → what is to be compiled for it."""
    found: dict[str, dict[Config, None]] = {}
    for case, configs in candidates.items():
        found.setdefault(case.kernel, {}).update(dict.fromkeys(configs))
    return {kernel: [*configs] for kernel, configs in found.items()}


def _verdict_row(kernel: str, arithmetic: str, config: Config, verdict: str) -> Row:
    row: Row = {"kernel": kernel, "arithmetic": arithmetic, "rows": None, "cols": None, "inner": None}
    row |= {"contender": CANDIDATE, "config": config.meta, "verdict": verdict, "chosen": False}
    return row | dict.fromkeys(("us_p20", "us_p50", "us_p80", "rounds", "ratio_p80", "max_rel_err"))


class _Verdicts:
    """Verdicts of the filter, those that the state has and those that it is given."""

    def __init__(self, state: State, candidates: Candidates, compiler: Filter) -> None:
        self.state, self.arithmetic = state, compiler.arithmetic
        self.started: dict[str, Future[dict[Config, str]]] = {}
        for kernel, configs in by_kernel(candidates).items():
            known = state.verdicts(kernel, self.arithmetic)
            unknown = [config for config in configs if config not in known]
            if unknown:
                self.started[kernel] = compiler.start(kernel, unknown)

    def of(self, kernel: str, found: Found) -> dict[Config, str]:
        """Return a kernel's, when they are there; what is missing is said in found."""
        if kernel in self.started:
            try:
                new = self.started.pop(kernel).result()
            except OutOfTime as error:
                found.left_out.append(f"candidates of {kernel}: {error}")
            except FilterFailed as error:
                found.failed.append(f"candidates of {kernel}: {error}")
            else:
                self.state.add(
                    _verdict_row(kernel, self.arithmetic, config, verdict) for config, verdict in new.items()
                )
        return self.state.verdicts(kernel, self.arithmetic)


def filter_all(candidates: Candidates, state: State, arch: str, arithmetic: str, budget: Budget) -> Found:
    """Add the verdicts on all candidates to the state; those that it has are not asked for again."""
    found = Found([], [])
    with Filter(arch, arithmetic, ranks.cores(), budget) as compiler:
        verdicts = _Verdicts(state, candidates, compiler)
        for kernel in by_kernel(candidates):
            verdicts.of(kernel, found)
    return found


def search(rank: Rank, candidates: Candidates, state: State, arch: str, arithmetic: str, budget: Budget) -> Found:
    """Add each case's measurements to the state, in the order of candidates, but first those that have none; where some
    candidates are missing, they are measured beside what was chosen. What time is left is divided evenly over the cases
    left."""
    found = Found([], [])
    lacking = {case: configs for case, configs in candidates.items() if state.lacking(case, configs)}
    todo = {case: lacking[case] for case in sorted(lacking, key=lambda case: bool(state.measured(case)))}
    # While something is measured, the cores that launch and wait are left alone.
    with Filter(arch, arithmetic, max(1, ranks.cores() - 2), budget) as compiler:
        verdicts = _Verdicts(state, todo, compiler)
        for number, (case, configs) in enumerate(todo.items()):
            passed = verdicts.of(case.kernel, found)
            if (budget.left() or 0.0) < LEAST_S:
                found.left_out.append(str(case))
                continue
            missing = [config for config in state.lacking(case, configs) if passed.get(config) == OK]
            if state.measured(case) and not missing:
                continue
            worth = [*dict.fromkeys([configs[0], *state.chosen(case), *missing])]
            rank.say(f"{number + 1} of {len(todo)}: {case}, {len(worth)} of {len(configs)} candidates")
            try:
                share = budget.share(len(todo) - number).left() or 0.0
                rows, unreached = measure(rank, case, worth, max(LEAST_S, share))
            except Exception as error:  # out of memory, say: other cases are smaller
                traceback.print_exc()
                found.failed.append(f"{case}: {type(error).__name__}: {error}")
                if _lost(rank):
                    found.failed.append("the GPU answers no more, as after an illegal access: the rest is not measured")
                    return found
                continue
            state.add(rows)
            found.failed.extend(f"{case}: {row['verdict']}" for row in rows if _bad(row))
            if unreached:
                found.left_out.append(f"{case}: {unreached} of its candidates")
            if rank.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _lost(rank: Rank) -> bool:
    """Say whether this process can use its GPU no more."""
    try:
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _bad(row: Row) -> bool:
    """A candidate that the GPU refuses is a finding; a wrong one, or the tables' own, is a fault."""
    return row["verdict"] != OK and (row["contender"] == TABLE or " is wrong: " in row["verdict"])
