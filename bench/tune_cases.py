"""Say what is tuned: the kernels that matter in each regime, at the sizes of its shards (shards.py).

A case is one kernel, arithmetic and size, as `configuration` in kernels/_launch.py is asked for it; W is F/P, or 2F/P
where the activation is gated:

    kernel                         rows      cols     inner
    ffn, linear_act, linear_dact   M         F/P      H       and the gated ones
    few_tokens                     M ≤ 64    F/P      H       likewise
    linear                         M         H        F/P
    dgrad                          M         H        W
    wgrad                          W, H      H, F/P   M       dw1, dw2
    weight_grads                   W + F/P   H        M
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import checkout  # noqa: F401
from shards import GRIDS, Shard, shard
from workloads import Shape

from tpffn_triton.kernels._configs import KERNELS


class Case(NamedTuple):
    """What a configuration is looked for; see the module docstring."""

    kernel: str
    arithmetic: str
    rows: int
    cols: int
    inner: int

    def __str__(self) -> str:
        return f"{self.kernel} [{self.rows}, {self.cols}] over {self.inner}, {self.arithmetic}"


# Tokens of which a kernel for few tokens makes one tile, at most.
FEW = 64
# In the order in which they are tuned: what a budget cuts off is at the end.
_ALL = ("few_tokens", "ffn", "linear_act", "linear", "linear_dact", "dgrad", "weight_grads", "wgrad")
# The kernels that matter in a regime: decoding has no backward and is one launch; where the layer is wide and the
# tokens are many, forward is two launches and each weight gradient its own.
KERNELS_OF = {
    "analysed": _ALL,
    "decode": ("few_tokens", "ffn"),
    "training": _ALL,
    "wide": ("linear_act", "linear", "linear_dact", "dgrad", "wgrad"),
}


def shards_of(regimes: Iterable[str]) -> list[Shard]:
    """Return the shards of these regimes on a GPU."""
    return [s for name in regimes for s in GRIDS["cuda"] if s.regime == name]


def given_shard(tokens: int, hidden: int, ffn: int) -> Shard:
    """Return a shard of no regime, with which every kernel is tuned."""
    return shard("other", f"{tokens}x{hidden}x{ffn}", tokens, hidden, ffn)


# Without a GPU, where times mean nothing.
REHEARSAL = given_shard(32, 64, 96)


def cases_of(kernel: str, shape: Shape, arithmetic: str, gated: bool) -> list[Case]:
    """Return the cases of a shard's shape, of a kernel by the name that it has where nothing is gated."""
    m, h, f = shape.tokens, shape.hidden, shape.ffn
    few = m <= FEW and arithmetic == "16bit"  # then forward is few_tokens, and ffn is not launched
    if few if kernel == "ffn" else kernel == "few_tokens" and not few:
        return []
    w = 2 * f if gated else f
    name = f"gated_{kernel}" if gated and f"gated_{kernel}" in KERNELS else kernel
    sizes = {
        "linear": [(m, h, f)],
        "dgrad": [(m, h, w)],
        "wgrad": [(w, h, m), (h, f, m)],
        "weight_grads": [(w + f, h, m)],
    }.get(kernel, [(m, f, h)])
    return [Case(name, arithmetic, *size) for size in sizes]


def all_cases(shards: Sequence[Shard], kernels: Iterable[str], arithmetic: str) -> list[Case]:
    """Return what is tuned of these kernels at these shards, kernel by kernel, where nothing is gated first."""
    found = [
        case
        for gated in (False, True)
        for kernel in _ALL
        for s in shards
        if kernel in KERNELS_OF.get(s.regime, _ALL)
        for case in cases_of(kernel, s.shape, arithmetic, gated)
    ]
    wanted = set(kernels)
    return [case for case in dict.fromkeys(found) if case.kernel in wanted]
