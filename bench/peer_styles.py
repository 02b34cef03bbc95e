"""What report.py's pictures share: a colour and a marker a peer, titles, the legend, panels."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import figures
from peer import EAGER, FUSED, TWO_GEMMS
from report_rows import Point, Section

# Paul Tol's "muted" scheme, told apart with any colour vision; ours is black, eager and the bare GEMMs are greys.
_PALETTE = ("#332288", "#88ccee", "#117733", "#cc6677", "#ddaa33", "#882255", "#44aa99", "#999933", "#aa4499")
_MARKERS = "osD^v<>phX"
_FIXED = {FUSED: ("#000000", "*"), EAGER: ("#777777", "o"), TWO_GEMMS: ("#999999", "x")}
_ROUND = (1, 2, 5, 3, 1.5, 7, 1.2, 4, 8, 9, 1.1, 6)  # the roundest first
# These keep their colours in every report; others take what is left, in alphabetical order.
_KNOWN = (
    "compile",
    "compile-max-autotune",
    "addmm-epilogue",
    "nvmath",
    "megatron",
    "liger",
    "quack",
    "transformer-engine",
)


def label_of(impl: str) -> str:
    """Return an implementation's name in pictures."""
    return "ours (fused)" if impl == FUSED else impl


class NothingToDraw(ValueError):
    """There are no rows for a picture; says why."""


class Styles:
    """Colour, marker and place in the legend of each peer, the same in all of a report's pictures."""

    def __init__(self, sections: Iterable[Section]) -> None:
        found = {peer for section in sections for peer in section.peers} - _FIXED.keys()
        names = [*_KNOWN, *sorted(found - {*_KNOWN})]
        self._of = dict(_FIXED)
        for number, name in enumerate(names):
            # Where colours begin again, markers do not.
            self._of[name] = _PALETTE[number % len(_PALETTE)], _MARKERS[(number + 1) % len(_MARKERS)]

    def colour(self, impl: str) -> str:
        """Return a colour, as #rrggbb."""
        return self._of[impl][0]

    def line(self, impl: str) -> dict[str, Any]:
        """Return what axis.plot draws an implementation with; ours stands out."""
        colour, marker = self._of[impl]
        ours = impl == FUSED
        return {
            **{"color": colour, "marker": marker, "label": label_of(impl)},
            **{"markersize": 10 if ours else 6, "linewidth": 2.6 if ours else 1.3, "zorder": 4 if ours else 3},
        }


def grid(
    plt: Any, panels: int, columns: int, size: tuple[float, float], sharey: bool = False, margin: float = 0
) -> tuple[Any, list[Any]]:
    """Return a figure and the axes of so many panels, with at most so many columns.

    size      of a panel, in inches
    margin    inches to the left of the first
    """
    columns = min(columns, panels)
    lines = -(-panels // columns)
    # Titles and legend need some height, and a title some width.
    width, height = max(7.0, size[0] * columns + margin), size[1] * lines + 1.6
    figure = plt.figure(figsize=(width, height), layout="constrained")
    axes = [*figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat]
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes[:panels]


def steps_of(section: Section, drawn: Callable[[Point], bool]) -> list[tuple[str, list[Point]]]:
    """Return (title, points) of each way to run a step and each mode that have points to draw."""
    found = []
    for how in section.hows:
        for mode in section.modes:
            if points := [point for point in section.at(how, mode) if drawn(point)]:
                found.append(("\n".join(filter(None, (points[0].step, how))), points))
    return found


def entitle(figure: Any, what: str, section: Section) -> None:
    """Say above a figure what it shows, and where that was measured."""
    lines = [what, section.words, section.commits]
    if any(row["triton_interpret"] for row in section.rows):
        lines.append("INTERPRETED: these times mean nothing")
    elif not section.on_cuda:
        lines.append("CPU figures: they say nothing about a GPU")
    room = int(12 * figure.get_figwidth())  # characters of this size
    figure.suptitle("\n".join(textwrap.fill(line, room) for line in lines), fontsize=10)


def explain(figure: Any, axes: Sequence[Any]) -> None:
    """Put one legend of all axes' labels below the figure."""
    # As many columns as the width has room for: a name takes some 1.9 inches.
    columns = max(1, int(figure.get_figwidth() / 1.9))
    figures.legend(figure, axes, ncols=columns, fontsize=8)


def in_order(section: Section) -> list[str]:
    """Return all implementations, ours last: it is drawn over the others."""
    return [*section.peers, FUSED]


def round_values(least: float, most: float, count: int) -> list[float]:
    """Return round values from least to most for an axis with a logarithmic scale, no two closer than 1/count of it."""
    apart = math.log(most / least) / count
    kept: list[float] = []
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    for mantissa in _ROUND:
        for value in (mantissa * 10.0**decade for decade in decades):
            if least <= value <= most and all(abs(math.log(value / other)) >= apart for other in kept):
                kept.append(value)
    return sorted(kept)


def log_scale(axis: Any, which: str, limits: tuple[float, float], count: int) -> None:
    """Give an axis ("x" or "y") a logarithmic scale between limits, with plain numbers at about count round values."""
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(*limits)
    ticks = round_values(*limits, count)
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    getattr(axis, f"{which}axis").set_ticks([], minor=True)
