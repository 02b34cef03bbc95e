"""Draw each peer's time over ours by shape: points are p50, whiskers p20 to p80."""

import math
from typing import Any

from peer_styles import NothingToDraw, Styles, entitle, explain, grid, log_scale, steps_of
from report_rows import Point, Section

_PITCH = 0.125  # inches from one peer to the next


def draw(plt: Any, section: Section, styles: Styles) -> Any:
    """Return the figure. Raises: NothingToDraw."""
    panels = steps_of(section, lambda point: bool(point.ratios()))
    if not panels:
        raise NothingToDraw("no peer was timed beside fused")
    points = [point for _, of_panel in panels for point in of_panel]
    shapes = [*dict.fromkeys(point.shape for point in points)]
    peers = [peer for peer in section.peers if any(peer in point.ratios() for point in points)]
    band = len(peers) + 1  # a gap between shapes
    size = 4.2 if len(panels) <= 2 else 2.9, _PITCH * band * len(shapes) + 0.8
    figure, axes = grid(plt, len(panels), len(panels), size, sharey=True, margin=1.7)
    limits = _limits(points)
    for axis, (title, of_panel) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        _dress(axis, shapes, band, limits)
        by_shape = {point.shape: point for point in of_panel}
        for number, peer in enumerate(peers):
            _peer(axis, {shapes.index(s) * band + number: p for s, p in by_shape.items()}, peer, styles)
        for place in (number * band + (band - 2) / 2 for number, s in enumerate(shapes) if s not in by_shape):
            axis.text(1.02, place, "not measured", fontsize=7, color="#888888", va="center")
    entitle(figure, "Each peer's time over ours (p50, whiskers p20 to p80)", section)
    explain(figure, axes)
    return figure


def _peer(axis: Any, places: dict[int, Point], peer: str, styles: Styles) -> None:
    """Draw one peer's ratios, at each point's place from the top."""
    here = {place: point for place, point in places.items() if peer in point.ratios()}
    p20, p50, p80 = ([point.ratios(p)[peer] for point in here.values()] for p in (20, 50, 80))
    spread = [[b - a for a, b in zip(p20, p50, strict=True)], [c - b for b, c in zip(p50, p80, strict=True)]]
    style = styles.line(peer) | {"linewidth": 0, "markersize": 5, "elinewidth": 1.3}
    axis.errorbar(p50, [*here], xerr=spread, **style)


def _dress(axis: Any, shapes: list[tuple[str, int, int, int]], band: int, limits: tuple[float, float]) -> None:
    middles = [number * band + (band - 2) / 2 for number in range(len(shapes))]
    axis.set_yticks(middles, [f"{name}\nM={m} H={h} F/P={f}" for name, m, h, f in shapes], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(shapes) * band + 0.3, -1)  # the first shape on top
    for number in range(0, len(shapes), 2):
        axis.axhspan(number * band - 1, (number + 1) * band - 1, color="#f3f3f3", zorder=0)
    log_scale(axis, "x", limits, 9)
    axis.set_xlabel("peer's time ÷ ours\n← peer faster    ours faster →")
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.axvline(1, color="black", linewidth=2, label="ours = 1.0")
    axis.annotate("1.0: ours", (1, 0), (3, 3), ("data", "axes fraction"), "offset points", fontsize=8)


def _limits(points: list[Point]) -> tuple[float, float]:
    """Return what holds every whisker and 1, with some room: a twentieth of a decade at the least."""
    least = min(1, *(ratio for point in points for ratio in point.ratios(20).values()))
    most = max(1, *(ratio for point in points for ratio in point.ratios(80).values()))
    room = max(0.06 * math.log(most / least), 0.05)
    return least * math.exp(-room), most * math.exp(room)
