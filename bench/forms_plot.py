"""Draw time by tokens: one panel a mode, a line a way; p50, and p20 to p80 as a band."""

from itertools import groupby
from pathlib import Path
from typing import Any

import figures
from tables import Row

_COLORS = {
    "unfused": "#222222",
    "few tokens": "#aa3377",
    "single launch": "#4477aa",
    "dependent launches": "#228833",
    "two launches": "#ee6677",
}
_TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def plot(rows: list[Row], path: Path) -> None:
    """Write the figure to path; its suffix (.png, .pdf, .svg) chooses the format."""
    plt = figures.pyplot()
    by_mode = {mode: [*group] for mode, group in groupby(sorted(rows, key=_mode), key=_mode)}
    figure, axes = plt.subplots(1, len(by_mode), figsize=(5.2 * len(by_mode), 4.6), squeeze=False, layout="constrained")
    for axis, (mode, of_mode) in zip(axes.flat, by_mode.items(), strict=True):
        _panel(axis, of_mode)
        axis.set_title(_TITLES[mode], fontsize=10)
    figures.legend(figure, axes.flat, ncols=2, fontsize=8)
    first = rows[0]
    interpreted = ", INTERPRETED: these times mean nothing" if first["triton_interpret"] else ""
    how = f"{', graph' if first['graph'] else ''}, L2 {'warm' if first['warm_l2'] else 'cold'}"
    figure.suptitle(
        f"One shard, H={first['hidden']} F/P={first['ffn_per_rank']}, {first['activation']}, {first['dtype']}"
        f"{how if first['device_type'] == 'cuda' else interpreted}\n{first['device']}, commit {first['commit']}",
        fontsize=10,
    )
    figures.write(figure, path)


def _mode(row: Row) -> str:
    return row["mode"]


def _panel(axis: Any, rows: list[Row]) -> None:
    ways = dict.fromkeys((row["form"], row["gradients"]) for row in rows)
    for form, gradients in ways:
        line = [row for row in rows if (row["form"], row["gradients"]) == (form, gradients)]
        tokens = [row["tokens"] for row in line]
        p20, p50, p80 = ([1e3 * row[f"ms_p{p}"] for row in line] for p in (20, 50, 80))
        style = "--" if gradients == "a launch each" else "-"
        label = form if gradients is None else f"{form}, gradients {gradients}"
        axis.plot(tokens, p50, style, color=_COLORS[form], marker=".", label=label)
        axis.fill_between(tokens, p20, p80, color=_COLORS[form], alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted({row["tokens"] for row in rows}), sorted({row["tokens"] for row in rows}))
    axis.set_xlabel("tokens")
    axis.set_ylabel("µs a step")
    axis.spines[["top", "right"]].set_visible(False)
