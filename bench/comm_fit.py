"""Fit a machine to what comm_measure.py measured.

    collective   t = rounds · α + sent / β      for each kind and P, rounds and bytes sent as a ring has them
    GEMM         t = launch + FLOPs / rate      for each P; one launch, one rate a dtype

Least squares of log(fitted / measured): a small message counts as much as a large one, a time twice too long as much as
one half as long, and noise that multiplies leaves no bias. The offset is never
negative, the slope always above 0.
The counts of a ring are a convention, which makes α and β of different P comparable: what a library runs is its own
affair (gloo computes its reduce-scatter by an all-reduce, for one).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tpffn_triton.cost_model import rounds_and_bytes
from tpffn_triton.machines import AlphaBeta, Compute, Link, Machine


def fit_line(amounts: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Return (offset, slope) with the least Σ log²((offset + slope · amount) / time); offset at least 0, slope above 0.

    For a given ratio r of offset to slope the best slope is exp(mean(log(time / (r + amount)))); r is searched for.

    Raises: ValueError: fewer than two amounts, a time that is not above 0, or the times of the largest amount are
            below those of the smallest.
    """
    x, t = np.asarray(amounts, float), np.asarray(times, float)
    if len(np.unique(x)) < 2 or not (t > 0).all() or not np.isfinite(t).all():
        raise ValueError(f"a fit needs two amounts and times above 0, got {[*amounts]} and {[*times]}")
    if np.log(t[x == x.max()]).mean() < np.log(t[x == x.min()]).mean():
        raise ValueError(f"times that do not grow: {[*times]} µs for {[*amounts]}")

    def residuals(ratios: np.ndarray) -> np.ndarray:
        return np.log(t / (ratios[:, None] + x))

    low, high = x[x > 0].min() / 1e6, x.max() * 1e4
    for _ in range(5):  # each time on a grid between the neighbours of the best
        ratios = np.geomspace(low, high, 200)
        best = int(residuals(ratios).var(axis=1).argmin())
        low, high = ratios[max(best - 1, 0)], ratios[min(best + 1, len(ratios) - 1)]
    candidates = np.array([0.0, ratios[best]]) if x.min() > 0 else ratios[best : best + 1]
    left = residuals(candidates)
    best = int(left.var(axis=1).argmin())
    slope = float(np.exp(left[best].mean()))
    return float(candidates[best]) * slope, slope


def fit_collective(rows: list[dict[str, Any]]) -> AlphaBeta:
    """Return the α–β of rows of one kind and P; adds to each row `us_fitted` and `fit_error`, relative."""
    kind, p = rows[0]["kind"], rows[0]["world_size"]
    counts = [rounds_and_bytes(kind, "ring", row["bytes"], p) for row in rows]
    rounds = counts[0][0]
    offset, slope = fit_line([sent for _, sent in counts], [row["us_p50"] for row in rows])
    for row, (_, sent) in zip(rows, counts, strict=True):
        row["us_fitted"] = offset + slope * sent
        row["fit_error"] = row["us_fitted"] / row["us_p50"] - 1
    # Latency alone may decide every time that was measured; a machine file holds no more than 1e6 GB/s.
    gb_per_s = min(1 / slope / 1e3, 1e6)
    return AlphaBeta("ring", 0.0, offset / rounds, gb_per_s, "fitted by bench/comm_bench.py", kind, p)


def fit_compute(result: dict[str, Any], source: str) -> Compute:
    """Return what each of the ranks computes; the launch is the least of the dtypes'."""
    rates, launches = [], []
    for dtype in dict.fromkeys(row["dtype"] for row in result["gemms"]):
        rows = [row for row in result["gemms"] if row["dtype"] == dtype]
        launch, slope = fit_line([row["flops"] for row in rows], [row["us_p50"] for row in rows])
        rates.append((dtype, 1 / slope / 1e6))
        launches.append(launch)
    world_size = result["environment"]["ranks"]
    return Compute(tuple(rates), result["tb_per_s"], min(launches), result["overlap"]["p50"], source, world_size)


def fit_machine(results: list[dict[str, Any]]) -> Machine:
    """Return the machine behind the results of several P; rows gain their fit.

    Raises: ValueError: no P above 1, so no collectives, or times that cannot be fitted.
    """
    rows = [row for result in results for row in result["rows"]]
    groups = dict.fromkeys((row["kind"], row["world_size"]) for row in rows)
    terms = [fit_collective([row for row in rows if (row["kind"], row["world_size"]) == group]) for group in groups]
    last = results[-1]["environment"]
    name = f"{last['device']}, {last['cores']} cores, {last['collectives']}"
    if last["device_type"] == "cuda":
        name = f"{last['device']}, {last['collectives']}"
    return Machine(
        name=name,
        computes=tuple(fit_compute(result, "measured by bench/comm_bench.py") for result in results),
        link=Link(str(last["collectives"]), tuple(terms)),
        network=None,
        ranks_per_node=max(result["environment"]["ranks"] for result in results),
    )
