"""Run one launch of both GEMMs in one simulated schedule, and compare it with the two launches that it replaces, or,
for few tokens, whose reductions may be split, with itself where nothing interleaves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from kernel_cases import assert_same, randn
from simulator import Simulation

from tpffn_triton.kernels._configs import Config
from tpffn_triton.kernels.activations import halves
from tpffn_triton.kernels.ffn_few_tokens import ffn_few_tokens
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.matmul import linear

# Row blocks of 32: three, then two with another one's remainder, then two that are full; three tiles of act, two of y.
TOKENS = (70, 33, 64)
K, N, H = 40, 72, 48
TILES = 5  # of act and y, a row block


def weights(activation: str) -> tuple:
    """Return (w1, b1, w2, b2) in bf16."""
    W = halves(activation) * N
    shapes = ((W, K), (W,), (H, N), (H,))
    w1, b1, w2, b2 = (randn(*shape, dtype=torch.bfloat16, device="cpu", seed=1) for shape in shapes)
    return w1 / K**0.5, b1, w2 / N**0.5, b2


def tokens(M: int) -> torch.Tensor:
    """Return x [M, K] in bf16."""
    return randn(M, K, dtype=torch.bfloat16, device="cpu")


def two_launches(x, w1, b1, w2, b2, activation, save_pre_act, config) -> tuple:
    """Return (y, act, pre_act or None)."""
    act, pre_act = linear_act(x, w1, b1, activation, save_pre_act, config)
    return linear(act, w2, b2, None, config), act, pre_act


@dataclass
class Case:
    """A configuration, and what three launches of it give, one after the other."""

    activation: str
    config: Config
    save_pre_act: bool
    tokens_of_launches: tuple[int, ...] = TOKENS

    def __post_init__(self) -> None:
        self.weights = weights(self.activation)
        self.expected = [self.expect(M) for M in self.tokens_of_launches]

    def expect(self, M: int) -> tuple:
        """Return (y, act, pre_act or None)."""
        return two_launches(tokens(M), *self.weights, self.activation, self.save_pre_act, self.config)

    def config_of(self, seed: int) -> Config:
        """Return the configuration of a schedule."""
        return replace(self.config, GROUP_M=8 if seed // 2 % 2 else 1)

    def check(self, ffn: Callable, counters: ModuleType, seed: int, resident: int | None, **options) -> None:
        """Run one schedule of a launcher. Raises: a Fault of the simulator; AssertionError: other results, or counters
        that are not zero afterwards."""
        order, config = "random" if seed % 2 else "ascending", self.config_of(seed)
        with Simulation(seed=seed, resident=resident, order=order, **options) as simulation:
            for M, expected in zip(self.tokens_of_launches, self.expected, strict=True):
                results = ffn(tokens(M), *self.weights, self.activation, self.save_pre_act, config=config)
                assert_same(results, expected)
                assert not any(kept.any() for kept in counters._of_stream.values())
        programs = sum(-(-M // 32) for M in self.tokens_of_launches) * TILES * config.SPLIT_K
        assert simulation.switches >= programs - 1  # one a program, at least


@dataclass
class FewTokens(Case):
    """The same of the launch for few tokens: one row block, whose slices may be empty."""

    tokens_of_launches: tuple[int, ...] = (20, 7, 32)

    def expect(self, M: int) -> tuple:
        return ffn_few_tokens(tokens(M), *self.weights, self.activation, self.save_pre_act, self.config)

    def config_of(self, seed: int) -> Config:
        return self.config
