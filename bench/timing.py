"""Time steps fairly: interleaved rounds, a barrier before every step, and what the clock sees stated.

A step is one forward, or one forward and backward with gradients of x, w1, b1, w2 and b2, on one rank; or each of the
two passes by itself. A round runs every implementation once, starting one further each time. Figures are maxima over
ranks per step.

    CPU              host clock around the step; caches as the step before left them
    CUDA             events around the step. L2 is overwritten before it, then filled with what need not be written
                     back, and the GPU is idle when it begins, so the host's launches count
    CUDA, --graph    events around the replay of a captured graph, enqueued behind the overwriting: GPU time
    CUDA, warm L2    the same, but the step runs once more between: L2 is as the step itself leaves it

    ms             the step
    comm_ms        the part of it in which computation stood still for a collective, launch and wait for slower
                   ranks included; not measured inside a graph, which is not taken apart
    comm_ms_least  its minimum over ranks in place of the maximum

Source: triton.testing.do_bench and DeepGEMM's testing/bench.py (L2 overwritten, barrier against launch skew).
"""

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import checkout  # noqa: F401
import numpy as np
import torch
from ranks import Rank
from steps import Step

from tpffn_triton.collectives import observe

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
_L2_OVERWRITE_BYTES = 256 << 20


class Clock(Protocol):
    """What `time_rounds` needs of a clock."""

    def measure(self, step: Step, rank: Rank) -> tuple[float, float]:
        """Run step once; return (ms, ms of it in which computation stood still for collectives)."""


class HostClock:
    """time.perf_counter around a step on a CPU."""

    def measure(self, step: Step, rank: Rank) -> tuple[float, float]:
        waits: list[float] = []

        @contextlib.contextmanager
        def observed() -> Iterator[None]:
            begin = time.perf_counter()
            yield
            waits.append(time.perf_counter() - begin)

        step.reset()
        rank.barrier()
        with observe(observed):
            begin = time.perf_counter()
            step()
            elapsed = time.perf_counter() - begin
        return elapsed * 1e3, sum(waits) * 1e3


class CudaClock:
    """CUDA events around a step; see the module docstring for what `graph` and `warm_l2` change."""

    def __init__(self, graph: bool, warm_l2: bool = False) -> None:
        self.graph, self.warm_l2 = graph, warm_l2
        self.overwritten, self.read = torch.zeros(2, _L2_OVERWRITE_BYTES // 8, dtype=torch.int64, device="cuda")

    def measure(self, step: Step, rank: Rank) -> tuple[float, float]:
        waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        @contextlib.contextmanager
        def observed() -> Iterator[None]:
            begin = _recorded_event()
            yield
            waits.append((begin, _recorded_event()))

        step.reset()
        rank.barrier()
        self.overwritten.zero_()
        self.read.sum()  # what is left of the zeros in L2 is written out before the step, not during it
        if self.warm_l2:
            step()
            step.reset()
        if not self.graph:
            torch.cuda.synchronize()
        with contextlib.nullcontext() if self.graph else observe(observed):
            begin = _recorded_event()
            step()
            end = _recorded_event()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), sum(before.elapsed_time(after) for before, after in waits)


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Return items starting at number `by`, modulo their count."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Return the quantiles by name: {name_p20, name_p50, name_p80}."""
    names = (f"{name}_p{percent}" for percent in (20, 50, 80))
    return dict(zip(names, np.quantile(values, (0.2, 0.5, 0.8)).tolist(), strict=True))


@dataclass
class Times:
    """One implementation's rounds; see the module docstring."""

    ms: list[float]
    comm_ms: list[float]
    comm_ms_least: list[float]

    def figures(self) -> dict[str, float]:
        """Quantiles of ms, each round's slowest rank's; median of exposed communication on the rank that waits longest
        in a round, and least. compute_ms: ms_p50 less the former, of two ranks: the slowest may wait least.
        """
        spread_ms = spread(self.ms, "ms")
        exposed, least = float(np.median(self.comm_ms)), float(np.median(self.comm_ms_least))
        return {
            **spread_ms,
            "compute_ms": spread_ms["ms_p50"] - exposed,
            "exposed_ms": exposed,
            "exposed_ms_least": least,
        }


def ratios(over: Times | None, under: Times | None) -> dict[str, float] | dict[str, None]:
    """Return {ratio_p20, ratio_p50, ratio_p80}: quantiles of over's time over under's, by round; None without both."""
    if over is None or under is None:
        return dict.fromkeys(("ratio_p20", "ratio_p50", "ratio_p80"))
    return spread((np.array(over.ms) / np.array(under.ms)).tolist(), "ratio")


def run_rounds(steps: dict[K, Step], clock: Clock, rank: Rank, rounds: int, together: int = 1) -> dict[K, Times]:
    """Run every implementation once a round; returns each one's times.

    together   how many steps make one implementation, in order: 2 where a backward follows its forward
    """
    local: dict[K, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in rotated(list(steps), number * together):
            local[name].append(clock.measure(steps[name], rank))
    times = {}
    for name, measured in local.items():
        ms, comm_ms = zip(*measured, strict=True)
        least = [-value for value in rank.maxima([-value for value in comm_ms])]
        times[name] = Times(rank.maxima(ms), rank.maxima(comm_ms), least)
    return times


def rounds_within(seconds: float, bounds: tuple[int, int], measure_round: Callable[[], float], rank: Rank) -> int:
    """Return how many rounds like the one `measure_round` runs fit into `seconds`; all ranks agree."""
    (round_s,) = rank.maxima([measure_round()])
    low, high = bounds
    return max(low, min(high, int(seconds / max(round_s, 1e-9))))


def time_rounds(
    steps: dict[K, Step],
    rank: Rank,
    *,
    graph: bool,
    quick: bool,
    rounds: int | None,
    together: int = 1,
    warm_l2: bool = False,
    seconds: float | None = None,
) -> tuple[dict[K, Times], int]:
    """Warm up, then time; returns run_rounds' result and the number of rounds.

    rounds     None: as many as fit into `seconds`, 10 to 50 (CUDA: 20 to 200); with quick, 3 (10)
    seconds    of which the warm-up takes its part; None: 15 (CUDA: 5)
    quick      also shortens the warm-up
    together   as for run_rounds
    warm_l2    CUDA alone; with together=1
    """
    begin = time.perf_counter()
    cuda = rank.device.type == "cuda"
    clock: Clock = CudaClock(graph, warm_l2) if cuda else HostClock()
    warm_up = (3 if quick else 25) if cuda else (0 if quick else 1)
    run = functools.partial(run_rounds, steps, clock, rank, together=together)

    def warm_round() -> float:
        before = time.perf_counter()
        run(1)
        return time.perf_counter() - before

    if warm_up:
        run(warm_up)
    if rounds is None:
        bounds = ((10, 10) if quick else (20, 200)) if cuda else (3, 3) if quick else (10, 50)
        seconds = (5 if cuda else 15) if seconds is None else seconds
        (spent,) = rank.maxima([time.perf_counter() - begin])  # ranks that disagree would wait for each other for ever
        rounds = rounds_within(seconds - spent, bounds, warm_round, rank)
    return run(rounds), rounds
