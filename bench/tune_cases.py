"""Say what is tuned: the kernels that matter in each regime, at its sizes.

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


class Shard(NamedTuple):
    """One rank's shard: tokens M, hidden H, features F/P."""

    tokens: int
    hidden: int
    ffn: int


# Tokens of which a kernel for few tokens makes one tile, at most.
FEW = 64
# In the order in which they are tuned: what a budget cuts off is at the end.
_ALL = ("few_tokens", "ffn", "linear_act", "linear", "linear_dact", "dgrad", "weight_grads", "wgrad")
_WIDTHS = ((4096, 4096), (8192, 3584))
# The shards of a regime, and the kernels that matter there: decoding has no backward and is one launch; where the layer
# is wide and the tokens are many, forward is two launches and each weight gradient its own.
REGIMES: dict[str, tuple[tuple[Shard, ...], tuple[str, ...]]] = {
    "analysed": ((Shard(1024, 1024, 1024),), _ALL),
    "decode": (tuple(Shard(tokens, 8192, 3584) for tokens in (1, 4, 16, 64)), ("few_tokens", "ffn")),
    "training": ((Shard(4096, 4096, 2048),), _ALL),
    "wide": (
        tuple(Shard(tokens, *width) for tokens in (4096, 8192, 16384) for width in _WIDTHS),
        ("linear_act", "linear", "linear_dact", "dgrad", "wgrad"),
    ),
}
# Without a GPU, where times mean nothing.
REHEARSAL = Shard(32, 64, 96)


def cases_of(kernel: str, shard: Shard, arithmetic: str, gated: bool) -> list[Case]:
    """Return the cases of a shard, of a kernel by the name that it has where nothing is gated."""
    m, h, f = shard
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


def all_cases(
    regimes: Iterable[str], kernels: Iterable[str], arithmetic: str, shards: Sequence[Shard] = ()
) -> list[Case]:
    """Return what is tuned of these kernels, kernel by kernel, where nothing is gated first.

    shards: these, with every kernel, in place of the regimes.
    """
    chosen = [(tuple(shards), _ALL)] if shards else [REGIMES[name] for name in regimes]
    found = [
        case
        for gated in (False, True)
        for kernel in _ALL
        for sizes, used in chosen
        if kernel in used
        for shard in sizes
        for case in cases_of(kernel, shard, arithmetic, gated)
    ]
    wanted = set(kernels)
    return [case for case in dict.fromkeys(found) if case.kernel in wanted]
