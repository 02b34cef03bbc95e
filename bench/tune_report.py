"""Print what a search would do, what the filter said, and what was found."""

from collections import Counter
from typing import Any

import tables
from tables import Row
from tune_candidates import name_of
from tune_cases import Case
from tune_filter import OK
from tune_rows import State
from tune_search import Candidates, Found, by_kernel

from tpffn_triton.kernels._configs import Config


def _table(names: tuple[str, ...], lines: list[tuple], left: int) -> str:
    """Return a table whose first columns, so many, are text."""
    import tabulate

    align = ("left",) * left + ("right",) * (len(names) - left)
    return tabulate.tabulate(lines, names, disable_numparse=True, colalign=align)


def _sizes(case: Case) -> tuple[str, ...]:
    return case.kernel, case.arithmetic, f"{case.rows}×{case.cols} over {case.inner}"


def cases(candidates: Candidates) -> str:
    """Return what is tuned, a line each."""
    lines = [(*_sizes(case), name_of(configs[0])) for case, configs in candidates.items()]
    return _table(("kernel", "arithmetic", "output", "the tables' choice"), lines, 4)


def plan(candidates: Candidates, budget_s: float) -> str:
    """Return how much would be compiled and measured."""
    compiled = by_kernel(candidates)
    of_kernel = Counter(case.kernel for case in candidates)
    measured = Counter(dict.fromkeys(compiled, 0))
    for case, configs in candidates.items():
        measured[case.kernel] += len(configs)
    lines = [(kernel, of_kernel[kernel], len(configs), measured[kernel]) for kernel, configs in compiled.items()]
    lines.append(("in all", len(candidates), sum(map(len, compiled.values())), measured.total()))
    each = f"{budget_s:g} s, {budget_s / len(candidates):.1f} s a case; those that do not compile well are not measured"
    return _table(("kernel", "cases", "to compile", "to measure"), lines, 1) + "\n" + each


def verdicts(candidates: Candidates, state: State, found: Found) -> str:
    """Return the filter's verdict on each candidate."""
    (arithmetic,) = {case.arithmetic for case in candidates}
    lines, kept = [], 0
    for kernel, configs in by_kernel(candidates).items():
        known = state.verdicts(kernel, arithmetic)
        kept += sum(known.get(config) == OK for config in configs)
        lines += [(kernel, arithmetic, name_of(config), known.get(config, "not compiled")) for config in configs]
    table = _table(("kernel", "arithmetic", "candidate", "verdict"), lines, 4)
    return "\n".join((table, f"{kept} of {len(lines)} candidates may be launched", *_missing(found)))


def results(content: dict[str, Any], surroundings: Row, found: Found) -> str:
    """Return the rows of the file below what ran where, and what is not in it."""
    parts = [tables.surroundings(surroundings)]
    lines = []
    for row in content["rows"]:
        case = Case(*(row[name] for name in Case._fields))
        chosen = "torch's GEMM" if row["config"] is None else name_of(Config(**row["config"]))
        times = (row[name] for name in ("us", "table_us", "cublas_us"))
        us = ("" if time is None else tables.ms(time) for time in times)
        lines.append((*_sizes(case), chosen, *us, f"{row['table_us'] / row['us']:.2f}", row["candidates"]))
    names = ("kernel", "arithmetic", "output", "fastest", "µs", "tables' µs", "torch's µs", "× tables'", "timed")
    parts.append(_table(names, lines, 4) if lines else "nothing was measured")
    if content["device"] == "interpreter":
        parts.append("The kernels ran in Triton's interpreter: THESE TIMES MEAN NOTHING.")
    return "\n\n".join(parts[:2]) + "".join(f"\n{line}" for line in (*parts[2:], *_missing(found)))


def _missing(found: Found) -> list[str]:
    return [f"LEFT OUT: {line}" for line in found.left_out] + [f"FAILED: {line}" for line in found.failed]
