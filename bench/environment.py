"""Say where a measurement was taken: device, versions, commit, threads; and what the device could do at best.

The ceilings, dense TFLOP/s and TB/s of memory, are tpffn_triton/presets.py's.
"""

import datetime
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import checkout
import torch
import triton
from ranks import Rank, cores

import tpffn_triton
from tpffn_triton.machines import Compute
from tpffn_triton.presets import GPUS


def ceiling(device: str) -> Compute | None:
    """Return what the device of this name reaches at best, None where it is unknown."""
    return GPUS.get(device)


def floor_ms(device: str, dtype: str, passes: list[tuple[int, int]]) -> float | None:
    """Return the least time for passes of (FLOPs, bytes): the slower of arithmetic and memory, summed."""
    best = ceiling(device)
    if best is None:
        return None
    return sum(max(flops / best.rate(dtype) / 1e9, moved / best.tb_per_s / 1e9) for flops, moved in passes)


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


def uncommitted_changes() -> list[str] | None:
    """Return the changed files, a line each as `git status --porcelain` has them; None: not in a git checkout."""
    changed = _git("status", "--porcelain")
    return None if changed is None else changed.splitlines()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _megatron_core() -> str | None:
    # What is imported may lie in a folder on PYTHONPATH, before what is installed.
    core = sys.modules.get("megatron.core")
    return _version("megatron-core") if core is None else core.__version__


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return package → its version, None where it is not installed; of megatron-core the one that is imported."""
    return {package: _megatron_core() if package == "megatron-core" else _version(package) for package in packages}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def kernels_digest() -> str:
    """Return a digest of the kernels' sources, which may be changed without a commit."""
    return _digest((checkout.ROOT / "kernels").glob("*.py"))


def tuned_digest() -> str | None:
    """Return a digest of what bench/tune.py has written, which decides what is launched; None: nothing."""
    paths = [*(checkout.ROOT / "kernels" / "tuned").glob("*.json")]
    return _digest(paths) if paths else None


def describe(rank: Rank) -> dict[str, Any]:
    """Return the environment's fields of a row."""
    changed = uncommitted_changes()
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
        "megatron_core": _megatron_core(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "os": f"{platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "cuda_device_max_connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "triton_interpret": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
