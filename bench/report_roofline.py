"""Draw TFLOP/s by FLOPs per byte, below what the device reaches at best."""

import math
from typing import Any

import environment
from peer_styles import Styles, entitle, explain, grid, in_order, log_scale, steps_of
from report_rows import Point, Section

from tpffn_triton.machines import Compute

_PANEL = 5.6, 4.8
_NAME = 0.05  # of an axis' width, from one shape's name to the next
_ROOM = 1.7  # beside the outermost points


def draw(plt: Any, section: Section, styles: Styles) -> Any:
    """Return the figure; every section has rows for it."""
    panels = steps_of(section, lambda _: True)
    figure, axes = grid(plt, len(panels), len(section.modes), _PANEL)
    best = environment.ceiling(section.device)
    for axis, (title, points) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        _panel(axis, points, best, section, styles)
    ceilings = f"ceilings: {best.source}" if best else "the ceilings of this device are unknown"
    entitle(figure, f"Roofline; {ceilings}", section)
    explain(figure, axes)
    return figure


def _panel(axis: Any, points: list[Point], best: Compute | None, section: Section, styles: Styles) -> None:
    for impl in in_order(section):
        here = [point for point in points if impl in point.rows]
        tflops = [point.rows[impl]["tflops"] for point in here]
        if here:
            axis.plot([*map(_intensity, here)], tflops, **styles.line(impl) | {"linestyle": "none"})
    heights = [row["tflops"] for point in points for row in point.rows.values()]
    left, right = min(map(_intensity, points)) / _ROOM, max(map(_intensity, points)) * _ROOM
    if best is not None:
        peak = best.rate(section.dtype)
        ridge = min(max(peak / best.tb_per_s, left), right)
        roof = [min(peak, best.tb_per_s * intensity) for intensity in (left, ridge, right)]
        label = f"{peak:g} TFLOP/s, {best.tb_per_s:g} TB/s"
        axis.plot((left, ridge, right), roof, "--", color="black", linewidth=1.2, label=label)
        heights += roof[1:]
    low, high = min(heights) / 1.2, max(heights) * 1.25
    log_scale(axis, "x", (left, right), 8)
    log_scale(axis, "y", (low * (low / high) ** 0.55, high), 9)  # names stand below the points
    _name_shapes(axis, points)
    axis.set_xlabel("GEMM FLOPs per byte that must be read or written")
    axis.set_ylabel("TFLOP/s")
    axis.grid(color="#e5e5e5", linewidth=0.6)


def _intensity(point: Point) -> float:
    return point.first["flops"] / point.first["moved_bytes"]


def _name_shapes(axis: Any, points: list[Point]) -> None:
    """Write each shape's name at the bottom, with a line up its intensity; names keep clear of one another."""
    named = {point.first["shape"]: _intensity(point) for point in points}
    low, high = (math.log10(value) for value in axis.get_xlim())
    place = -1.0
    for name, intensity in sorted(named.items(), key=lambda pair: pair[1]):
        axis.axvline(intensity, color="#bbbbbb", linewidth=0.6, linestyle=":", zorder=0)
        at = (math.log10(intensity) - low) / (high - low)
        place = max(at, place + _NAME)
        axis.annotate(
            name,
            (at, 0.34),
            (place, 0.02),
            *("axes fraction", "axes fraction"),
            {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color="#444444",
        )
