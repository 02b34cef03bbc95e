"""Draw time by tokens M: a panel a layer's sizes and mode, a line a peer; p50, and p20 to p80 as a band."""

from typing import Any

from peer_styles import NothingToDraw, Styles, entitle, explain, grid, in_order, log_scale
from report_rows import Point, Section

_COLUMNS = 3


def draw(plt: Any, section: Section, styles: Styles) -> Any:
    """Return the figure. Raises: NothingToDraw."""
    by_layer: dict[tuple, list[Point]] = {}
    for point in section.points:
        sizes = f"H={point.first['hidden']} F/P={point.first['ffn_per_rank']}"
        by_layer.setdefault((sizes, point.step, point.how), []).append(point)
    layers = {key: points for key, points in by_layer.items() if len({p.first["tokens"] for p in points}) > 1}
    if not layers:
        raise NothingToDraw("no H and F/P was measured at several M")
    figure, axes = grid(plt, len(layers), _COLUMNS, (4.6, 3.9))
    for axis, (words, points) in zip(axes, layers.items(), strict=True):
        axis.set_title("\n".join(filter(None, (words[0], ", ".join(filter(None, words[1:]))))), fontsize=10)
        _panel(axis, sorted(points, key=lambda point: point.first["tokens"]), section, styles)
    entitle(figure, "Time of a step by tokens (p50, bands p20 to p80)", section)
    explain(figure, axes)
    return figure


def _panel(axis: Any, points: list[Point], section: Section, styles: Styles) -> None:
    for impl in in_order(section):
        here = [point.rows[impl] for point in points if impl in point.rows]
        if not here:
            continue
        tokens = [row["tokens"] for row in here]
        p20, p50, p80 = ([1e3 * row[f"ms_p{p}"] for row in here] for p in (20, 50, 80))
        axis.plot(tokens, p50, **styles.line(impl))
        axis.fill_between(tokens, p20, p80, color=styles.colour(impl), alpha=0.12, linewidth=0)
    every = sorted({point.first["tokens"] for point in points})
    times = [1e3 * row[f"ms_p{p}"] for point in points for row in point.rows.values() for p in (20, 80)]
    log_scale(axis, "x", (every[0] / 1.1, every[-1] * 1.1), 8)
    axis.set_xticks(every, every, rotation=45 if len(every) > 6 else 0)
    log_scale(axis, "y", (min(times) / 1.1, max(times) * 1.1), 9)
    axis.set_xlabel("tokens M")
    axis.set_ylabel("µs a step")
    axis.grid(color="#e5e5e5", linewidth=0.6)
