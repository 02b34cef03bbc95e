"""Name the four ways to split Linear1 and Linear2 over P ranks, and say which collectives join each.

    column-parallel   a rank has some of the output features: it needs the whole input, and makes those features
    row-parallel      a rank has some of the input features: it needs those alone, and makes partial sums of the output

x, y, dy and dx are whole on every rank. What a rank has made meets what the next step needs in a region:

    region            has           needs          forward           backward
    KEEP              own features  own features   –                 –
    COPY              whole         whole          –                 all-reduce        each rank's gradient is a term
    SPLIT             whole         own features   –                 all-gather
    REDUCE            partial sum   whole          all-reduce        –
    REDUCE_SCATTER    partial sum   own features   reduce-scatter    all-gather
    GATHER            own features  whole          all-gather        reduce-scatter    each rank's gradient is a term
    JOIN              own features  whole          all-gather        –                 every rank has the whole gradient

    partitioning      x        pre_act           hidden    y
    column_row        COPY     KEEP              KEEP      REDUCE
    row_row           SPLIT    REDUCE_SCATTER    KEEP      REDUCE
    column_column     COPY     KEEP              GATHER    JOIN
    row_column        SPLIT    REDUCE            COPY      JOIN

The activation is not linear: partial sums of the pre-activation are added before the bias and the activation.

Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3, for the two kinds of linear and for column_row.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """The kind of collective in each pass; None: none."""

    forward: str | None
    backward: str | None


KEEP = Region(None, None)
COPY = Region(None, "all_reduce")
SPLIT = Region(None, "all_gather")
REDUCE = Region("all_reduce", None)
REDUCE_SCATTER = Region("reduce_scatter", "all_gather")
GATHER = Region("all_gather", "reduce_scatter")
JOIN = Region("all_gather", None)


@dataclass(frozen=True)
class Partitioning:
    """How the linears are split, "column" or "row", and the regions before Linear1, at its output before and after the
    activation, and after Linear2."""

    name: str
    linear1: str
    linear2: str
    x: Region
    pre_act: Region
    hidden: Region
    y: Region

    @functools.cached_property
    def cuts(self) -> dict[str, int | None]:
        """The dim of each parameter, in nn.Linear's layout, that is cut into P parts; None: every rank has it whole."""
        column1, column2 = self.linear1 == "column", self.linear2 == "column"
        return {
            "w1": 0 if column1 else 1,
            # Added where the activation is applied: to what pre_act's region leaves.
            "b1": 0 if column1 or self.pre_act == REDUCE_SCATTER else None,
            "w2": 0 if column2 else 1,
            "b2": 0 if column2 else None,
        }

    @property
    def cut_sizes(self) -> tuple[str, ...]:
        """Which of hidden_size and ffn_hidden_size P must divide."""
        by_features = self.linear1 == "column" or self.linear2 == "row"
        by_hidden = self.linear1 == "row" or self.linear2 == "column"
        return ("ffn_hidden_size",) * by_features + ("hidden_size",) * by_hidden

    def check_divisible(self, hidden_size: int, ffn_hidden_size: int, world_size: int) -> None:
        """Raises: ValueError: P does not divide a size that is cut (the message shows them)."""
        sizes = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size}
        for name in self.cut_sizes:
            if sizes[name] % world_size:
                raise ValueError(
                    f"{name} {sizes[name]} is not divisible by the tensor-parallel world_size {world_size} "
                    f"({self.name})"
                )

    def shard_shapes(
        self, hidden_size: int, ffn_hidden_size: int, world_size: int, halves: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter on every rank; halves: 2 where the activation is gated.

        Raises: ValueError: as check_divisible.
        """
        self.check_divisible(hidden_size, ffn_hidden_size, world_size)
        width = halves * ffn_hidden_size
        full = {"w1": (width, hidden_size), "b1": (width,), "w2": (hidden_size, ffn_hidden_size), "b2": (hidden_size,)}
        return {
            name: tuple(size // world_size if dim == self.cuts[name] else size for dim, size in enumerate(shape))
            for name, shape in full.items()
        }


PARTITIONINGS = {
    p.name: p
    for p in (
        Partitioning("column_row", "column", "row", x=COPY, pre_act=KEEP, hidden=KEEP, y=REDUCE),
        Partitioning("row_row", "row", "row", x=SPLIT, pre_act=REDUCE_SCATTER, hidden=KEEP, y=REDUCE),
        Partitioning("column_column", "column", "column", x=COPY, pre_act=KEEP, hidden=GATHER, y=JOIN),
        Partitioning("row_column", "row", "column", x=SPLIT, pre_act=REDUCE, hidden=COPY, y=JOIN),
    )
}


def partitioning_of(name: str) -> Partitioning:
    """Raises: ValueError: no partitioning of this name (the message lists them)."""
    if name not in PARTITIONINGS:
        raise ValueError(f"partitioning {name!r} is not one of {', '.join(PARTITIONINGS)}")
    return PARTITIONINGS[name]
