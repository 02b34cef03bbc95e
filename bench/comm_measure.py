"""Measure on one rank what the cost model wants to know of a machine, with every rank busy at the same time.

    collectives   all_reduce, all_gather and reduce_scatter of fp32, the raw ones that ffn() is made of, over message
                  sizes: bytes of the full tensor. Not with one rank
    GEMMs         the package's linear, dgrad and wgrad on cubes, by dtype
    memory        a copy far larger than any cache; bytes read plus bytes written
    overlap       a GEMM and an all-reduce that takes about as long: alone, and at the same time; each round's share of
                  the shorter one that disappears

Times are µs of one call: a loop of calls between barriers, the slowest rank's; quantiles over rounds in which the sizes
take turns.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import environment
import numpy as np
import torch
from ranks import Rank
from timing import rotated
from torch import Tensor
from workloads import DTYPES

from tpffn_triton import collectives, ops
from tpffn_triton.machines import ALGORITHMS

KINDS = (*ALGORITHMS,)
# What to call, and how often in a loop.
Jobs = dict[Any, tuple[Callable[[], object], int]]


@dataclass(frozen=True)
class Settings:
    """What to measure: bytes of each message, side lengths and dtypes of the GEMMs' cubes, the dtype of the one that an
    all-reduce runs beside, bytes to copy, rounds."""

    sizes: tuple[int, ...]
    cubes: tuple[int, ...]
    dtypes: tuple[str, ...]
    overlapped_dtype: str
    copied: int
    rounds: int
    command: str


def measure(rank: Rank, settings: Settings) -> dict[str, Any]:
    """Return {"rows": ..., "gemms": ..., "tb_per_s": ..., "overlap": ..., "environment": ...}."""
    torch.set_grad_enabled(False)
    rows = [] if rank.group is None else _collectives(rank, settings)
    gemms = _gemms(rank, settings)
    alone = dict.fromkeys(("p20", "p50", "p80"), 1.0)
    return {
        "rows": rows,
        "gemms": gemms,
        "tb_per_s": _copy_tb_per_s(rank, settings),
        "overlap": alone if rank.group is None else _overlap(rank, settings, rows, gemms),
        "environment": environment.describe(rank) | {"command": settings.command},
    }


def microseconds(rank: Rank, call: Callable[[], object], calls: int = 1) -> float:
    """Return the slowest rank's time of one of `calls` calls."""
    rank.barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    (elapsed,) = rank.maxima([time.perf_counter() - begin])
    return elapsed / calls * 1e6


def interleaved(rank: Rank, jobs: Jobs, rounds: int) -> dict[Any, list[float]]:
    """Time every job once a round, after a round of warm-up."""
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name in rotated([*jobs], number):
            call, calls = jobs[name]
            us = microseconds(rank, call, calls)
            if number:
                times[name].append(us)
    return times


