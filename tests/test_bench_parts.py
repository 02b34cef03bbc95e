"""The parts of the benchmark: problems, the gate's reference, statistics, ceilings, memory, the GPU's clock and graphs.

A fake torch.cuda rehearses what a machine without a GPU cannot run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import environment
import implementations
import measure
import memory
import ranks
import steps
import timing
import workloads

from tpffn_triton import backends, collectives
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.sharding import unshard_ffn

pytestmark = pytest.mark.cpu_only
TINY = workloads.SHAPES["tiny"]
ALONE = ranks.Rank(0, 1, torch.device("cpu"), 1, None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eager_passes_the_gate_with_every_activation(dtype: str, activation: str) -> None:
    own = workloads.shard(workloads.draw(TINY, dtype, activation, ALONE.device), 0, 1, activation)
    reference = workloads.expected(own, "fwd_bwd", activation)
    for implementation in implementations.chosen(("unfused",), "cpu", dtype):
        step = steps.make_step(implementation.build(activation, False), own, None, "fwd_bwd", graph=False)
        error, _ = measure.worst_error(step, reference, ALONE)
        assert 0 < error < measure.error_bound(dtype, activation) / 2


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_expected_gradients_are_the_shards_of_the_whole(activation: str) -> None:
    full = workloads.draw(TINY, "fp32", activation, torch.device("cpu"))
    whole = workloads.expected(full, "fwd_bwd", activation)
    parts = [workloads.expected(full, "fwd_bwd", activation, rank, 2) for rank in range(2)]
    shards = [(p["dw1"], p["db1"], p["dw2"], p["db2"]) for p in parts]
    for name, t in zip(("dw1", "db1", "dw2", "db2"), unshard_ffn(shards, activation=activation), strict=True):
        assert t.dtype == torch.float64
        torch.testing.assert_close(t, whole[name], rtol=0, atol=0)


def test_problem_is_the_same_every_time_and_on_every_rank() -> None:
    first, second = (workloads.draw(TINY, "bf16", "geglu", torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(t, second.leaves()[name]) for name, t in first.leaves().items())
    assert (first.w1.shape, first.b1.shape, first.w2.shape) == ((256, 64), (256,), (64, 128))
    assert first.w1.dtype == torch.bfloat16
    assert first.w1.abs().max() <= 64**-0.5


class FakeClock:
    def __init__(self) -> None:
        self.order: list[str] = []

    def measure(self, step: Any, rank: ranks.Rank) -> tuple[float, float]:
        self.order.append(step)
        return len(self.order), len(self.order) / 2


def test_rounds_interleave_and_each_implementation_leads_in_turn() -> None:
    clock = FakeClock()
    named: Any = {"a": "a", "b": "b", "c": "c"}
    times = timing.run_rounds(named, clock, ALONE, 4)
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"
    assert times["b"].ms == [2, 4, 9, 11]
    assert times["b"].comm_ms == times["b"].comm_ms_least == [1, 2, 4.5, 5.5]
    assert times["b"].figures() == {
        **{"ms_p20": pytest.approx(3.2), "ms_p50": 6.5, "ms_p80": pytest.approx(9.8)},
        **{"compute_ms": 3.25, "exposed_ms": 3.25, "exposed_ms_least": 3.25},
    }
    assert timing.rounds_within(10, (3, 50), lambda: 0.5, ALONE) == 20
    assert timing.rounds_within(10, (3, 50), lambda: 60, ALONE) == 3
    assert timing.rounds_within(10, (3, 50), lambda: 0, ALONE) == 50


def test_the_warm_up_is_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    class Second:
        def measure(self, step: Any, rank: ranks.Rank) -> tuple[float, float]:
            now[0] += 1
            return 1, 0

    monkeypatch.setattr(timing, "HostClock", Second)
    named: Any = {"a": "a", "b": "b"}
    how: dict[str, Any] = {"graph": False, "quick": False, "rounds": None}
    # A round takes 2 s, and another one has warmed up.
    assert timing.time_rounds(named, ALONE, **how, seconds=42)[1] == 20
    assert timing.time_rounds(named, ALONE, **how, seconds=0)[1] == 10


def test_a_backward_stays_behind_its_forward() -> None:
    clock = FakeClock()
    named: Any = {name: name for name in "aAbBcC"}
    timing.run_rounds(named, clock, ALONE, 3, together=2)
    assert "".join(clock.order) == "aAbBcC" + "bBcCaA" + "cCaAbB"


def test_the_two_passes_of_a_step_are_the_whole_step() -> None:
    own = workloads.shard(workloads.draw(TINY, "fp32", "gelu", ALONE.device), 0, 1, "gelu")
    forward = implementations.IMPLEMENTATIONS["fused"].build("gelu", False)
    whole = steps.Step(forward, own, None, "fwd_bwd")
    whole()
    wanted = {name: t.clone() for name, t in whole.outputs().items()}
    passes = steps.passes_of(forward, own, None)
    for step in passes.values():
        step.reset()
        step()
    found = passes["forward"].outputs()
    assert [*found] == [*wanted]
    assert all(torch.equal(t, wanted[name]) for name, t in found.items())


def test_flops_and_bytes_of_the_passes_by_hand() -> None:
    m, h, f = 16, 64, 64  # f: F/P
    for activation, width in (("relu", f), ("geglu_tanh", 2 * f)):
        weights = width * h + width + h * f + h
        forward = (2 * m * h * (width + f), 2 * (2 * m * h + weights))
        backward = (2 * forward[0], 2 * (3 * m * h + width * h + h * f + weights))
        assert TINY.pass_floors("fwd", "fp16", activation) == [forward]
        assert TINY.pass_floors("fwd_bwd", "fp16", activation) == [forward, backward]
        assert TINY.pass_floors("fwd", "tf32", activation) == [(forward[0], 2 * forward[1])]
        assert TINY.flops("fwd_bwd", activation) == 3 * forward[0]


def test_floors_on_a_known_device_and_none_on_others() -> None:
    analysed, decode = workloads.SHAPES["analysed"], workloads.SHAPES["decode"]
    h100 = "NVIDIA H100 80GB HBM3"
    for shape, mode, ms in ((analysed, "fwd", 0.0054), (decode, "fwd", 0.039), (decode, "fwd_bwd", 0.117)):
        passes = shape.pass_floors(mode, "bf16", "gelu")
        assert environment.floor_ms(h100, "bf16", passes) == pytest.approx(ms, rel=0.03)
    for unknown in ("Intel(R) Xeon(R) Processor", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert environment.ceiling(unknown) is None
        assert environment.floor_ms(unknown, "bf16", analysed.pass_floors("fwd", "bf16", "gelu")) is None


def test_peak_memory_counts_what_a_step_allocates() -> None:
    def forward(x, w1, b1, w2, b2, group):
        return torch.ones(64 << 20, dtype=torch.uint8)[: x.numel()].view(x.shape)

    own = workloads.shard(workloads.draw(TINY, "fp32", "gelu", ALONE.device), 0, 1, "gelu")
    peak = memory.peak_bytes(steps.Step(forward, own, None, "fwd"), ALONE)
    if peak is None:
        pytest.skip("this kernel does not tell")
    assert 60 << 20 < peak < 80 << 20


def test_memory_is_of_the_launchers_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = backends.implementation("cpu").ffn_forward
    launched: list[str] = []

    def spy(*given: Any, **options: Any) -> Any:
        launched.append("spy")
        return own(*given, **options)

    known = implementations.IMPLEMENTATIONS["fused"]
    exchanged = dataclasses.replace(known, launchers={"ffn_forward": spy})
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "fused", exchanged)

    def peak_bytes(step: steps.Step, rank: ranks.Rank) -> int:
        launched.clear()
        step()
        return len(launched)

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    how = (("fp32",), ("fwd",), ("fused",), "gelu", False, 3, False, True, True, "")
    (row,) = measure.measure(ALONE, measure.Settings((TINY,), *how))["rows"]
    assert row["peak_mem_bytes"] == 1


def test_infinite_and_undefined_values_survive_the_maximum() -> None:
    assert ALONE.maxima([1.0, float("nan"), float("inf")]) == [1.0, float("inf"), float("inf")]


class FakeCuda:
    """Enough of torch.cuda to run the GPU's clock and graphs on CPU tensors, noting the order of events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = log = []
        clock = iter(range(1000))

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = next(clock)
                log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        class Graph:
            recorded: Any = None

            def replay(self) -> None:
                log.append("replay")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "graph": lambda g: contextlib.nullcontext(),
            "synchronize": lambda: log.append("synchronize"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        real_zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: real_zeros(*a, **k))


