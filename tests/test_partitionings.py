"""The table of partitionings, against one worked out here from the two kinds of linear; and the shards it describes."""

import itertools
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tpffn_triton import partitionings
from tpffn_triton.partitionings import PARTITIONINGS, Region
from tpffn_triton.sharding import shard_ffn, unshard_ffn

pytestmark = pytest.mark.cpu_only

# How a tensor lies over the ranks.
WHOLE, OWN, PARTIAL = "whole", "own features", "partial sum"
# What makes one from another; a rank cuts its features out of a whole tensor by itself.
JOINS = {(PARTIAL, WHOLE): "all_reduce", (PARTIAL, OWN): "reduce_scatter", (OWN, WHOLE): "all_gather"}
INPUT = {"column": WHOLE, "row": OWN}
OUTPUT = {"column": OWN, "row": PARTIAL}
# Of a linear's gradient: what it takes, and what it makes of its input's.
GRADIENT_OF_OUTPUT = {"column": OWN, "row": WHOLE}
GRADIENT_OF_INPUT = {"column": PARTIAL, "row": OWN}


def ways(linear1, linear2):
    """Return region → ((has, needs) forward, (has, needs) backward), from x to y and from dy to dx."""
    before = OUTPUT[linear1]
    # The activation takes no partial sums; they are added to what Linear2 takes, which is the least.
    active = INPUT[linear2] if before == PARTIAL else before
    return {
        "x": ((WHOLE, INPUT[linear1]), (GRADIENT_OF_INPUT[linear1], WHOLE)),
        "pre_act": ((before, active), (active, GRADIENT_OF_OUTPUT[linear1])),
        "hidden": ((active, INPUT[linear2]), (GRADIENT_OF_INPUT[linear2], active)),
        "y": ((OUTPUT[linear2], WHOLE), (WHOLE, GRADIENT_OF_OUTPUT[linear2])),
    }


NAMES = [f"{linear1}_{linear2}" for linear1, linear2 in itertools.product(("column", "row"), repeat=2)]


@pytest.mark.parametrize("name", NAMES)
def test_regions_are_what_the_linears_need(name):
    p = PARTITIONINGS[name]
    assert (p.name, p.linear1, p.linear2) == (name, *name.split("_"))
    for region, (forward, backward) in ways(p.linear1, p.linear2).items():
        assert getattr(p, region) == Region(JOINS.get(forward), JOINS.get(backward)), region


def test_there_are_four():
    assert sorted(PARTITIONINGS) == sorted(NAMES)
    with pytest.raises(
        ValueError, match="partitioning 'col_row' is not one of column_row, row_row, column_column, row_c"
    ):
        partitionings.partitioning_of("col_row")


def rows_of(heading):
    """Return the cells of each row of the docstring's table below a heading."""
    lines = iter(partitionings.__doc__.splitlines())
    next(line for line in lines if line.split()[:2] == heading)
    rows = itertools.takewhile(str.strip, lines)
    return [re.split(r"  +", row.strip()) for row in rows]


def test_the_docstrings_tables_are_the_data():
    regions = {row[0]: row[1:] for row in rows_of(["region", "has"])}
    for name, (has, needs, *passes) in ((name, cells[:4]) for name, cells in regions.items()):
        expected = [None if kind == "–" else kind.replace("-", "_") for kind in passes]
        region = getattr(partitionings, name)
        assert [region.forward, region.backward] == expected, name
        used = [
            ways(p.linear1, p.linear2)[where][0]
            for p in PARTITIONINGS.values()
            for where in ("x", "pre_act", "hidden", "y")
            if getattr(p, where) == region
        ]
        assert set(used) == {(has, needs)}, name
    rows = rows_of(["partitioning", "x"])
    assert [row[0] for row in rows] == [*PARTITIONINGS]
    for name, *cells in rows:
        p = PARTITIONINGS[name]
        assert [p.x, p.pre_act, p.hidden, p.y] == [getattr(partitionings, cell) for cell in cells], name


def own(size, rank, world_size, halves=1):
    """Return this rank's indices of a dim of `size`, of which each half is cut by itself."""
    half = size // halves
    part = half // world_size
    return [h * half + rank * part + i for h in range(halves) for i in range(part)]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_this_ranks_features(name, world_size, activation):
    H, F, halves = 6, 12, 2 if activation == "swiglu" else 1
    W = halves * F
    w1, b1 = torch.arange(W * H).view(W, H), torch.arange(W)
    w2, b2 = torch.arange(H * F).view(H, F), torch.arange(H)
    shapes = PARTITIONINGS[name].shard_shapes(H, F, world_size, halves)
    for rank in range(world_size):
        place = rank, world_size
        features, gated, hidden = own(F, *place), own(W, *place, halves), own(H, *place)
        expected = {
            "column_row": (w1[gated], b1[gated], w2[:, features], b2),
            "row_row": (w1[:, hidden], b1[gated], w2[:, features], b2),
            "column_column": (w1[gated], b1[gated], w2[hidden], b2[hidden]),
            "row_column": (w1[:, hidden], b1, w2[hidden], b2[hidden]),
        }[name]
        shard = shard_ffn(w1, b1, w2, b2, *place, activation=activation, partitioning=name)
        for which, mine, right in zip(("w1", "b1", "w2", "b2"), shard, expected, strict=True):
            assert torch.equal(mine, right), which
            assert mine.is_contiguous()
            assert shapes[which] == mine.shape, which


