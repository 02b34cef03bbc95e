"""Measure one rank's part of exchange_bench.py: steps in pairs that differ in the order of exchanges alone.

    backward    one backward; the forward before it is not timed
                overlapped   as passes.py orders it
                serial       every collective is waited for where it starts
    forward     one forward, Linear2 in 1, 2, 4 or 8 row chunks
    reduction   forward and backward in bf16, partial sums added in bf16 or fp32

A timeline is what torch.profiler saw of one backward on rank 0, as spans [name, lane, begin, end] in ms: kernels (or
on a CPU operators) in lane "compute", gloo's and NCCL's work in lane "collective".
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import environment
import numpy as np
import timing
import torch
import workloads
from ranks import Rank
from steps import RecordedForward, Step
from torch import Tensor
from workloads import Problem, Shape

from tpffn_triton import collectives, ffn, passes
from tpffn_triton.cost_model import CHUNK_ROWS

CHUNKS = (1, 2, 4, 8)
_BEGIN = "timeline"


@dataclass(frozen=True)
class Settings:
    """What to measure; rounds None: as many as fit. trace: where rank 0 writes its profile. threads: of a rank, None
    for its part of the cores."""

    shape: Shape
    dtype: str
    rounds: int | None
    threads: int | None
    quick: bool
    trace: str | None
    command: str


@contextlib.contextmanager
def serial() -> Iterator[None]:
    """Wait for every collective of a pass where it starts."""
    names = ("start_all_reduce", "start_all_gather", "start_reduce_scatter")
    starts = {name: getattr(passes, name) for name in names}
    for name in names:
        setattr(passes, name, getattr(collectives, name.removeprefix("start_")))
    try:
        yield
    finally:
        for name, start in starts.items():
            setattr(passes, name, start)


class BackwardStep(RecordedForward):
    """A backward; the forward before it is part of `reset`, and so not timed."""

    def in_order(self) -> contextlib.AbstractContextManager:
        """Return the context to run backward in."""
        return contextlib.nullcontext()

    def reset(self) -> None:
        """Drop the last results and run a forward."""
        super().reset()
        super().__call__()

    def __call__(self) -> None:
        """Run backward."""
        with self.in_order():
            self.backward()


class SerialBackwardStep(BackwardStep):
    """The same, one thing after the other."""

    def in_order(self) -> contextlib.AbstractContextManager:
        """Return the context to run backward in."""
        return serial()


def measure(rank: Rank, settings: Settings) -> dict[str, Any]:
    """Return {"rows": [...], "timelines": {order: {...}}} of this rank; rank 0's is the one to report."""
    if settings.threads is not None:
        rank = replace(rank, threads=settings.threads)
        torch.set_num_threads(settings.threads)

    def forward_of(**options: Any) -> Any:
        def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Any) -> Tensor:
            return ffn(x, w1, w2, b1, b2, tp_group=group, **options)

        return forward

    own = own_problem(rank, settings, settings.dtype)
    slices = workloads.own_tokens(own, rank.rank, rank.world_size)
    fused, on_slices = forward_of(), forward_of(sequence_parallel=True)
    backward: dict[str, Step] = {
        "serial": SerialBackwardStep(fused, own, rank.group, "fwd_bwd"),
        "overlapped": BackwardStep(fused, own, rank.group, "fwd_bwd"),
    }
    sliced: dict[str, Step] = {
        "serial, slices": SerialBackwardStep(on_slices, slices, rank.group, "fwd_bwd"),
        "overlapped, slices": BackwardStep(on_slices, slices, rank.group, "fwd_bwd"),
    }
    chunked: dict[str, Step] = {
        f"{n} chunk{'s' if n > 1 else ''}": Step(forward_of(forward_chunks=n), own, rank.group, "fwd")
        for n in CHUNKS
        if n == 1 or settings.shape.tokens >= n * CHUNK_ROWS
    }
    in_bf16 = own_problem(rank, settings, "bf16")
    added: dict[str, Step] = {
        f"added in {name}": Step(forward_of(reduce_dtype=dtype), in_bf16, rank.group, "fwd_bwd")
        for name, dtype in (("bf16", None), ("fp32", torch.float32))
    }
    errors = y_errors(rank, settings, added)
    surroundings = environment.describe(rank) | {"command": settings.command}
    rows: list[dict[str, Any]] = []
    for work, dtype, steps in (
        ("backward", settings.dtype, backward),
        ("backward", settings.dtype, sliced),
        ("forward", settings.dtype, chunked),
        ("reduction", "bf16", added),
    ):
        rank.say(f"timing {work}: {', '.join(steps)}")
        found = time_ways(rank, settings, steps)
        rows += [
            {"work": work, "way": way, "dtype": dtype, "y_rel_err": errors.get(way), **row, **surroundings}
            for way, row in found.items()
        ]
    rank.say("recording timelines")
    timelines = {}
    for name, step in (backward | sliced).items():
        kept = settings.trace if name == "overlapped" and rank.rank == 0 else None
        timelines[name] = timeline(rank, step, kept)
    return {"rows": rows, "timelines": timelines}


