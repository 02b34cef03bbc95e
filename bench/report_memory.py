"""Draw the bytes that each peer keeps for backward: a panel a shape, a bar a peer, and half of eager's as a line."""

from typing import Any

from peer import EAGER
from peer_styles import NothingToDraw, Styles, entitle, explain, grid, in_order, label_of
from report_rows import Point, Section

_COLUMNS = 3


def draw(plt: Any, section: Section, styles: Styles) -> Any:
    """Return the figure. Raises: NothingToDraw."""
    panels = _panels(section)
    if not panels:
        raise NothingToDraw("no row of mode fwd_bwd has saved_bytes")
    most = max(len(kept) for _, kept in panels)
    figure, axes = grid(plt, len(panels), _COLUMNS, (4.6, 0.26 * most + 0.9))
    for axis, (title, kept) in zip(axes, panels, strict=True):
        _panel(axis, kept, styles)
        axis.set_title(title, fontsize=10)
    entitle(figure, "Kept for backward, beside x and parameters", section)
    explain(figure, axes)
    return figure


def _panels(section: Section) -> list[tuple[str, dict[str, int]]]:
    """Return (title, impl → bytes) of each shape; ways to run a step that keep the same are one."""
    found: dict[tuple, tuple[Point, dict[str, int]]] = {}
    for point in section.points:
        kept = {impl: point.figure(impl, "saved_bytes") for impl in in_order(section)}
        known: Any = {impl: size for impl, size in kept.items() if size is not None}
        if known and point.first["mode"] == "fwd_bwd":
            found.setdefault((point.shape, *known.items()), (point, known))
    shapes = [point.shape for point, _ in found.values()]
    panels = []
    for point, known in found.values():
        name, m, h, f = point.shape
        how = f", {point.how}" if shapes.count(point.shape) > 1 else ""
        panels.append((f"{name}{how}\nM={m} H={h} F/P={f}", known))
    return panels


def _panel(axis: Any, kept: dict[str, int], styles: Styles) -> None:
    mib = {impl: size / 2**20 for impl, size in kept.items()}
    for place, (impl, size) in enumerate(mib.items()):
        axis.barh(place, size, 0.7, color=styles.colour(impl))
        text = f"{size:.3g}" + (f" ({size / mib[EAGER]:.2f}×)" if mib.get(EAGER) else "")
        axis.annotate(text, (size, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(mib)), [*map(label_of, mib)], fontsize=8)
    axis.set_ylim(-0.6, len(mib) - 0.4)
    axis.set_xlim(0, 1.35 * max(*mib.values(), 1e-6))
    if EAGER in mib:
        axis.axvline(mib[EAGER] / 2, color="black", linestyle="--", linewidth=1, label="half of eager's")
    axis.set_xlabel("MiB (× eager's)")
    axis.tick_params(axis="y", length=0)
