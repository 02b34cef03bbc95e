"""Run one launch of both GEMMs in one simulated schedule, and compare it with the two launches that it replaces, or,
for few tokens, whose reductions may be split, with itself where nothing interleaves."""

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
    """A configuration, and what three launches of it give, of TOKENS tokens one after the other."""

    activation: str
    config: Config
    save_pre_act: bool

    def __post_init__(self) -> None:
        self.weights = weights(self.activation)
        options = (self.activation, self.save_pre_act, self.config)
        self.expected = [two_launches(tokens(M), *self.weights, *options) for M in TOKENS]

    def check(self, ffn_single_launch, counters: ModuleType, seed: int, resident: int | None, **options) -> None:
        """Run one schedule. Raises: a Fault of the simulator; AssertionError: other results, or counters that are not
        zero afterwards."""
        order = "random" if seed % 2 else "ascending"
        config = replace(self.config, GROUP_M=8 if seed // 2 % 2 else 1)
        with Simulation(seed=seed, resident=resident, order=order, **options) as simulation:
            for M, expected in zip(TOKENS, self.expected, strict=True):
                results = ffn_single_launch(tokens(M), *self.weights, self.activation, self.save_pre_act, config=config)
                assert_same(results, expected)
                assert not any(kept.any() for kept in counters._of_stream.values())
        assert simulation.switches >= sum(-(-M // 32) for M in TOKENS) * 5 - 1  # one a program, at least


# One row block of 32; five tiles of act and y together, of which slices may be empty.
FEW = (20, 7, 32)


@dataclass
class FewTokens:
    """The same as Case of the launch for few tokens, of FEW tokens one launch after the other."""

    activation: str
    config: Config
    save_pre_act: bool

    def __post_init__(self) -> None:
        self.weights = weights(self.activation)
        self.options = (self.activation, self.save_pre_act, self.config)
        self.expected = [ffn_few_tokens(tokens(M), *self.weights, *self.options) for M in FEW]

    def check(self, ffn_few_tokens, counters: ModuleType, seed: int, resident: int | None, **options) -> None:
        """As Case.check."""
        order = "random" if seed % 2 else "ascending"
        with Simulation(seed=seed, resident=resident, order=order, **options) as simulation:
            for M, expected in zip(FEW, self.expected, strict=True):
                results = ffn_few_tokens(tokens(M), *self.weights, *self.options)
                assert_same(results, expected)
                assert not any(kept.any() for kept in counters._of_stream.values())
        assert simulation.switches >= len(FEW) * 5 * self.config.SPLIT_K - 1  # one a program, at least
