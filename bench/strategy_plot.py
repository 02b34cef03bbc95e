"""Draw strategy_bench.py's rows: time, bytes, scaling, prediction; a panel a shape, a colour a strategy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from strategy_report import Row, shape_of, where

NAMES = {
    "unsplit": "unsplit",
    "column_row": "column→row",
    "column_row_sequence_parallel": "column→row,\nsequence-parallel",
    "row_row": "row→row",
    "column_column": "column→column",
    "row_column": "row→column",
}
# Paul Tol's "bright" scheme: told apart with any colour vision.
COLOURS = {
    "unsplit": "#555555",
    "column_row": "#4477aa",
    "column_row_sequence_parallel": "#66ccee",
    "row_row": "#228833",
    "column_column": "#ccbb44",
    "row_column": "#ee6677",
}
_MARKERS = "osD^vPX"
_GREY, _HATCH, _PALE = "#888888", "////", 0.35
PASSES = ("forward", "backward")


def plot(rows: list[Row], paths: Sequence[Path]) -> None:
    """Write to each path the plot that its name, one of PLOTS, asks for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}):
        for path in paths:
            figure = PLOTS[path.name](plt, rows)
            figure.savefig(path, dpi=150)
            plt.close(figure)


def _time(plt: Any, rows: list[Row]) -> Any:
    rows, shapes = _at_largest_p(rows)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes) + 1.8, 6.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, shape in zip(axes.flat, shapes, strict=True):
        panel = _by_strategy(rows, shape)
        ticks: dict[float, str] = {}
        for place, (name, passes) in enumerate(panel.items()):
            for offset, pass_ in zip((-0.2, 0.2), PASSES, strict=True):
                row, at = passes[pass_], place + offset
                p50, exposed, colour = row["ms_p50"], row["exposed_ms"], COLOURS[name]
                axis.barh(at, p50 - exposed, 0.36, color=colour)
                axis.barh(at, exposed, 0.36, left=p50 - exposed, color="white", edgecolor=colour, hatch=_HATCH)
                spread = [[max(0.0, p50 - row["ms_p20"])], [max(0.0, row["ms_p80"] - p50)]]
                axis.errorbar(p50, at, xerr=spread, color="black", capsize=3, linewidth=1)
                _label(axis, max(p50, row["ms_p80"]), at, f"{p50:.3g}")
                ticks[at] = f"{NAMES[name]}  {pass_}" if offset < 0 else pass_
        axis.set_yticks([*ticks], [*ticks.values()])
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_xlim(0, 1.16 * max(row["ms_p80"] for passes in panel.values() for row in passes.values()))
        axis.set_title(shape_of(panel[next(iter(panel))]["forward"]), fontsize=10)
        axis.set_xlabel("ms")
        axis.tick_params(axis="y", length=0)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=_GREY),
        plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=_GREY, hatch=_HATCH),
        plt.errorbar([], [], xerr=[], color="black", capsize=3, linewidth=1),
    ]
    labels = [
        "compute",
        "exposed communication, on the rank that waits longest",
        "p20 to p80 over rounds, slowest rank",
    ]
    _finish(figure, rows[0], "Time of one pass by partitioning: p50", handles, labels)
    return figure


def _bytes(plt: Any, rows: list[Row]) -> Any:
    rows, shapes = _at_largest_p(rows)
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(4.2 * len(shapes) + 1.8, 7), squeeze=False, sharey=True, layout="constrained"
    )
    for (sent, saved), shape in zip(axes.T, shapes, strict=True):
        panel = _by_strategy(rows, shape)
        for place, (name, passes) in enumerate(panel.items()):
            forward, backward = (passes[pass_]["sent_bytes"] / 2**20 for pass_ in PASSES)
            sent.barh(place, forward, 0.6, color=COLOURS[name])
            sent.barh(place, backward, 0.6, left=forward, color=COLOURS[name], alpha=_PALE)
            _label(sent, forward + backward, place, f"{forward:.4g} + {backward:.4g}")
            kept = passes["forward"]["saved_bytes"] / 2**20
            saved.barh(place, kept, 0.6, color=COLOURS[name])
            _label(saved, kept, place, f"{kept:.4g}")
        for axis, about in ((sent, "MiB sent by all ranks"), (saved, "MiB kept for backward by each rank")):
            axis.set_yticks(range(len(panel)), [NAMES[name] for name in panel])
            axis.set_ylim(len(panel) - 0.5, -0.5)
            axis.set_xlim(0, 1.32 * max(bar.get_x() + bar.get_width() for bar in axis.patches))
            axis.set_xlabel(about)
            axis.tick_params(axis="y", length=0)
        sent.set_title(shape_of(panel[next(iter(panel))]["forward"]), fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=_GREY), plt.Rectangle((0, 0), 1, 1, color=_GREY, alpha=_PALE)]
    _finish(figure, rows[0], "Planned bytes by partitioning", handles, ["sent in forward", "sent in backward"])
    return figure


