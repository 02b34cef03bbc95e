"""Draw timelines: one panel an order of exchanges, computation above collectives."""

from pathlib import Path
from typing import Any

import figures

_COMPUTE = {"linear_dact": "#4477aa", "dgrad": "#66ccee", "wgrad": "#228833", "weight_grads": "#228833"}
_COMPUTE |= {"column_sum": "#ccbb44"}
_OTHER, _COLLECTIVE = "#bbbbbb", "#ee6677"


def plot(timelines: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    """Write the figure to path; its suffix (.png, .pdf, .svg) chooses the format."""
    plt = figures.pyplot()
    figure, axes = plt.subplots(
        len(timelines), 1, figsize=(9, 1.3 * len(timelines) + 1.4), sharex=True, squeeze=False, layout="constrained"
    )
    lanes = {"compute": 0, "collective": 1}
    handles: dict[str, Any] = {}
    for axis, (name, timeline) in zip(axes.flat, timelines.items(), strict=True):
        for what, lane, begin, end in timeline["spans"]:
            kind = "collective" if lane == "collective" else _kind(what)
            color = _COLLECTIVE if lane == "collective" else _COMPUTE.get(kind, _OTHER)
            # Collectives in flight together share the lane.
            bar = axis.barh(lanes[lane], end - begin, 0.7, left=begin, color=color, alpha=0.75, edgecolor="white")
            handles.setdefault(kind, bar)
        axis.set_yticks([*lanes.values()], [*lanes])
        axis.set_ylim(1.5, -0.5)
        axis.set_title(
            f"{name}: {timeline['beside_wgrad_ms']:.1f} of {timeline['collective_ms']:.1f} ms of collectives beside "
            "weight gradients",
            fontsize=9,
            loc="left",
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"One backward of rank 0, P={about['ranks']} ({about['collectives']}), {about['dtype']}\n"
        f"{about['shape']} on {about['device']}, commit {about['commit']}",
        fontsize=10,
    )
    figures.write(figure, path)


def _kind(name: str) -> str:
    return next((kind for kind in _COMPUTE if kind in name), "other")