@hypothesis.given(
    name=st.sampled_from(NAMES),
    H=st.integers(0, 9),
    F=st.integers(0, 5),
    world_size=st.integers(1, 6),
    b1=st.booleans(),
    b2=st.booleans(),
    activation=st.sampled_from(["gelu", "swiglu"]),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_unshard_inverts_shard(name, H, F, world_size, b1, b2, activation):
    halves = 2 if activation == "swiglu" else 1
    # Multiples of P where they are cut.
    H, F = H * (1 if name == "column_row" else world_size), F * (1 if name == "row_column" else world_size)
    full = (
        torch.randn(halves * F, H),
        torch.randn(halves * F) if b1 else None,
        torch.randn(H, F),
        torch.randn(H) if b2 else None,
    )
    options = {"activation": activation, "partitioning": name}
    shards = [shard_ffn(*full, rank, world_size, **options) for rank in range(world_size)]
    linear1, linear2 = name.split("_")
    for w1, _, w2, _ in shards:
        assert w1.shape == ((halves * F // world_size, H) if linear1 == "column" else (halves * F, H // world_size))
        assert w2.shape == ((H // world_size, F) if linear2 == "column" else (H, F // world_size))
        assert w1.is_contiguous()
        assert w2.is_contiguous()
    for again, original in zip(unshard_ffn(shards, **options), full, strict=True):
        assert again is original is None or torch.equal(again, original)


@pytest.mark.parametrize(
    ("name", "replicated"), [("column_row", 3), ("row_row", 3), ("column_column", None), ("row_column", 1)]
)
def test_replicated_pieces_that_differ_cannot_be_joined(name, replicated):
    full = torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)
    options = {"activation": "gelu", "partitioning": name}
    for changed, which in ((1, "b1"), (3, "b2")):
        shards = [list(shard_ffn(*full, rank, 2, **options)) for rank in range(2)]
        shards[1][changed] = shards[1][changed] + 1
        if changed == replicated:
            with pytest.raises(ValueError, match=f"{which} is replicated, but rank 1's differs from rank 0's"):
                unshard_ffn(shards, **options)
        else:
            unshard_ffn(shards, **options)


@pytest.mark.parametrize(
    ("name", "cuts_hidden", "cuts_features"),
    [
        ("column_row", False, True),
        ("row_row", True, True),
        ("column_column", True, True),
        ("row_column", True, False),
    ],
)
def test_sizes_that_are_cut_are_multiples_of_p(name, cuts_hidden, cuts_features):
    p = PARTITIONINGS[name]
    for H, F, wrong in ((6, 8, cuts_hidden and "hidden_size 6"), (8, 6, cuts_features and "ffn_hidden_size 6")):
        full = torch.randn(F, H), torch.randn(F), torch.randn(H, F), torch.randn(H)
        calls = (
            lambda H=H, F=F: p.shard_shapes(H, F, 4),
            lambda full=full: shard_ffn(*full, 0, 4, activation="gelu", partitioning=name),
        )
        for call in calls:
            if wrong:
                with pytest.raises(ValueError, match=rf"{wrong} is not divisible by the .* world_size 4 \({name}\)"):
                    call()
            else:
                call()


def test_shards_of_another_partitioning_do_not_join():
    full = torch.randn(24, 8), torch.randn(24), torch.randn(8, 12), torch.randn(8)
    for one, other in itertools.permutations(NAMES, 2):
        shards = [shard_ffn(*full, rank, 2, activation="swiglu", partitioning=one) for rank in range(2)]
        # Of other sizes some are shapes of the other's shards, but for what is replicated.
        message = rf"{other} with swiglu over 2 ranks.*; got x None, w1 \[|b[12] is replicated, but rank 1's differs"
        with pytest.raises(ValueError, match=message):
            unshard_ffn(shards, activation="swiglu", partitioning=other)
    with pytest.raises(ValueError, match="partitioning 'rows' is not one of"):
        shard_ffn(*full, 0, 2, activation="swiglu", partitioning="rows")
    with pytest.raises(ValueError, match="partitioning 'rows' is not one of"):
        unshard_ffn(shards, activation="swiglu", partitioning="rows")
