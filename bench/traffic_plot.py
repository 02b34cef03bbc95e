"""Draw planned beside measured bytes: grouped bars by case, a panel for each P."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import figures

_BARS = (
    ("planned_bytes", "planned: the ring's tensor bytes", "#bbbbbb"),
    ("tcp_bytes", "sent: TCP payload of all ranks", "#4477aa"),
    ("wire_bytes", "on the wire: IP packets on loopback", "#ee6677"),
)
_HEIGHT = 0.27


def plot(rows: list[dict[str, Any]], title: Callable[[dict[str, Any]], str], path: Path) -> None:
    """Write the figure to path; its suffix (.png, .pdf, .svg) chooses the format. title: names a row's bars."""
    plt = figures.pyplot()
    panels = [list(group) for _, group in groupby((r for r in rows if r["planned"]), key=lambda r: r["tp"])]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.2 * len(panels) + 2.5, 0.42 * len(panels[0]) + 1.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        for number, (key, label, color) in enumerate(_BARS):
            places = [place + (number - 1) * _HEIGHT for place in range(len(panel))]
            axis.barh(places, [row[key] / 2**20 for row in panel], _HEIGHT, label=label, color=color)
        for place, row in enumerate(panel):
            longest = max(row[key] for key, _, _ in _BARS) / 2**20
            axis.annotate(
                f"{row['ratio']:.3f}×", (longest, place), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(range(len(panel)), [title(row) for row in panel], fontsize=8)
        axis.set_xlabel("MiB a call, all ranks; ×: sent over planned")
        axis.set_title(f"P={panel[0]['tp']}", fontsize=10)
        axis.margins(x=0.15, y=0.01)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    first = rows[0]
    figure.suptitle(
        f"Bytes over {first['collectives']}: B={first['batch']} S={first['seq']} H={first['hidden']} F={first['ffn']}, "
        f"{first['dtype']}, {first['activation']}, commit {first['commit']}",
        fontsize=10,
    )
    figures.write(figure, path)
