"""Hold measured rows against the project's goals for one H100 in bf16.

Ratios are a peer's time over ours in one run, by round: above 1, ours is faster. Of several points that a goal is
about, the worst counts. Nothing but CUDA counts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import environment
from peer import EAGER, FUSED, TWO_GEMMS
from report_rows import Point, Section

NOT_YET = "not yet measured"
_DTYPE = "bf16"


@dataclass(frozen=True)
class Work:
    """Which points a goal is about: sizes are (least, most); None is any.

    regime, mode, run, l2   as in a row
    """

    words: str
    regime: str | None = None
    mode: str | None = None
    run: str | None = None
    l2: str | None = None
    tokens: tuple[float, float] = (1, math.inf)
    hidden: tuple[float, float] = (1, math.inf)
    ffn_per_rank: tuple[float, float] = (1, math.inf)

    def includes(self, point: Point) -> bool:
        """Return whether a point of any section with the goals' dtype is meant."""
        row = point.first
        names_fit = all(getattr(self, name) in (None, row[name]) for name in ("regime", "mode", "run", "l2"))
        sizes = (("tokens", self.tokens), ("hidden", self.hidden), ("ffn_per_rank", self.ffn_per_rank))
        return names_fit and all(least <= row[name] <= most for name, (least, most) in sizes)


@dataclass(frozen=True)
class Goal:
    """One figure of some work and its bound.

    figure     point → the figure; None: there are no rows for it
    bound      in the figure's unit
    at_least   the bound is the least that meets the goal, else the most
    form       shows a figure, with its unit
    name       point → whose figure it is, where the goal does not say
    """

    work: Work
    words: str
    figure: Callable[[Point], float | None]
    bound: float
    at_least: bool = True
    form: str = "{:.3f}×"
    name: Callable[[Point], str] | None = None

    def misses_by(self, figure: float) -> float:
        """Return by what part of the bound a figure misses it; 0 or less: it is met."""
        return (self.bound - figure if self.at_least else figure - self.bound) / self.bound


@dataclass(frozen=True)
class Verdict:
    """A goal and the worst point that was measured for it, if any; `points` of which `missed` miss the goal."""

    goal: Goal
    worst: Point | None = None
    figure: float = math.nan
    points: int = 0
    missed: int = 0


def _time_over_ours(peer: str, point: Point) -> float | None:
    return point.figure(peer, "ratio_p50")


def _ours_over_bare_gemms(point: Point) -> float | None:
    ratio = _time_over_ours(TWO_GEMMS, point)
    return None if not ratio else 1 / ratio


def _peers(point: Point) -> dict[str, float]:
    others = {peer: ratio for peer, ratio in point.ratios().items() if not peer.startswith(f"{FUSED}-")}
    return {peer: ratio for peer, ratio in others.items() if peer != TWO_GEMMS}


def _fastest_peer(point: Point) -> float | None:
    return min(_peers(point).values(), default=None)


def _name_of_fastest(point: Point) -> str:
    peers = _peers(point)
    return min(peers, key=peers.__getitem__)


def _us(point: Point) -> float | None:
    ms = point.figure(FUSED, "ms_p50")
    return None if ms is None else 1e3 * ms


def _bandwidth_used(point: Point) -> float | None:
    """Return our gb_per_s in percent of what the device copies; None also where that is unknown."""
    best, ours = environment.ceiling(point.first["device"]), point.figure(FUSED, "gb_per_s")
    return None if best is None or ours is None else ours / best.tb_per_s / 10


def _error_over_eagers(point: Point) -> float | None:
    return point.figure(FUSED, "error_vs_eager")


def _over(peer: str, work: Work, least: float) -> Goal:
    return Goal(work, f"{peer} ≥ {least:g}×", partial(_time_over_ours, peer), least)


_ONE_H = 1024, 1024
ANALYSED = Work("analysed, graph, forward", "analysed", "fwd", "graph", None, _ONE_H, _ONE_H, _ONE_H)
ANALYSED_BOTH = replace(ANALYSED, words="analysed, graph, forward+backward", mode="fwd_bwd")
_SIZES_OF_DECODE = (1, 64), (8192, 8192), (3584, 3584)
DECODE = Work("decode M 1–64, H=8192, F/P=3584, cold L2", "decode", "fwd", None, "cold", *_SIZES_OF_DECODE)
DECODE_GRAPH = replace(DECODE, words="the same, graph", run="graph")
WIDE = Work("wide M 4096–16384, H 4096–8192, forward", "wide", "fwd", tokens=(4096, 16384), hidden=(4096, 8192))
TRAINING = Work("training, H=4096, forward+backward", "training", "fwd_bwd", hidden=(4096, 4096))
EVERY = Work("every point")
EVERY_BOTH = Work("every point, forward+backward", mode="fwd_bwd")

