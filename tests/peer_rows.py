"""Make rows as bench/peers.py writes them: its schema's fields, with times that the caller chooses."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import environment
import report
from workloads import Shape

H100 = "NVIDIA H100 80GB HBM3"
CPU = "AMD EPYC 7B13"
US = {"eager": 20.0, "compile": 15.0, "nvmath": 9.5, "fused": 10.0}
ANALYSED = ("analysed", 1024, 1024, 1024)
DECODE = [(f"decode-{m}", m, 8192, 3584) for m in (1, 64)]
# In units of M·F/P elements: ours keeps pre_act, eager pre_act and act.
_KEPT = {"fused": 1, "nvmath": 1}


def point(
    us: Mapping[str, float],
    shape: tuple[str, int, int, int] = ANALYSED,
    *,
    mode: str = "fwd",
    run: str = "graph",
    l2: str = "cold",
    device: str = H100,
    dtype: str = "bf16",
    activation: str = "gelu",
    spread: float = 0.02,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Return the rows of one point.

    us       impl → µs of a step, p50
    shape    name, M, H, F/P
    spread   p20 and p80 of times and ratios lie this part of p50 below and above it
    fields   of every row, in place of what is made here
    """
    name, tokens, hidden, ffn = shape
    work = Shape(name, 1, tokens, hidden, ffn, 1)
    passes = work.pass_floors(mode, dtype, activation)
    flops, moved = (sum(column) for column in zip(*passes, strict=True))
    cuda = device.startswith("NVIDIA")
    rows = []
    for impl, t in us.items():
        ms = t / 1e3
        ratio = t / us["fused"] if "fused" in us else None
        ratios = [None] * 3 if ratio is None else [1.0] * 3 if impl == "fused" else _quantiles(ratio, spread)
        floor = environment.floor_ms(device, dtype, passes)
        error = 3e-3 * (1.05 if impl == "fused" else 1)
        tensors = ("y",) if mode == "fwd" else ("y", "dx", "dw1", "db1", "dw2", "db2")
        rows.append(
            {
                **{"impl": impl, "label": f"what {impl} is", "mode": mode, "shape": name},
                **{"regime": name.split("-")[0], "tokens": tokens, "hidden": hidden, "ffn_per_rank": ffn},
                **{"activation": activation, "dtype": dtype},
                **{"run": run if cuda else "eager", "l2": l2 if cuda else "as left", "iters": 50},
                **dict(zip(("ms_p20", "ms_p50", "ms_p80"), _quantiles(ms, spread), strict=True)),
                **dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), ratios, strict=True)),
                **{"tflops": flops / ms / 1e9, "flops": flops, "moved_bytes": moved},
                **{"roofline_pct": None if floor is None else 100 * floor / ms, "gb_per_s": moved / ms / 1e6},
                **{"errors": dict.fromkeys(tensors, error), "max_rel_err": error},
                "error_vs_eager": error / 3e-3 if "eager" in us else None,
                "saved_bytes": None if mode == "fwd" else 2 * tokens * ffn * _KEPT.get(impl, 2),
                "peak_mem_bytes": 1 << 20,
                **_surroundings(device, cuda),
                **fields,
            }
        )
    return rows


def _quantiles(value: float, spread: float) -> list[float]:
    return [value * (1 - spread), value, value * (1 + spread)]


def _surroundings(device: str, cuda: bool) -> dict[str, Any]:
    return {
        **{"device": device, "device_type": "cuda" if cuda else "cpu", "ranks": 1, "cores": 2, "threads": 2},
        **{"backend": "triton" if cuda else "torch", "collectives": None, "tpffn_triton": "0.1.0"},
        **{"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.3", "megatron_core": None, "python": "3.12.3"},
        **{"cuda": "13.0" if cuda else None, "os": "Linux x86_64", "commit": "0123456789ab"},
        **{"uncommitted_changes": False, "cuda_device_max_connections": None, "triton_interpret": False},
        **{"load_average": 0.5, "time_utc": "2026-11-28T00:00:00+00:00", "command": "bench/peers.py"},
        "versions": {"nvidia-nvmath-python": None},
    }


def write(path: Path, *points: list[dict[str, Any]]) -> Path:
    """Write points' rows as peers.py does, and return the path."""
    path.write_text(json.dumps([row for rows in points for row in rows]))
    return path


def reported(capsys: pytest.CaptureFixture, *arguments: object) -> SimpleNamespace:
    """Run bench/report.py in this process; returns its status, out and err."""
    try:
        status: object = report.main([*map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return SimpleNamespace(status=status, out=out, err=err)
