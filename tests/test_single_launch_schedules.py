"""The single launch cannot race or hang: the real kernel, its programs interleaved by the simulator in many ways.

Every result is bit for bit that of the two launches it replaces; in each schedule M changes twice, and nothing of one
launch reaches the next. Tiles are small and the operands such that part of one is left over at every edge.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import SPLIT, TINY, TMA, randn
from shadow_memory import Race, Uninitialised
from simulator import Deadlock, Simulation

from tpffn_triton import interpreter
from tpffn_triton.kernels import _counters
from tpffn_triton.kernels.activations import halves
from tpffn_triton.kernels.ffn_single_launch import ffn_single_launch
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.matmul import linear

pytestmark = pytest.mark.cpu_only
interpreter.install()

# Row blocks of 32: three, then two with another one's remainder, then two that are full; three tiles of act, two of y.
TOKENS = (70, 33, 64)
K, N, H = 40, 72, 48
RESIDENT = [1, 2, 3, None]
SEEDS = range(13)  # for each of RESIDENT: 52 schedules of a configuration


@pytest.fixture(autouse=True)
def _fresh_counters(monkeypatch):
    """Those of a launch that fails in a block of concurrent ones stay as it left them."""
    monkeypatch.setattr(_counters, "_of_stream", {})


def weights(activation):
    W = halves(activation) * N
    shapes = ((W, K), (W,), (H, N), (H,))
    w1, b1, w2, b2 = (randn(*shape, dtype=torch.bfloat16, device="cpu", seed=1) for shape in shapes)
    return w1 / K**0.5, b1, w2 / N**0.5, b2


def tokens(M):
    return randn(M, K, dtype=torch.bfloat16, device="cpu")


def two_launches(x, w1, b1, w2, b2, activation, save_pre_act, config):
    act, pre_act = linear_act(x, w1, b1, activation, save_pre_act, config)
    return linear(act, w2, b2, None, config), act, pre_act


def assert_same(ours, others):
    for a, b in zip(ours, others, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("resident", RESIDENT, ids=lambda r: f"resident={r or 'all'}")
@pytest.mark.parametrize(
    ("activation", "config", "save_pre_act"),
    [
        pytest.param(activation, config, save_pre_act, id=f"{activation}-{name}{'-pre_act' * save_pre_act}")
        for activation in ("gelu", "swiglu")
        for name, config in (("pointers", TINY), ("tma", TMA), ("split", SPLIT))
        for save_pre_act in (False, True)
        if config is not SPLIT or (activation == "gelu" and save_pre_act)
    ],
)
def test_any_schedule(activation, config, save_pre_act, resident):
    """Row blocks one at a time or all together; programs started in order of their ids or in any."""
    operands = weights(activation)
    expected = [two_launches(tokens(M), *operands, activation, save_pre_act, config) for M in TOKENS]
    for seed in SEEDS:
        order = "random" if seed % 2 else "ascending"
        grouped = replace(config, GROUP_M=8 if seed // 2 % 2 else 1)
        with Simulation(seed=seed, resident=resident, order=order) as simulation:
            for M, results in zip(TOKENS, expected, strict=True):
                ours = ffn_single_launch(tokens(M), *operands, activation, save_pre_act, config=grouped)
                assert_same(ours, results)
                (counters,) = _counters._of_stream.values()
                assert not counters.any()
        assert simulation.switches >= sum(-(-M // 32) for M in TOKENS) * 5 - 1  # one a program, at least


@pytest.mark.parametrize("config", [TINY, TMA], ids=["pointers", "tma"])
def test_two_streams_need_counters_of_their_own(config, monkeypatch):
    """A CPU has one stream, hence one set of counters."""
    operands = weights("gelu")

    def both(seed, resident):
        with Simulation(seed=seed, resident=resident, most_polls=50) as simulation:
            with simulation.concurrent():
                results = [ffn_single_launch(tokens(M), *operands, "gelu", False, config=config) for M in TOKENS[:2]]
            return results

    for seed in range(5):
        with pytest.raises((Race, Uninitialised, Deadlock)):
            both(seed, None)
    monkeypatch.setattr(_counters, "counters", _counters._zeros)
    expected = [two_launches(tokens(M), *operands, "gelu", False, config) for M in TOKENS[:2]]
    for seed in range(5):
        for ours, others in zip(both(seed, (None, 4)[seed % 2]), expected, strict=True):
            assert_same(ours, others)


@pytest.mark.parametrize("seed", range(5))
def test_counters_that_were_not_zero_are_noticed(seed):
    """As after a launch that did not come to its end."""
    operands = weights("gelu")
    _counters.counters(torch.device("cpu"), 4)[1] = 2
    with pytest.raises((Race, Uninitialised)), Simulation(seed=seed, most_polls=50):
        ffn_single_launch(tokens(TOKENS[0]), *operands, "gelu", False, config=TINY)