GOALS = (
    _over(EAGER, ANALYSED, 1.5),
    _over("compile-max-autotune", ANALYSED, 1.25),
    _over("addmm-epilogue", ANALYSED, 1.2),
    Goal(ANALYSED, "ours ≤ 12 µs", _us, 12, at_least=False, form="{:.1f} µs"),
    _over(EAGER, ANALYSED_BOTH, 1.5),
    _over("compile", ANALYSED_BOTH, 1.25),
    Goal(DECODE, "no peer faster", _fastest_peer, 1, name=_name_of_fastest),
    _over(EAGER, DECODE_GRAPH, 1.15),
    Goal(DECODE_GRAPH, "ours ≥ 80 % of copy bandwidth", _bandwidth_used, 80, form="{:.1f} %"),
    Goal(WIDE, f"ours ≤ 1.02× {TWO_GEMMS}", _ours_over_bare_gemms, 1.02, at_least=False),
    _over(EAGER, TRAINING, 1.04),
    _over("compile", TRAINING, 1.02),
    _over("nvmath", TRAINING, 1),
    _over(EAGER, EVERY, 1),
    Goal(EVERY, "errors ≤ 1.1× eager's", _error_over_eagers, 1.1, at_least=False),
    Goal(EVERY_BOTH, "kept for backward ≤ 0.5× eager's", Point.saved_vs_eager, 0.5, at_least=False),
)


def verdict(goal: Goal, points: Sequence[Point]) -> Verdict:
    """Return what the worst of the points says about a goal."""
    figures = [(goal.figure(point), point) for point in points if goal.work.includes(point)]
    found = [(figure, point) for figure, point in figures if figure is not None]
    if not found:
        return Verdict(goal)
    figure, worst = max(found, key=lambda pair: goal.misses_by(pair[0]))
    return Verdict(goal, worst, figure, len(found), sum(goal.misses_by(figure) > 0 for figure, _ in found))


_HEADERS = ("work", "goal", "measured", "outcome", "at", "file")


def table(sections: Sequence[Section]) -> str:
    """Return the goals' table of each device, below its name and above what one has to know."""
    devices: dict[str, list[Point]] = {section.device: [] for section in sections}
    for section in sections:
        if section.on_cuda and section.dtype == _DTYPE:
            devices[section.device] += section.points
    parts = [f"{device}, against the goals for one H100, {_DTYPE}\n\n{_body(pts)}" for device, pts in devices.items()]
    notes = [*_NOTES, *(_bandwidth_of(device) for device, points in devices.items() if points)]
    return "\n\n".join([*parts, "\n".join(notes)])


def _bandwidth_of(device: str) -> str:
    """Say what the copy bandwidth is, and where from: some are the datasheet's peak, which nothing copies with."""
    best = environment.ceiling(device)
    if best is None:
        return f"Copy bandwidth of {device} is unknown: its share is not measured."
    return f"Copy bandwidth of {device}: {best.tb_per_s:g} TB/s by tpffn_triton/presets.py: {best.source}."


_NOTES = (
    "Goals count on CUDA in bf16 alone. Ratios: the peer's time over ours, median over rounds of one run.",
    "Of the points that a goal is about, the worst is shown; (1 of 2) is how many miss it.",
    "Not of these files: the first call (bench/first_call.py), launches of backward (tests/test_weight_grads.py).",
    f"{TWO_GEMMS} is two bare GEMMs, less work than the layer: no peer.",
)


def _body(points: Sequence[Point]) -> str:
    import tabulate

    lines: list[Any] = []
    work = None
    for goal in GOALS:
        # A blank line between works, whose name stands in the first of its lines.
        lines += [[""] * len(_HEADERS)] * (work not in (None, goal.work))
        words = "" if work == goal.work else goal.work.words
        lines.append([words, goal.words, *_cells(verdict(goal, points))])
        work = goal.work
    return tabulate.tabulate(lines, _HEADERS, tablefmt="simple", disable_numparse=True)


def _cells(found: Verdict) -> tuple[str, ...]:
    """Return figure, outcome, where the worst point is and its file."""
    goal, worst = found.goal, found.worst
    if worst is None:
        return NOT_YET, "", "", ""
    figure = goal.form.format(found.figure) + (f" {goal.name(worst)}" if goal.name else "")
    missed_by = goal.misses_by(found.figure)
    outcome = f"missed by {100 * missed_by:.2g} % ({found.missed} of {found.points})" if missed_by > 0 else "met"
    return figure, outcome, worst.words, str(worst.file)