def own_problem(rank: Rank, settings: Settings, dtype: str) -> Problem:
    """Return this rank's problem."""
    full = workloads.draw(settings.shape, dtype, "gelu", rank.device)
    return workloads.shard(full, rank.rank, rank.world_size, "gelu")


def y_errors(rank: Rank, settings: Settings, steps: dict[str, Step]) -> dict[str, float]:
    """Return each step's relative Frobenius error of y against fp64."""
    full = workloads.draw(settings.shape, "bf16", "gelu", rank.device)
    reference = workloads.expected(full, "fwd", "gelu")["y"]
    errors = {}
    for name, step in steps.items():
        step.reset()
        step()
        errors[name] = ((step.outputs()["y"].double() - reference).norm() / reference.norm()).item()
    return errors


def time_ways(rank: Rank, settings: Settings, steps: dict[str, Step]) -> dict[str, dict[str, Any]]:
    """Return each way's figures; the first is what the others are compared with, round by round."""
    times, rounds = timing.time_rounds(steps, rank, graph=False, quick=settings.quick, rounds=settings.rounds)
    first = np.array(next(iter(times.values())).ms)
    shape = settings.shape
    rows = {}
    for name, t in times.items():
        quantiles = functools.partial(np.quantile, q=(0.2, 0.5, 0.8))
        ms, ratios = quantiles(t.ms).tolist(), quantiles(first / np.array(t.ms)).tolist()
        rows[name] = {
            **{f"ms_p{p}": value for p, value in zip((20, 50, 80), ms, strict=True)},
            **{f"ratio_p{p}": value for p, value in zip((20, 50, 80), ratios, strict=True)},
            "comm_ms": float(np.median(t.comm_ms)),
            "iters": rounds,
            "shape": shape.name,
            "batch": shape.batch,
            "seq": shape.seq,
            "hidden": shape.hidden,
            "ffn": shape.ffn,
        }
    return rows


def timeline(rank: Rank, step: Step, trace: str | None) -> dict[str, Any]:
    """Profile the step once, after a warm-up that the profiler sees as well; returns spans and their overlap in ms."""
    for last in (False, True):
        step.reset()
        with torch.profiler.profile() as profile:
            rank.barrier()  # inside: ranks do not start their profilers at the same time
            with torch.profiler.record_function(_BEGIN):
                step()
            if rank.device.type == "cuda":
                torch.cuda.synchronize()
        if last and trace:
            profile.export_chrome_trace(trace)
            written = json.loads(Path(trace).read_text())
            Path(trace).write_text(
                json.dumps(written | {"traceName": Path(trace).name}) + "\n"
            )  # it held the whole path
    spans = spans_of(profile, rank.device.type)
    collective = [span for span in spans if span[1] == "collective"]
    wgrads = [span for span in spans if "wgrad" in span[0] or "weight_grads" in span[0]]
    return {
        "spans": spans,
        "collective_ms": sum(end - begin for _, _, begin, end in collective),
        "beside_wgrad_ms": sum(max(0.0, min(a[3], b[3]) - max(a[2], b[2])) for a in collective for b in wgrads),
    }


def spans_of(profile: Any, device_type: str) -> list[tuple[str, str, float, float]]:
    """Return what the step ran, by begin; the step begins at 0."""
    origin = next(event.time_range.start for event in profile.events() if event.name == _BEGIN) / 1e3
    wanted = torch.autograd.DeviceType.CUDA if device_type == "cuda" else torch.autograd.DeviceType.CPU
    found = []
    for event in profile.events():
        name = event.name
        is_collective = name.startswith(("gloo:", "nccl"))
        if event.device_type == wanted and (is_collective or name.startswith("tpffn::") or device_type == "cuda"):
            lane = "collective" if is_collective else "compute"
            found.append((name.removeprefix("tpffn::"), lane, event.time_range.start / 1e3, event.time_range.end / 1e3))
    # The barrier is a collective, too.
    return sorted(((n, lane, b - origin, e - origin) for n, lane, b, e in found if b >= origin), key=lambda s: s[2])
