"""Show two trainings that should be one: a table, a JSON file, a plot."""

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

TITLES = {"megatron": "Megatron's MLP", "fused": "FusedMLP"}
WARM_UP = 5  # steps whose times are left out of the median


def header(names: list[str]) -> str:
    """Return the table's first line."""
    difference = ["difference"] if len(names) == 2 else []
    return "  step" + _cells([f"loss {name}" for name in names] + difference + [f"ms {name}" for name in names])


def line(rows: list[dict[str, float]], names: list[str]) -> str:
    """Return a line of the table: the losses of the last of these steps, and the median times of all of them."""
    last = rows[-1]
    losses = [f"{last[f'loss_{name}']:.6f}" for name in names]
    difference = [f"{last['difference']:.1e}"] if len(names) == 2 else []
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
    if len(names) == 2:
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


def plot(rows: list[dict[str, float]], names: list[str], title: str, path: Path) -> None:
    """Draw the losses, and below them their difference beside one unit in the last place of an fp32 loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    panels = len(names)
    figure, axes = plt.subplots(
        panels, 1, figsize=(7.5, 3.4 * panels), sharex=True, squeeze=False, layout="constrained"
    )
    # The second lies on the first: only a wide line shows under a narrow one.
    styles: dict[str, Any] = {
        "megatron": {"color": "#aaccee", "linewidth": 5},
        "fused": {"color": "#bb3344", "linewidth": 1.2},
    }
    upper = axes[0, 0]
    for name in names:
        upper.plot(steps, [row[f"loss_{name}"] for row in rows], label=TITLES[name], **styles[name])
    upper.set_ylabel("loss, nats a byte")
    upper.legend(frameon=False)
    if panels == 2:
        lower = axes[1, 0]
        differences = torch.tensor([row["difference"] for row in rows], dtype=torch.float64)
        losses = torch.tensor([row["loss_megatron"] for row in rows], dtype=torch.float32)
        unit = torch.nextafter(losses, losses * 2) - losses
        bottom = float(unit.min()) / 4
        equal = differences == 0
        lower.plot(
            steps,
            unit,
            color="#555555",
            linewidth=0.9,
            drawstyle="steps-mid",
            label="unit in the last place of the loss, fp32",
        )
        colour = styles["fused"]["color"]
        lower.plot(
            steps, differences.masked_fill(equal, torch.nan), "o", markersize=3, color=colour, label="difference"
        )
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
        lower.set_ylim(bottom, 20 * float(max(differences.max(), unit.max())))
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
