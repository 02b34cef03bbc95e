"""One launch of both GEMMs cannot race or hang: the real kernels, their programs interleaved by the simulator in many
ways.

Every result is bit for bit that of the two launches it replaces, or, for few tokens, of any other schedule; in each
schedule M changes twice, and nothing of one launch reaches the next. Tiles are small and the operands such that part of
one is left over at every edge.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import SPLIT, TINY, TMA, assert_same
from schedules import TOKENS, Case, FewTokens, tokens, two_launches, weights
from shadow_memory import Race, Uninitialised
from simulator import Deadlock, Simulation

from tpffn_triton import interpreter
from tpffn_triton.kernels import _counters
from tpffn_triton.kernels.ffn_few_tokens import ffn_few_tokens
from tpffn_triton.kernels.ffn_single_launch import ffn_single_launch

pytestmark = pytest.mark.cpu_only
interpreter.install()

RESIDENT = [1, 2, 3, None]
SEEDS = range(13)  # for each of RESIDENT: 52 schedules of a configuration


@pytest.fixture(autouse=True)
def _fresh_counters(monkeypatch):
    """Those of a launch that fails in a block of concurrent ones stay as it left them."""
    monkeypatch.setattr(_counters, "_of_stream", {})


@pytest.mark.parametrize("resident", RESIDENT, ids=lambda r: f"resident={r or 'all'}")
@pytest.mark.parametrize(
    ("activation", "config", "save_pre_act"),
    [
        pytest.param("gelu", TINY, True, id="gelu-pointers"),
        pytest.param("gelu", TMA, False, id="gelu-tma"),
        pytest.param("gelu", SPLIT, True, id="gelu-split"),
        pytest.param("swiglu", TINY, False, id="swiglu-pointers"),
        pytest.param("swiglu", TMA, True, id="swiglu-tma"),
    ],
)
def test_any_schedule(activation, config, save_pre_act, resident):
    """Row blocks one at a time or all together; programs started in order of their ids or in any."""
    case = Case(activation, config, save_pre_act)
    for seed in SEEDS:
        case.check(ffn_single_launch, _counters, seed, resident)


@pytest.mark.parametrize("resident", RESIDENT, ids=lambda r: f"resident={r or 'all'}")
@pytest.mark.parametrize(
    ("activation", "config", "save_pre_act"),
    [
        pytest.param("gelu", TINY, True, id="gelu-whole"),
        pytest.param("gelu", replace(TINY, SPLIT_K=2), False, id="gelu-slices"),
        pytest.param("swiglu", replace(TMA, SPLIT_K=4), True, id="swiglu-tma"),
    ],
)
def test_any_schedule_of_few_tokens(activation, config, save_pre_act, resident):
    case = FewTokens(activation, config, save_pre_act)
    for seed in SEEDS:
        case.check(ffn_few_tokens, _counters, seed, resident)


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
