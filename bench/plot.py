"""Draw latency by implementation: one panel a shape, dtype and mode; bars are p50, whiskers p20 to p80."""

from itertools import groupby
from pathlib import Path
from typing import Any

import figures
from tables import Row

_COLUMNS = 3
_COMPUTE, _COMMUNICATION = "#4477aa", "#ee6677"


def plot(rows: list[Row], path: Path) -> None:
    """Write the figure to path; its suffix (.png, .pdf, .svg) chooses the format."""
    plt = figures.pyplot()
    panels = [list(group) for _, group in groupby(rows, key=lambda r: (r["shape"], r["dtype"], r["mode"]))]
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.6 * lines + 1.2), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figures.legend(figure, axes.flat, ncols=3)
    first = rows[0]
    commit = f"\ncommit {first['commit']}" if first["commit"] else ""
    figure.suptitle(f"Tensor-parallel FFN on {first['device']}{commit}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.write(figure, path)


def _panel(axis: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        p50, comm = row["ms_p50"], row["comm_ms"] or 0
        label = "compute" if row["comm_ms"] is not None else "step"
        axis.bar(place, p50 - comm, 0.6, color=_COMPUTE, label=label)
        if comm:
            axis.bar(place, comm, 0.6, bottom=p50 - comm, color=_COMMUNICATION, label="exposed communication")
        spread = [[max(0, p50 - row["ms_p20"])], [max(0, row["ms_p80"] - p50)]]
        axis.errorbar(place, p50, yerr=spread, color="black", capsize=4, linewidth=1)
        speedup = row["speedup_vs_unfused"]
        text = f"{p50:.3g} ms" + ("" if speedup is None or row["impl"] == "unfused" else f"\n{speedup:.2f}×")
        axis.annotate(
            text,
            (place, max(p50, row["ms_p80"])),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    first = rows[0]
    where = f"P={first['tp']}" if first["communication_included"] else f"one shard of P={first['tp']}, no communication"
    mode = {"fwd": "forward", "fwd_bwd": "forward + backward"}[first["mode"]]
    axis.set_title(
        f"{first['shape']}, {first['activation']}, {first['dtype']}, {mode}\n"
        f"B={first['batch']} S={first['seq']} H={first['hidden']} F={first['ffn']}, {where}",
        fontsize=10,
    )
    # A line a word: five names side by side do not fit.
    axis.set_xticks(range(len(rows)), [row["impl"].replace("-", "-\n") for row in rows])
    axis.set_ylabel("ms a step")
    axis.set_ylim(0, 1.22 * max(row["ms_p80"] for row in rows))
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