def _scaling(plt: Any, rows: list[Row]) -> Any:
    shapes = _shapes(rows)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes) + 0.6, 5), squeeze=False, sharey=True, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, shape in zip(axes.flat, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        world_sizes = sorted({row["tp"] for row in own})
        base = _both(own, "unsplit", 1)
        if base is None:
            axis.set_title(f"{shape_of(own[0])}\nnot measured at P=1", fontsize=10)
            continue
        ideal = [_ideal(next(row for row in own if row["tp"] == p)) for p in world_sizes]
        (handles["ideal"],) = axis.plot(world_sizes, ideal, "--", color=_GREY, linewidth=1)
        for name in NAMES:
            points = [(p, _both(own, name, p)) for p in world_sizes if p > 1]
            reached = [(1, 1.0)] + [(p, base / ms) for p, ms in points if ms is not None]
            if len(reached) > 1:
                (handles[NAMES[name]],) = axis.plot(
                    *zip(*reached, strict=True), "o-", color=COLOURS[name], markersize=5
                )
        axis.set_title(shape_of(own[0]), fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(world_sizes, [str(p) for p in world_sizes])
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.set_ylim(0)
        axis.set_xlabel("ranks P")
        axis.grid(color="#e5e5e5", linewidth=0.6)
    axes[0, 0].set_ylabel("speed-up over P=1")
    last = max(rows, key=lambda row: row["tp"])
    _finish(figure, last, "Forward + backward against one rank", [*handles.values()], [*handles])
    return figure


def _ideal(row: Row) -> float:
    """What P ranks could gain over one of as many threads, on a GPU over one GPU."""
    if row["device_type"] == "cuda":
        return row["tp"]
    return min(row["tp"], max(1.0, row["cores"] / row["threads"]))


def _predicted(plt: Any, rows: list[Row]) -> Any:
    figure, axis = plt.subplots(figsize=(8.6, 6), layout="constrained")
    world_sizes = sorted({row["tp"] for row in rows})
    markers = dict(zip(world_sizes, _MARKERS * len(world_sizes), strict=False))
    for row in rows:
        colour = COLOURS[row["strategy"]]
        filled = colour if row["pass"] == "forward" else "none"
        axis.plot(
            row["ms_p50"],
            row["predicted_ms"],
            markers[row["tp"]],
            color=colour,
            markerfacecolor=filled,
            markersize=7,
            alpha=0.9,
        )
    times = [row[key] for row in rows for key in ("ms_p50", "predicted_ms")]
    ends = [min(times) / 1.5, max(times) * 1.5]
    (equal,) = axis.plot(ends, ends, color=_GREY, linewidth=1, zorder=0)
    within = axis.fill_between(ends, [t / 1.25 for t in ends], [t * 1.25 for t in ends], color="#eeeeee", zorder=-1)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axis.set_xlabel("measured, ms (p50)")
    axis.set_ylabel("predicted, ms")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(lambda value, _: f"{value:g}")
    present = [name for name in NAMES if any(row["strategy"] == name for row in rows)]
    line = plt.Line2D
    key = {
        **{NAMES[name]: plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in present},
        **{f"P={p}": line([], [], marker=m, linestyle="", color=_GREY, markersize=7) for p, m in markers.items()},
        "filled: forward": line([], [], marker="o", linestyle="", color=_GREY, markersize=7),
        "hollow: backward": line([], [], marker="o", linestyle="", color=_GREY, markerfacecolor="none", markersize=7),
        "predicted = measured": equal,
        "within a factor of 1.25": within,
    }
    figure.legend(key.values(), key.keys(), loc="outside right center", frameon=False, fontsize=9, labelspacing=0.8)
    shapes = ", ".join(_shapes(rows))
    figure.suptitle(f"Predicted and measured time of a pass: {shapes}\n{_device(rows[-1])}", fontsize=10)
    return figure


PLOTS: dict[str, Callable[[Any, list[Row]], Any]] = {
    "strategy_time.png": _time,
    "strategy_bytes.png": _bytes,
    "strategy_scaling.png": _scaling,
    "strategy_predicted.png": _predicted,
}


def _shapes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _at_largest_p(rows: list[Row]) -> tuple[list[Row], list[str]]:
    most = max(row["tp"] for row in rows)
    chosen = [row for row in rows if row["tp"] == most]
    return chosen, _shapes(chosen)


def _by_strategy(rows: list[Row], shape: str) -> dict[str, dict[str, Row]]:
    own: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["shape"] == shape:
            own.setdefault(row["strategy"], {})[row["pass"]] = row
    return {name: own[name] for name in NAMES if name in own}


def _both(rows: list[Row], strategy: str, p: int) -> float | None:
    """Return ms of forward and backward together; None: not measured."""
    times = [row["ms_p50"] for row in rows if (row["strategy"], row["tp"]) == (strategy, p)]
    return sum(times) if times else None


def _label(axis: Any, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _device(row: Row) -> str:
    commit = f", commit {row['commit']}" if row["commit"] else ""
    threads = f", {row['threads']} of {row['cores']} cores a rank" if row["device_type"] == "cpu" else ""
    return f"{row['device']}{threads}{commit}"


def _finish(figure: Any, row: Row, title: str, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{title}, {where(row)}\n{_device(row)}", fontsize=10)
