"""Say where a measurement was taken: device, versions, commit, threads; and what the device could do at best.

`CEILINGS` lists devices by the exact name that torch reports, so that a slice of a GPU has no ceiling:
    tflops     dense, no structured sparsity, by dtype
    tb_per_s   device memory, reads plus writes
"""

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import checkout
import torch
import triton
from ranks import Rank, cores

import tpffn_triton


@dataclass(frozen=True)
class Ceiling:
    """What a device reaches at best, and the source of the figures."""

    tflops: dict[str, float]
    tb_per_s: float
    source: str


def _ceiling(sixteen_bit: float, tf32: float, fp32: float, tb_per_s: float, source: str) -> Ceiling:
    return Ceiling({"bf16": sixteen_bit, "fp16": sixteen_bit, "tf32": tf32, "fp32": fp32}, tb_per_s, source)


_MEASURED = "bf16 and memory measured (8192³ product on random data, device-to-device copy), tf32 and fp32 datasheet"
CEILINGS = {
    "NVIDIA H100 80GB HBM3": _ceiling(800, 494, 67, 3.0, _MEASURED),
    "NVIDIA H200": _ceiling(790, 494, 67, 4.3, _MEASURED),
    "NVIDIA H100 PCIe": _ceiling(756, 378, 51, 2.0, "datasheet"),
    "NVIDIA A100-SXM4-80GB": _ceiling(312, 156, 19.5, 2.04, "datasheet"),
    "NVIDIA A100-SXM4-40GB": _ceiling(312, 156, 19.5, 1.56, "datasheet"),
    "NVIDIA A100 80GB PCIe": _ceiling(312, 156, 19.5, 1.94, "datasheet"),
    "NVIDIA A100-PCIE-40GB": _ceiling(312, 156, 19.5, 1.56, "datasheet"),
    "NVIDIA B200": _ceiling(2250, 1100, 80, 8.0, "datasheet, 1000 W"),
}


def ceiling(device: str) -> Ceiling | None:
    """Return the ceiling of the device of this name, None where it is unknown."""
    return CEILINGS.get(device)


def floor_ms(device: str, dtype: str, passes: list[tuple[int, int]]) -> float | None:
    """Return the least time for passes of (FLOPs, bytes): the slower of arithmetic and memory, summed."""
    best = ceiling(device)
    if best is None:
        return None
    return sum(max(flops / best.tflops[dtype] / 1e9, moved / best.tb_per_s / 1e9) for flops, moved in passes)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(checkout.ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(rank: Rank) -> dict[str, Any]:
    """Return the environment's fields of a row."""
    changed = _git("status", "--porcelain")
    return {
        "device": device_name(rank.device),
        "device_type": rank.device.type,
        "ranks": rank.world_size,
        "cores": cores(),
        "threads": rank.threads,
        "backend": tpffn_triton.backend(rank.device),
        "collectives": None if rank.group is None else torch.distributed.get_backend(rank.group),
        "tpffn_triton": tpffn_triton.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "triton_interpret": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
