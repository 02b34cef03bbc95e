"""Draw collectives: measured points with p20 to p80, and the fitted lines, a panel a kind."""

from itertools import groupby
from pathlib import Path
from typing import Any

import figures

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the figure to path; its suffix chooses the format."""
    plt = figures.pyplot()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(3.9 * len(kinds) + 0.6, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes.flat, kinds, strict=True):
        chosen = sorted((row for row in rows if row["kind"] == kind), key=lambda row: (row["world_size"], row["bytes"]))
        for colour, (p, group) in zip(_COLOURS, groupby(chosen, key=lambda row: row["world_size"]), strict=False):
            points = list(group)
            sizes, times = [row["bytes"] for row in points], [row["us_p50"] for row in points]
            spread = [
                [max(0.0, row["us_p50"] - row["us_p20"]) for row in points],
                [max(0.0, row["us_p80"] - row["us_p50"]) for row in points],
            ]
            axis.errorbar(
                sizes, times, yerr=spread, fmt="o", markersize=4, capsize=3, color=colour, label=f"P={p}, measured"
            )
            axis.plot(sizes, [row["us_fitted"] for row in points], color=colour, label=f"P={p}, fitted α + bytes/β")
        axis.set_xscale("log", base=16)
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.set_yscale("log")
        axis.set_title(kind.replace("_", "-"), fontsize=10)
        axis.set_xlabel("bytes of the full tensor")
        axis.xaxis.set_major_formatter(lambda size, _: _human(size))
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set_ylabel("µs")
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figures.write(figure, path)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:g} {unit}"
        size /= 1024
    return f"{size:g} GiB"
