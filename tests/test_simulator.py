"""The simulator finds each fault, in every seed; it passes what is right, and changes nothing."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import TINY, TMA
from shadow_memory import Race, Uninitialised
from simulator import Deadlock, Simulation
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tpffn_triton import interpreter
from tpffn_triton.kernels import matmul
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.weight_grads import weight_grads

pytestmark = pytest.mark.cpu_only
interpreter.install()

GROUPS, PARTS, BLOCK = 2, 3, 8
SEEDS = range(10)
RESIDENT = [1, 2, 3, None]


@triton.jit
def relay_kernel(
    x_ptr,
    middle_ptr,
    out_ptr,
    counters_ptr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TICKET: tl.constexpr,
    RELEASE: tl.constexpr,
    ACQUIRE: tl.constexpr,
    SCOPE: tl.constexpr,
    WAIT: tl.constexpr,
    TARGET: tl.constexpr,
    RESET: tl.constexpr,
    CONSUMERS_FIRST: tl.constexpr,
):
    """middle = 2 x, in PARTS blocks a group; then each block of out is the sum of its group's blocks of middle.
    counters: [0] the ticket, [1 + g] blocks of group g that are written, then read; all zero between launches."""
    STAGE: tl.constexpr = GROUPS * PARTS
    ticket = tl.program_id(0)
    if TICKET:
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        if ticket == 2 * STAGE - 1:
            tl.atomic_xchg(counters_ptr, 0, sem="relaxed")
    if CONSUMERS_FIRST:
        ticket = (ticket + STAGE) % (2 * STAGE)
    group = (ticket % STAGE) // PARTS
    block = ticket % STAGE * BLOCK + tl.arange(0, BLOCK)
    ready_ptr = counters_ptr + 1 + group
    if ticket < STAGE:
        tl.store(middle_ptr + block, 2 * tl.load(x_ptr + block))
        tl.atomic_add(ready_ptr, 1, sem=RELEASE, scope=SCOPE)
    else:
        if WAIT:
            while tl.atomic_add(ready_ptr, 0, sem=ACQUIRE) < TARGET:
                pass
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(PARTS):
            total += tl.load(middle_ptr + (group * PARTS + part) * BLOCK + tl.arange(0, BLOCK))
        tl.store(out_ptr + block, total)
        if RESET and tl.atomic_add(ready_ptr, 1, sem="relaxed") == 2 * PARTS - 1:
            tl.atomic_xchg(ready_ptr, 0, sem="relaxed")


def relay(x, counters, **changes):
    """Launch relay_kernel, right but for the changes, into fresh memory; return out."""
    constants = {
        "TICKET": False,
        "RELEASE": "release",
        "ACQUIRE": "acquire",
        "SCOPE": "gpu",
        "WAIT": True,
        "TARGET": PARTS,
        "RESET": True,
        "CONSUMERS_FIRST": False,
    }
    assert changes.keys() <= constants.keys()
    middle, out = x.new_empty(x.shape), torch.empty_like(x)
    relay_kernel[(2 * GROUPS * PARTS,)](x, middle, out, counters, GROUPS, PARTS, BLOCK, **(constants | changes))
    return out


def inputs():
    return torch.arange(GROUPS * PARTS * BLOCK, dtype=torch.float32), torch.zeros(1 + GROUPS, dtype=torch.int32)


def expected(x):
    return 2 * x.view(GROUPS, PARTS, BLOCK).sum(1, keepdim=True).expand(-1, PARTS, -1).reshape(-1)


@pytest.mark.parametrize("resident", RESIDENT, ids=lambda r: f"resident={r or 'all'}")
@pytest.mark.parametrize("ticket", [False, True], ids=["program_id", "ticket"])
def test_the_right_protocol_passes_in_any_schedule(ticket, resident):
    """Three launches each; with tickets, in whatever order the programs start."""
    x, counters = inputs()
    for seed in SEEDS:
        order = "random" if ticket and seed % 2 else "ascending"
        with Simulation(seed=seed, resident=resident, order=order) as simulation:
            for launch in range(3):
                assert torch.equal(relay(x + launch, counters, TICKET=ticket), expected(x + launch))
                assert not counters.any()
        assert simulation.switches >= 3 * (2 * GROUPS * PARTS - 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "message", "changes"),
    [
        ((Race, Uninitialised), r"reads middle_ptr\[\d+\]", {"WAIT": False}),
        (Race, r"reads middle_ptr\[\d+\] .* and program \d+ .* writes it", {"RELEASE": "relaxed"}),
        (Race, r"reads middle_ptr\[\d+\] .* and program \d+ .* writes it", {"ACQUIRE": "relaxed"}),
        (Race, r"scope cta.*counters_ptr\[|counters_ptr\[.*scope cta", {"SCOPE": "cta"}),
        ((Race, Uninitialised), r"reads middle_ptr\[\d+\]", {"TARGET": PARTS - 1}),
        (
            Deadlock,
            r"polling .*: 6 programs; not started: none(\n.*)*updates counters_ptr\[[12]\] .* found \[3\]",
            {"TARGET": PARTS + 1},
        ),
    ],
    ids=["no wait", "relaxed release", "relaxed acquire", "cta scope", "target too small", "target too large"],
)
def test_a_wrong_protocol_is_found(fault, message, changes, seed):
    with pytest.raises(fault, match=message), Simulation(seed=seed, most_polls=20):
        relay(*inputs(), **changes)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_counter_that_is_not_reset_is_found_in_the_second_launch(seed):
    x, counters = inputs()
    with Simulation(seed=seed):
        relay(x, counters, RESET=False)
        with pytest.raises((Race, Uninitialised), match=r"\(launch 2\) reads middle_ptr"):
            relay(x, counters, RESET=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_consumers_before_producers_hang_where_few_are_resident(seed):
    message = r"polling .*: 2 programs; not started: program \d+ of relay_kernel \(launch 1\), (.*, ){8}program \d+ of"
    with (
        pytest.raises(Deadlock, match=message),
        Simulation(seed=seed, resident=2, order="ascending" if seed % 2 else "random", most_polls=20),
    ):
        relay(*inputs(), TICKET=True, CONSUMERS_FIRST=True)
    with Simulation(seed=seed):
        relay(*inputs(), TICKET=True, CONSUMERS_FIRST=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_may_run_together_but_not_share_a_counter(seed):
    x, counters = inputs()

    def both(others):
        with Simulation(seed=seed, resident=4 if seed % 2 else None, most_polls=20) as simulation:
            with simulation.concurrent():
                outs = relay(x, counters, TICKET=True), relay(x + 1, others, TICKET=True)
            assert torch.equal(outs[0], expected(x))
            assert torch.equal(outs[1], expected(x + 1))

    both(torch.zeros_like(counters))
    with pytest.raises((Race, Uninitialised, Deadlock)):
        both(counters)


def test_a_race_names_both_lines():
    with pytest.raises(Race) as caught, Simulation(seed=0):
        relay(*inputs(), RELEASE="relaxed")
    for line in ("total += tl.load(middle_ptr", "tl.store(middle_ptr + block, 2 * tl.load(x_ptr + block))"):
        assert line in str(caught.value)
    assert str(caught.value).count("test_simulator.py:") == 2


def test_a_seed_is_a_schedule():
    def schedule(seed):
        x, counters = inputs()
        with Simulation(seed=seed, resident=4, order="random") as simulation:
            relay(x, counters, TICKET=True)
        return simulation.steps, simulation.switches

    schedules = [schedule(seed) for seed in SEEDS]
    assert schedules == [schedule(seed) for seed in SEEDS]
    assert len(set(schedules)) > len(SEEDS) // 2


@triton.jit
def _refuse(BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "refused")


@triton.jit
def refusing_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0), 1.0)
    if tl.program_id(0) == 3:
        _refuse(BLOCK)


def test_errors_come_out_as_they_are_and_nothing_is_left_behind():
    def patched():
        names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
        hooks = [getattr(InterpreterBuilder, name) for name in names]
        return [*hooks, GridExecutor.__call__, torch.empty, torch.empty_like, torch.Tensor.new_empty, tl.load]

    patch_lang = triton_interpreter._patch_lang
    before, threads = patched(), threading.active_count()
    with Simulation():
        assert not set(patched()[:-1]) & set(before)
        with pytest.raises(AssertionError, match="refused"):
            refusing_kernel[(8,)](torch.zeros(8), 1)
    with pytest.raises(Deadlock), Simulation(most_polls=20):
        relay(*inputs(), TARGET=PARTS + 1)
    assert patched() == before
    assert triton_interpreter._patch_lang is patch_lang
    assert threading.active_count() == threads
    x, counters = inputs()
    assert torch.equal(relay(x, counters), expected(x))  # by the plain interpreter


def test_what_cannot_be_simulated_is_refused(monkeypatch):
    with Simulation() as simulation:
        with pytest.raises(RuntimeError, match="active already"), Simulation():
            pass
        with pytest.raises(RuntimeError, match="inside"), simulation.concurrent(), simulation.concurrent():
            pass
        with pytest.raises(TypeError, match=r"x_ptr: .* on meta"):
            refusing_kernel[(1,)](torch.zeros(8, device="meta"), 0)
    for arguments in ({"resident": 0}, {"order": "descending"}):
        with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
            Simulation(**arguments)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), Simulation():
        pass


CONFIGS = [TINY, TMA]


@pytest.mark.parametrize("config", CONFIGS, ids=["pointers", "TMA"])
def test_the_kernels_pass_and_compute_the_same(config):
    """Every kernel that waits for nobody, with something left over at every edge; each byte of an output is written by
    one program."""
    torch.manual_seed(0)
    x, dy = torch.randn(70, 64).bfloat16(), torch.randn(70, 80).bfloat16()
    w1, w2, b1 = torch.randn(96, 64).bfloat16(), torch.randn(80, 96).bfloat16(), torch.randn(96).bfloat16()

    def passes():
        act, pre_act = linear_act(x, w1, b1, "gelu", True, config)
        gated, gate_up = linear_act(x, w1, b1, "swiglu", True, config)
        y = matmul.linear(act, w2, None, config=config)
        plain = linear_dact(dy, w2, pre_act, "gelu", True, True, config)
        halved = linear_dact(dy, w2[:, :48].contiguous(), gate_up, "swiglu", True, False, config)
        dx = matmul.dgrad(pre_act, w1, config=config)
        weights = weight_grads(plain[0], x, x, act, plain[2], x, config=config)
        separate = matmul.wgrad(dy, act, config=config), column_sum(dy)
        return act, pre_act, gated, gate_up, y, *plain, *halved, dx, *weights, *separate

    wanted = passes()
    for seed, resident in enumerate(RESIDENT):
        with Simulation(seed=seed, resident=resident, order="random"):
            results = passes()
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True) if b is not None)


@triton.jit
def _one_tile_twice(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    pid = tl.where(pid == 5, 3, pid)
    return pid // tl.cdiv(N, BLOCK_N), pid % tl.cdiv(N, BLOCK_N)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", CONFIGS, ids=["pointers", "TMA"])
def test_a_tile_that_two_programs_compute_is_found(config, seed, monkeypatch):
    monkeypatch.setattr(matmul, "grouped_tile", _one_tile_twice)
    message = r"program [35] of matmul_kernel .* writes out\[32, 0\] .*program [35] .*\n.*_tiles.py"
    with pytest.raises(Race, match=message), Simulation(seed=seed):
        matmul.linear(torch.randn(70, 64), torch.randn(80, 64), None, config=config)