def collective(kind: str, t: Tensor, rank: Rank) -> Callable[[], Tensor]:
    """Return a call of one collective whose full tensor is t [elements]; an all-reduce is in place."""
    group = rank.group
    assert group is not None
    own = t[: t.numel() // rank.world_size].contiguous()
    return {
        "all_reduce": lambda: collectives.all_reduce(t, group),
        "all_gather": lambda: collectives.all_gather(own, group),
        "reduce_scatter": lambda: collectives.reduce_scatter(t, group),
    }[kind]


def _collectives(rank: Rank, settings: Settings) -> list[dict[str, Any]]:
    rank.say(f"P={rank.world_size}: {', '.join(KINDS)} of {settings.sizes[0]} to {settings.sizes[-1]} bytes")
    whole = 4 * rank.world_size
    sizes = [max(whole, size // whole * whole) for size in settings.sizes]
    cuda = rank.device.type == "cuda"
    jobs: Jobs = {}
    for nbytes in sizes:
        t = torch.zeros(nbytes // 4, device=rank.device)
        # Small ones in loops: a loop of one would measure the barrier's skew, on a GPU the host's launch.
        calls = max(1, min(20, (80 << 20) // nbytes) if cuda else min(10, (1 << 20) // nbytes))
        for kind in KINDS:
            jobs[kind, nbytes] = (collective(kind, t, rank), calls)
    times = interleaved(rank, jobs, settings.rounds)
    rows = []
    for kind, nbytes in sorted(times):
        p20, p50, p80 = np.quantile(times[kind, nbytes], (0.2, 0.5, 0.8)).tolist()
        row = {"kind": kind, "world_size": rank.world_size, "bytes": nbytes}
        rows.append(row | {"us_p20": p20, "us_p50": p50, "us_p80": p80, "rounds": settings.rounds})
    return rows


def _gemms(rank: Rank, settings: Settings) -> list[dict[str, Any]]:
    rank.say(f"P={rank.world_size}: GEMMs, memory and overlap")
    jobs: Jobs = {}
    for dtype in settings.dtypes:
        for side in settings.cubes:
            a, b = (torch.randn(side, side, device=rank.device).to(DTYPES[dtype]) for _ in range(2))
            kernels = ops.kernels(a, b)
            # A GPU's kernels queue up: of few, the time would be the host's.
            calls = 20 if rank.device.type == "cuda" else max(1, min(20, (1 << 9) // side))
            for name in ("linear", "dgrad", "wgrad"):
                arguments = (a, b, None) if name == "linear" else (a, b)
                jobs[dtype, name, side] = (_bound(getattr(kernels, name), arguments), calls)
    before = torch.get_float32_matmul_precision()
    times: dict[Any, list[float]] = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        chosen = {key: job for key, job in jobs.items() if (key[0] == "tf32") == (precision == "high")}
        times |= interleaved(rank, chosen, settings.rounds) if chosen else {}
    torch.set_float32_matmul_precision(before)
    return [
        {"dtype": dtype, "gemm": name, "side": side, "flops": 2 * side**3, "us_p50": float(np.median(values))}
        for (dtype, name, side), values in times.items()
    ]


def _bound(function: Callable[..., object], arguments: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: function(*arguments)


def _copy_tb_per_s(rank: Rank, settings: Settings) -> float:
    source = torch.zeros(settings.copied, dtype=torch.uint8, device=rank.device)
    target = torch.ones_like(source)
    times = interleaved(rank, {"copy": (lambda: target.copy_(source), 1)}, settings.rounds)
    return 2 * settings.copied / float(np.median(times["copy"])) / 1e6


def nearest(
    settings: Settings, rows: list[dict[str, Any]], gemms: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the wgrad, of the two largest cubes, and the all-reduce whose times are nearest; on a GPU in 16 bits."""
    dtype = settings.overlapped_dtype
    cubes = settings.cubes[-2:]
    fitting = [row for row in gemms if (row["dtype"], row["gemm"]) == (dtype, "wgrad") and row["side"] in cubes]
    pairs = [(gemm, row) for gemm in fitting for row in rows if row["kind"] == "all_reduce"]
    return min(pairs, key=lambda pair: abs(np.log(pair[0]["us_p50"] / pair[1]["us_p50"])))


def _overlap(
    rank: Rank, settings: Settings, rows: list[dict[str, Any]], gemms: list[dict[str, Any]]
) -> dict[str, float]:
    """Return quantiles of the share of the shorter one that disappears when a GEMM and an all-reduce run together."""
    assert rank.group is not None
    group = rank.group
    like, sent_like = nearest(settings, rows, gemms)
    side = like["side"]
    a, b = (torch.randn(side, side, device=rank.device).to(DTYPES[like["dtype"]]) for _ in range(2))
    gemm = _bound(ops.kernels(a, b).wgrad, (a, b))
    t = torch.zeros(sent_like["bytes"] // 4, device=rank.device)

    def together() -> None:
        started = collectives.start_all_reduce(t, group)
        gemm()
        collectives.wait(started)

    jobs = {"gemm": (gemm, 1), "all_reduce": (collective("all_reduce", t, rank), 1), "both": (together, 1)}
    times = interleaved(rank, jobs, 4 * settings.rounds)
    # Round by round: other programs come and go between rounds more than within one.
    alone, sent, both = (np.array(times[job]) for job in jobs)
    shares = np.clip((alone + sent - both) / np.minimum(alone, sent), 0, 1)
    return dict(zip(("p20", "p50", "p80"), np.quantile(shares, (0.2, 0.5, 0.8)).tolist(), strict=True))
