"""Draw strategy_bench.py's rows: time, bytes, scaling, prediction; a panel a shape, a colour a strategy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import tables
from strategy_measure import TIMED, UNSPLIT
from strategy_report import Row, shape_of, two_lines, where

from tpffn_triton.plan_comparison import ON_SLICES
from tpffn_triton.predict import PASSES

NAMES = {name: "\n".join(filter(None, two_lines(name))) for name in TIMED}
# Paul Tol's "bright" scheme: told apart with any colour vision.
COLOURS = {
    UNSPLIT: "#555555",
    "column_row": "#4477aa",
    ON_SLICES: "#66ccee",
    "row_row": "#228833",
    "column_column": "#ccbb44",
    "row_column": "#ee6677",
}
_MARKERS = "osD^v"
_GREY, _HATCH, _PALE = "#888888", "////", 0.35
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
_PANEL = 4.2  # inches


def plot(rows: list[Row], paths: Sequence[Path]) -> None:
    """Write to each path the plot that its name, one of PLOTS, asks for."""
    plt = figures.pyplot()
    with plt.rc_context(_STYLE):
        for path in paths:
            figures.write(PLOTS[path.name](plt, rows), path, bbox_inches="tight", pad_inches=0.15)


def _time(plt: Any, rows: list[Row]) -> Any:
    panels, places = _at_largest_p(rows)
    figure = plt.figure(figsize=(_PANEL * len(panels) + 2.4, 6.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for name, passes in panel.items():
            for at, pass_ in ((places[name] - 0.2, PASSES[0]), (places[name] + 0.2, PASSES[1])):
                row, colour = passes[pass_], COLOURS[name]
                p50, compute = row["ms_p50"], row["compute_ms"]
                axis.barh(at, compute, 0.36, color=colour)
                axis.barh(at, p50 - compute, 0.36, left=compute, color="white", edgecolor=colour, hatch=_HATCH)
                spread = [[max(0.0, p50 - row["ms_p20"])], [max(0.0, row["ms_p80"] - p50)]]
                whisker = axis.errorbar(p50, at, xerr=spread, color="black", capsize=3, linewidth=1)
                _label(axis, max(p50, row["ms_p80"]), at, tables.ms(p50))
        axis.set_yticks([place + off for place in places.values() for off in (-0.2, 0.2)], [*PASSES] * len(places))
        _fit(axis, len(places), 1.2 * max(row["ms_p80"] for passes in panel.values() for row in passes.values()))
        axis.set_title(shape_of(_first(panel)), fontsize=10)
        axis.set_xlabel("ms")
    for name, place in places.items():
        to_the_left = {"xytext": (-72, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axes[0].annotate(NAMES[name], (0, place), xycoords=("axes fraction", "data"), **to_the_left)
    handles = {
        "compute": _patch(plt, color=_GREY),
        "exposed communication, on the rank that waits longest": _patch(
            plt, facecolor="white", edgecolor=_GREY, hatch=_HATCH
        ),
        "p20 to p80 over rounds, slowest rank": whisker,
    }
    _explain(figure, handles)
    _entitle(figure, f"Time of a pass (p50) by partitioning, {where(_first(panels[0]))}", _first(panels[0]))
    return figure


def _bytes(plt: Any, rows: list[Row]) -> Any:
    panels, places = _at_largest_p(rows)
    figure = plt.figure(figsize=(_PANEL * len(panels) + 1.2, 7.6), layout="constrained")
    kinds = (
        (_sent, "MiB sent by all ranks together", ("in forward", "in backward")),
        (
            _memory,
            "MiB on each rank",
            ("kept for backward", "the most that is alive, parameters and gradients included"),
        ),
    )
    for part, (draw, unit, meanings) in zip(figure.subfigures(2, 1), kinds, strict=True):
        axes = part.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _fit(axis, len(places), 1.4 * max(draw(axis, places[name], name, panel[name]) for name in panel))
            axis.set_yticks([*places.values()], [NAMES[name] for name in places])
            axis.set_title(shape_of(_first(panel)), fontsize=10)
            axis.set_xlabel(unit)
        opacities = zip(meanings, (1, _PALE), strict=True)
        _explain(part, {meaning: _patch(plt, color=_GREY, alpha=opacity) for meaning, opacity in opacities})
    row = _first(panels[0])
    about = f"P={row['tp']}, {row['activation']}, {row['dtype']}, {tables.commit_of(row)}"
    _entitle(figure, f"Bytes by partitioning, as planned: {about}")
    return figure


def _sent(axis: Any, place: int, name: str, passes: dict[str, Row]) -> float:
    """Draw what is sent; return where the bar ends."""
    forward, backward = (passes[pass_]["sent_bytes"] / 2**20 for pass_ in PASSES)
    axis.barh(place, forward, 0.6, color=COLOURS[name])
    axis.barh(place, backward, 0.6, left=forward, color=COLOURS[name], alpha=_PALE)
    _label(axis, forward + backward, place, f"{forward:.3g} + {backward:.3g}")
    return forward + backward


def _memory(axis: Any, place: int, name: str, passes: dict[str, Row]) -> float:
    """Draw what is kept for backward as a part of the most that is alive; return where the bar ends."""
    kept = passes[PASSES[0]]["saved_bytes"] / 2**20
    most = max(row["peak_bytes"] for row in passes.values()) / 2**20
    axis.barh(place, kept, 0.6, color=COLOURS[name])
    axis.barh(place, most - kept, 0.6, left=kept, color=COLOURS[name], alpha=_PALE)
    _label(axis, most, place, f"{kept:.3g} of {most:.3g}")
    return most


def _scaling(plt: Any, rows: list[Row]) -> Any:
    shapes = _shapes(rows)
    figure = plt.figure(figsize=(_PANEL * len(shapes) + 0.6, 5.2), layout="constrained")
    axes = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axis, shape in zip(axes, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        world_sizes = sorted({row["tp"] for row in own})
        axis.set(xscale="log", yscale="log", xlabel="ranks P")
        axis.set_xticks(world_sizes, [str(p) for p in world_sizes])
        axis.set_title(shape_of(own[0]), fontsize=10)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        base = _both(own, UNSPLIT, 1)
        if base is None:
            axis.annotate("not measured at P=1", (0.5, 0.5), xycoords="axes fraction", ha="center")
            continue
        ideal = [_ideal(next(row for row in own if row["tp"] == p)) for p in world_sizes]
        (handles["ideal"],) = axis.plot(world_sizes, ideal, "--", color=_GREY, linewidth=1)
        for name, marker in zip([*NAMES][1:], _MARKERS, strict=True):
            points = {1: 1.0} | {p: base / ms for p in world_sizes if (ms := _both(own, name, p)) is not None}
            if len(points) > 1:
                style = {"marker": marker, "color": COLOURS[name], "markersize": 7, "markeredgecolor": "white"}
                (handles[NAMES[name]],) = axis.plot([*points], [*points.values()], **style)
    ticks = [2.0**power for power in range(-6, 11)]
    low, high = axes[0].get_ylim()
    for axis in axes:
        axis.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        axis.set_ylim(low, high)
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_locator(plt.NullLocator())
    axes[0].set_ylabel("speed-up over one rank")
    _explain(figure, handles)
    last = max(rows, key=lambda row: row["tp"])
    _entitle(figure, f"Forward + backward against one rank, {last['activation']}, {last['dtype']}", last)
    return figure


def _ideal(row: Row) -> float:
    """Return what P ranks could gain at best: there may be fewer cores than they have threads."""
    room = row["tp"] if row["device_type"] == "cuda" else row["cores"] / row["threads"]
    return min(row["tp"], max(1.0, room))


def _predicted(plt: Any, rows: list[Row]) -> Any:
    figure, axis = plt.subplots(figsize=(8.2, 6.4), layout="constrained")
    world_sizes = sorted({row["tp"] for row in rows})
    markers = {p: _MARKERS[number % len(_MARKERS)] for number, p in enumerate(world_sizes)}
    for row in rows:
        colour = COLOURS[row["strategy"]]
        style = {"color": colour, "markerfacecolor": colour if row["pass"] == PASSES[0] else "none", "markersize": 7}
        axis.plot(row["ms_p50"], row["predicted_ms"], markers[row["tp"]], **style)
    times = [row[key] for row in rows for key in ("ms_p50", "predicted_ms")]
    ends = [min(times) / 1.5, max(times) * 1.5]
    (equal,) = axis.plot(ends, ends, color=_GREY, linewidth=1, zorder=0)
    within = axis.fill_between(ends, [t / 1.25 for t in ends], [t * 1.25 for t in ends], color="#eeeeee", zorder=-1)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axis.set(xlabel="measured, ms (p50)", ylabel="predicted, ms")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(lambda value, _: f"{value:g}")

    def point(marker: str, **style: Any) -> Any:
        return plt.Line2D([], [], marker=marker, linestyle="", color=_GREY, markersize=7, **style)

    present = {row["strategy"] for row in rows}
    handles = {
        **{NAMES[name]: _patch(plt, color=COLOURS[name]) for name in NAMES if name in present},
        **{f"P={p}": point(marker) for p, marker in markers.items()},
        "filled: forward": point("o"),
        "hollow: backward": point("o", markerfacecolor="none"),
        "predicted = measured": equal,
        "within a factor of 1.25": within,
    }
    style = {"loc": "outside right center", "frameon": False, "fontsize": 9, "labelspacing": 0.8}
    figure.legend(handles.values(), handles.keys(), **style)
    last = max(rows, key=lambda row: row["tp"])
    about = f"{', '.join(_shapes(rows))}; {last['activation']}, {last['dtype']}"
    _entitle(figure, f"Predicted beside measured time of a pass: {about}", last)
    return figure


PLOTS: dict[str, Callable[[Any, list[Row]], Any]] = {
    "strategy_time.png": _time,
    "strategy_bytes.png": _bytes,
    "strategy_scaling.png": _scaling,
    "strategy_predicted.png": _predicted,
}


def _shapes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _at_largest_p(rows: list[Row]) -> tuple[list[dict[str, dict[str, Row]]], dict[str, int]]:
    """Return for each shape the rows at the largest P by strategy and pass, and each strategy's place, the same in all
    panels."""
    most = max(row["tp"] for row in rows)
    panels: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["tp"] == most:
            panels.setdefault(row["shape"], {}).setdefault(row["strategy"], {})[row["pass"]] = row
    present = [name for name in NAMES if any(name in panel for panel in panels.values())]
    return [*panels.values()], {name: place for place, name in enumerate(present)}


def _first(panel: dict[str, dict[str, Row]]) -> Row:
    return next(iter(panel.values()))[PASSES[0]]


def _both(rows: list[Row], strategy: str, p: int) -> float | None:
    """Return ms of forward and backward together; None: not measured."""
    times = [row["ms_p50"] for row in rows if (row["strategy"], row["tp"]) == (strategy, p)]
    return sum(times) if times else None


def _patch(plt: Any, **style: Any) -> Any:
    return plt.Rectangle((0, 0), 1, 1, **style)


def _fit(axis: Any, bars: int, end: float) -> None:
    axis.set_ylim(bars - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, end)


def _label(axis: Any, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _explain(figure: Any, handles: dict[str, Any]) -> None:
    style = {"loc": "outside lower center", "ncols": len(handles), "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), **style)


def _entitle(figure: Any, title: str, row: Row | None = None) -> None:
    if row is not None:
        threads = f", {row['threads']} of {row['cores']} cores a rank" if row["device_type"] == "cpu" else ""
        title += f"\n{row['device']}{threads}, {tables.commit_of(row)}"
    figure.suptitle(title, fontsize=10)
