"""Name the shards that peers are compared on, by what bounds them on a GPU.

A shard is one rank's part of a layer: M tokens, H, F/P. Nothing is communicated, so P is 1 here.

    analysed   the model analysed in docs/analysis.md at P=4: launches, filling and draining
    decode     few tokens: the weights' bytes
    wide       many tokens, wide layers: the tensor cores
    training   a step's tokens through one shard of a wide layer
    other      sizes from the command line
"""

from dataclasses import dataclass

import checkout  # noqa: F401
from workloads import Shape


@dataclass(frozen=True)
class Shard:
    """A shape and its regime."""

    regime: str
    shape: Shape


def shard(regime: str, name: str, tokens: int, hidden: int, ffn: int) -> Shard:
    """Return a shard of M tokens. Raises: ValueError: a size below 1."""
    return Shard(regime, Shape(name, 1, tokens, hidden, ffn, tp=1))


_ANALYSED = shard("analysed", "analysed", 1024, 1024, 1024)
_WIDE = ((4096, 4096), (8192, 3584))  # H, F/P
# What is measured by default. On a CPU decode is small: the wide one takes a GPU's memory bandwidth.
GRIDS: dict[str, tuple[Shard, ...]] = {
    "cuda": (
        _ANALYSED,
        *(shard("decode", f"decode-{m}", m, 8192, 3584) for m in (1, 4, 16, 64)),
        *(shard("wide", f"wide-{m}x{h}", m, h, f) for m in (4096, 8192, 16384) for h, f in _WIDE),
        shard("training", "training", 4096, 4096, 2048),
    ),
    "cpu": (_ANALYSED, *(shard("decode", f"decode-{m}-small", m, 1024, 1024) for m in (1, 16, 64))),
}
REGIMES = tuple(dict.fromkeys(s.regime for s in GRIDS["cuda"]))
SHARDS = {s.shape.name: s for grid in GRIDS.values() for s in grid}
# Where what is tuned for minutes is tuned: the analysed shard and the first wide one.
TUNED_AT = ("analysed", next(name for name, s in SHARDS.items() if s.regime == "wide"))
