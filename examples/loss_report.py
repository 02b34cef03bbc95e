"""Show trainings that should be one: a table, a summary, a plot.

A step's row holds `step` and, for each training's name, `loss_{name}` and `ms_{name}`; with more than one training also
`difference`, the largest of a loss from that of the first."""

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

import tpffn_triton

STYLES = (("#aaccee", 6.0), ("#bb3344", 2.6), ("#222222", 0.9))  # colour and width of each training's line
WARM_UP = 5  # steps whose times are left out of the median


def header(names: list[str]) -> str:
    """Return the table's first line."""
    difference = ["difference"] if len(names) > 1 else []
    return "  step" + _cells([f"loss {name}" for name in names] + difference + [f"ms {name}" for name in names])


def line(rows: list[dict[str, float]], names: list[str]) -> str:
    """Return a line of the table: the losses of the last of these steps, and the median times of all of them."""
    last = rows[-1]
    losses = [f"{last[f'loss_{name}']:.6f}" for name in names]
    difference = [f"{last['difference']:.1e}"] if len(names) > 1 else []
    return f"{last['step']:6d}" + _cells(losses + difference + [f"{_median(rows, name):.1f}" for name in names])


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:>16}" for text in texts)


def _median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[f"ms_{name}"] for row in rows)


def summary(rows: list[dict[str, float]], names: list[str]) -> dict[str, Any]:
    """Return first and last losses, median times without the first steps, and the largest difference of losses."""
    timed = rows[WARM_UP:] or rows
    found: dict[str, Any] = {}
    for name in names:
        found |= {f"first_loss_{name}": rows[0][f"loss_{name}"], f"last_loss_{name}": rows[-1][f"loss_{name}"]}
        found[f"ms_{name}"] = _median(timed, name)
    if len(names) > 1:
        found["largest_difference"] = max(row["difference"] for row in rows)
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the figures were taken with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    found = {"device": name, "cores": os.cpu_count(), "python": platform.python_version(), "commit": _commit()}
    return found | {package: _version(package) for package in ("tpffn-triton", "megatron-core", "torch", "triton")}


def _commit() -> str | None:
    """Return this checkout's commit, marked where files have changed since; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    if package == "tpffn-triton":  # which may be a checkout on the path
        return tpffn_triton.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def plot(rows: list[dict[str, float]], titles: dict[str, str], title: str, path: Path, unit: str) -> None:
    """Draw the losses, and below them their difference beside one unit in the last place of an fp32 loss.

    titles    of the trainings, by name
    unit      of the loss
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    panels = 1 if len(titles) == 1 else 2
    figure, axes = plt.subplots(
        panels, 1, figsize=(7.5, 3.4 * panels), sharex=True, squeeze=False, layout="constrained"
    )
    upper = axes[0, 0]
    first, *_ = titles
    for number, (name, label) in enumerate(titles.items()):
        # Each lies on the one before: only a wide line shows under a narrow one.
        colour, width = STYLES[number % len(STYLES)]
        upper.plot(steps, [row[f"loss_{name}"] for row in rows], label=label, color=colour, linewidth=width)
    upper.set_ylabel(f"loss, {unit}")
    upper.legend(frameon=False)
    if panels == 2:
        lower = axes[1, 0]
        differences = torch.tensor([row["difference"] for row in rows], dtype=torch.float64)
        losses = torch.tensor([row[f"loss_{first}"] for row in rows], dtype=torch.float32)
        last_place = torch.nextafter(losses, losses * 2) - losses
        bottom = float(last_place.min()) / 4
        equal = differences == 0
        lower.plot(
            steps,
            last_place,
            color="#555555",
            linewidth=0.9,
            drawstyle="steps-mid",
            label="unit in the last place of the loss, fp32",
        )
        colour, _ = STYLES[1]
        label = "difference" if len(titles) == 2 else f"largest difference from {titles[first]}"
        lower.plot(steps, differences.masked_fill(equal, torch.nan), "o", markersize=3, color=colour, label=label)
        # A log axis has no 0: these stand on its lower end.
        lower.plot(
            [step for step, same in zip(steps, equal, strict=True) if same],
            [bottom] * int(equal.sum()),
            "|",
            color=colour,
            clip_on=False,
            label=f"equal ({int(equal.sum())} of {len(rows)} steps)",
        )
        lower.set_yscale("log")
        lower.set_ylim(bottom, 20 * float(max(differences.max(), last_place.max())))
        lower.set_ylabel("|difference of the losses|")
        lower.legend(frameon=False, loc="upper left")
    for axis in axes.flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
