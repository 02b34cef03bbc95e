"""Know what bench/tune.py has measured: per GPU, which configuration was fastest at a size, or torch's own GEMM.

A file is of one GPU and one version of Triton:

    {"schema": 1, "device": "NVIDIA ...", "arch": "sm_90", "triton": "3.6.0", "torch": "...", "date": "...",
     "commit": "...",
     "rows": [{"kernel": "linear", "arithmetic": "16bit", "rows": 4096, "cols": 8192, "inner": 3584,
               "config": {the fields of Config} or null: torch's GEMM (cuBLAS) is faster,
               "us": 11.3, "table_us": 12.0, "cublas_us": 11.5, "candidates": 14, "date": "...", "commit": "..."},
              ...]}

Files in the folder `tuned` beside this module are read when their GPU is first asked for; `load` adds one. A file that
does not fit is ignored, with a warning that says why: it can make a kernel slow or be refused, but never run anything.
"""

import json
import math
import re
import warnings
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from ._config import ARITHMETICS, KERNELS, Config

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "tuned"
# Sizes that differ by no more than this factor, each of the three, are about the same.
NEAR = math.sqrt(2)
TORCH_INSTEAD = ("linear", "dgrad", "wgrad")
_LIMITS = {
    "BLOCK_M": (16, 256),
    "BLOCK_N": (16, 256),
    "BLOCK_K": (16, 256),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
    "GROUP_M": (1, 64),
    "SPLIT_K": (1, 16),
    "PREFETCH_K": (0, 4096),
}
_POWERS_OF_TWO = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "SPLIT_K")
_loaded: dict[str, tuple["Measured", ...]] = {}


class Measured(NamedTuple):
    """What was fastest for a kernel at sizes (rows, cols, inner): a configuration, or None, torch's own GEMM."""

    kernel: str
    arithmetic: str
    sizes: tuple[int, int, int]
    config: Config | None
    origin: str


def file_of(device: str) -> Path:
    """Return where the measurements of a GPU of this name lie, whether or not there are any."""
    return FOLDER / (re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-") + ".json")


def read(path: Path) -> tuple[str, tuple[Measured, ...]]:
    """Return the name of the GPU, and what was measured on it.

    Raises: ValueError: not such a file, another version of Triton, or a value out of range (the message shows it).
    OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f'expected an object with "schema": {SCHEMA}')
    names: dict[str, Any] = {name: data.get(name) for name in ("device", "triton", "date")}
    if not all(isinstance(name, str) and len(name) < 200 for name in names.values()):
        raise ValueError(f"device, triton and date must be text, got {names}")
    if names["triton"].split(".")[:2] != triton.__version__.split(".")[:2]:
        raise ValueError(f"measured with triton {names['triton']}, this is {triton.__version__}")
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"rows must be a list, got {type(rows).__name__}")
    return names["device"], tuple(_measured(row, **names) for row in rows)


def _measured(row: Any, device: str, triton: str, date: str) -> Measured:
    try:
        kernel, arithmetic, config, us = (row[name] for name in ("kernel", "arithmetic", "config", "us"))
        sizes = tuple(row[name] for name in ("rows", "cols", "inner"))
        date = str(row.get("date", date))[:10]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"a row lacks a field: {str(row)[:200]}") from None
    if kernel not in KERNELS or arithmetic not in ARITHMETICS:
        raise ValueError(f"no kernel {str(kernel)[:40]!r} in arithmetic {str(arithmetic)[:40]!r}")
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise ValueError(f"sizes must be positive integers: {str(row)[:200]}")
    if type(us) not in (int, float) or not 0 < us < 1e9:
        raise ValueError(f"us must be a time in microseconds, got {us!r}")
    if config is None and kernel not in TORCH_INSTEAD:
        raise ValueError(f"torch has no {kernel}: config must not be null")
    by = "torch's GEMM, " if config is None else ""
    origin = f"{by}{us:.4g} µs at {'×'.join(map(str, sizes))} on {device}, {date}, triton {triton}"
    return Measured(kernel, arithmetic, sizes, None if config is None else _config(kernel, config, origin), origin)


def _config(kernel: str, values: Any, origin: str) -> Config:
    """Return the configuration. Raises: ValueError: a field missing, unknown, out of range or not of this kernel."""
    names = {field.name for field in fields(Config)} - {"origin"}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"config must have the fields {', '.join(sorted(names))}, got {str(values)[:200]}")
    for name, value in values.items():
        low, high = _LIMITS.get(name, (False, True))
        if type(value) is not type(low) or not low <= value <= high:
            raise ValueError(f"{name} must be {type(low).__name__} from {low} to {high}, got {value!r}")
        if name in _POWERS_OF_TWO and value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    config, few = Config(**values, origin=origin), kernel.endswith("few_tokens")
    wrong = {
        "SPLIT_K and PREFETCH_K are of few_tokens": not few and (config.SPLIT_K, config.PREFETCH_K) != (1, 0),
        "few_tokens takes BLOCK_M up to 64, PREFETCH_K 0 or a power of two from 64 on": few
        and (config.BLOCK_M > 64 or config.PREFETCH_K & (config.PREFETCH_K - 1) or 0 < config.PREFETCH_K < 64),
        "it has no split epilogue": config.SPLIT_EPILOGUE and (few or kernel in ("gated_ffn", "gated_linear_act")),
        "BLOCK_M must be a multiple of 32": kernel.endswith("linear_dact") and config.BLOCK_M % 32,
    }
    for rule, broken in wrong.items():
        if broken:
            raise ValueError(f"{kernel}: {rule}, got {config.meta}")
    return config


def load(path: Path) -> str:
    """Add a file's measurements to those that there are of its GPU; of two at the same sizes the newer counts. Returns
    the GPU's name.

    Raises: ValueError, OSError: as `read`.
    """
    device, rows = read(path)
    _loaded[device] = (*rows, *_of(device))
    nearest.cache_clear()
    return device


def _of(device: str) -> tuple[Measured, ...]:
    if device not in _loaded:
        _loaded[device] = _shipped(device)
    return _loaded[device]


def _shipped(device: str) -> tuple[Measured, ...]:
    path = file_of(device)
    if not path.exists():
        return ()
    try:
        name, rows = read(path)
        if name != device:
            raise ValueError(f"measured on {name!r}, this is {device!r}")
    except (ValueError, OSError) as error:
        warnings.warn(f"{path.name} is ignored, the tables choose: {error}", stacklevel=2)
        return ()
    return rows


@lru_cache(maxsize=4096)
def nearest(device: str, kernel: str, arithmetic: str, sizes: tuple[int, int, int]) -> Measured | None:
    """Return what was measured for a kernel on a GPU at the sizes nearest to these, if each is within a factor NEAR."""
    found, least = None, math.log(NEAR) + 1e-9
    for measured in _of(device) if min(sizes) > 0 else ():
        if (measured.kernel, measured.arithmetic) == (kernel, arithmetic):
            apart = max(abs(math.log(a / b)) for a, b in zip(sizes, measured.sizes, strict=True))
            if apart <= least and (found is None or apart < least):
                found, least = measured, apart
    return found