class Waiting(steps.Step):
    """A step that does nothing but note itself and stand still twice for a collective."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def reset(self) -> None:
        self.log.append("reset")

    def __call__(self) -> None:
        for _ in range(2):
            with collectives.observed():
                self.log.append("collective")


def test_cuda_clock_synchronises_before_the_first_event_and_sums_the_waits(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    ms, comm_ms = timing.CudaClock(graph=False).measure(Waiting(cuda.log), ALONE)
    waits = ["event", "collective", "event"] * 2
    assert cuda.log == ["reset", "synchronize", "event", *waits, "event", "synchronize"]
    assert (ms, comm_ms) == (5, 2)


def test_cuda_clock_replays_a_graph_behind_the_flush_without_observing(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    ms, comm_ms = timing.CudaClock(graph=True).measure(Waiting(cuda.log), ALONE)
    assert cuda.log == ["reset", "event", "collective", "collective", "event", "synchronize"]
    assert (ms, comm_ms) == (1, 0)


def test_cuda_clock_runs_a_step_before_the_one_it_times_for_a_warm_l2(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    ms, comm_ms = timing.CudaClock(graph=True, warm_l2=True).measure(Waiting(cuda.log), ALONE)
    step = ["collective", "collective"]
    assert cuda.log == ["reset", *step, "reset", "event", *step, "event", "synchronize"]
    assert (ms, comm_ms) == (1, 0)


def test_captured_results_are_nan_until_a_replay_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    own = workloads.shard(workloads.draw(TINY, "fp32", "gelu", torch.device("cpu")), 0, 1, "gelu")
    forward = implementations.IMPLEMENTATIONS["unfused"].build("gelu", False)
    step = steps.CapturedStep(forward, own, None, "fwd_bwd")
    assert set(step.outputs()) == {"y", "dx", "dw1", "db1", "dw2", "db2"}
    assert all(t.isnan().all() for t in step.outputs().values())
    assert all(leaf.grad is None for leaf in own.leaves().values())
    step()
    assert cuda.log == ["replay"]
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, got cpu"):
        steps.make_step(forward, own, None, "fwd", graph=True)
