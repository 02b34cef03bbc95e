"""Wrong arguments of a partitioned layer: an error with the values, on every rank, before any collective."""

import datetime
import re

import pytest
import torch
from exchanges import new_group
from ffn_cases import draw, shards
from launches import CountCollectives
from rank_pool import use

from tpffn_triton import native
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.partitionings import PARTITIONINGS

pytestmark = pytest.mark.cpu_only

# Of the layers here; P = 2.
H, F = 8, 12
TIMEOUT = datetime.timedelta(seconds=20)


def call(x, w1, b1, w2, b2, group=None, **options):
    with CountCollectives() as collectives:
        try:
            return partitioned_ffn(x, w1, w2, b1, b2, tp_group=group, **options)
        except (TypeError, ValueError):
            assert not collectives.get_total_counts(), "it communicated first"
            raise


def one_wrong_rank(rank, world_size, partitioning, fault):
    """Make a good call, but on rank 1."""
    use("native")
    problem = draw((4, 2), H, F)
    options = {"partitioning": partitioning, "activation": "gelu", "group": new_group(world_size, timeout=TIMEOUT)}
    x, (w1, b1, w2, b2) = problem.x, shards(problem, rank, world_size, partitioning)
    if rank == 1:
        if fault == "name":
            options["partitioning"] = "rows"
        elif fault == "activation":
            options["activation"] = "tanh"
        elif fault == "another's shards":
            other = {"column_row": "column_column", "row_row": "column_row"}.get(partitioning, "row_row")
            w1, b1, w2, b2 = shards(problem, rank, world_size, other)
        elif fault == "dtypes":
            b1 = b1.double()
        elif fault == "no tensor":
            w2 = w2.tolist()
        elif fault == "hidden size":
            x = x[..., 1:]
        elif fault == "vector":
            w1 = w1[0]
        elif fault == "tokens":
            x = x[:3]
        elif fault == "dtype":
            x, w1, b1, w2, b2 = (t.double() for t in (x, w1, b1, w2, b2))
        elif fault == "another activation":
            options["activation"] = "relu"
        elif fault == "recorded":
            w2 = w2.clone().requires_grad_()
        elif fault == "no b1":
            b1 = None
        elif fault == "no b2":
            b2 = None
        elif fault == "another name":
            # The shape of w1 is the same.
            linear1, linear2 = partitioning.split("_")
            options["partitioning"] = f"{linear1}_{'row' if linear2 == 'column' else 'column'}"
            w1, b1, w2, b2 = shards(problem, rank, world_size, options["partitioning"])
            b1 = None if partitioning.startswith("row") else b1
    call(x, w1, b1, w2, b2, **options)


REJECTED = {
    "name": "partitioning 'rows' is not one of column_row, row_row, column_column, row_column",
    "activation": "activation 'tanh' is not one of gelu, ",
    "another's shards": r"NAME with gelu over 2 ranks, by w2 H=\d+, F=\d+: expects x .*; got x \[4, 2, 8\], w1 \[",
    "dtypes": r"one dtype expected .*, got x torch.float32, .* b1 torch.float64",
    "no tensor": "w2 must be a tensor, got list",
    "hidden size": r"NAME with gelu over 2 ranks, by w2 H=8, F=12: expects x \[..., 8\], .*; got x \[4, 2, 7\]",
    "vector": r"NAME expects x \[..., H\] and two matrices; got x \[4, 2, 8\], w1 \[\d+\]",
}
DISAGREEING = {
    "tokens": r"rank 0: x \[4, 2, 8\].*\n  rank 1: x \[3, 2, 8\]",
    "dtype": r"rank 0: .*torch.float32.*\n  rank 1: .*torch.float64",
    "another activation": r"rank 0: .*, gelu, NAME.*\n  rank 1: .*, relu, NAME",
    "recorded": r"rank 0: .*, no gradients.*\n  rank 1: .*, gradients",
    "no b1": r"rank 0: .*, b1, .*\n  rank 1: .*, no b1, ",
    "no b2": r"rank 0: .*, b2.*\n  rank 1: .*, no b2",
    "another name": r"rank 0: .*, gelu, NAME, .*\n  rank 1: .*, gelu, (?!NAME)(row|column)_(row|column), ",
}


@pytest.mark.parametrize("fault", [*REJECTED, *DISAGREEING])
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_one_wrong_rank_leaves_nobody_hanging(partitioning, fault, ranks_of):
    outcomes = ranks_of(2).outcomes(one_wrong_rank, partitioning, fault, timeout=60)
    expected = (REJECTED | DISAGREEING)[fault].replace("NAME", partitioning)
    for rank, (ok, error) in enumerate(outcomes):
        assert not ok, f"rank {rank} did not notice"
        kind, message, _ = error
        assert kind in ("ValueError", "TypeError")
        other = f"rank 1 rejected: {expected}" if fault in REJECTED and rank == 0 else expected
        assert re.search(other, message), message


def odd_sizes(rank, world_size, partitioning, x, w1, b1, w2, b2):
    shapes = x, w1, b1, w2, b2
    call(*(torch.ones(shape) for shape in shapes), partitioning=partitioning, group=new_group(world_size))


@pytest.mark.parametrize(
    ("partitioning", "size", "shapes"),
    [
        ("row_row", "hidden_size 7", ((4, 7), (12, 3), (6,), (7, 6), (7,))),
        ("column_column", "ffn_hidden_size 7", ((4, 8), (3, 8), (3,), (4, 7), (4,))),
    ],
)
def test_a_size_that_p_does_not_divide(partitioning, size, shapes, ranks_of):
    for ok, error in ranks_of(2).outcomes(odd_sizes, partitioning, *shapes, timeout=60):
        assert not ok
        assert error[0] == "ValueError"
        assert f"{size} is not divisible by the tensor-parallel world_size 2 ({partitioning})" in error[1]


def different_biases(rank, world_size, partitioning, which):
    use("native")
    problem = draw((4, 2), H, F)
    w1, b1, w2, b2 = shards(problem, rank, world_size, partitioning)
    b1, b2 = (b + rank if name == which else b for name, b in (("b1", b1), ("b2", b2)))
    call(problem.x, w1, b1, w2, b2, partitioning=partitioning, group=new_group(world_size))


@pytest.mark.parametrize(
    ("partitioning", "replicated"),
    [("column_row", "b2"), ("row_row", "b2"), ("column_column", None), ("row_column", "b1")],
)
def test_replicated_biases_that_differ(partitioning, replicated, ranks_of):
    for which in ("b1", "b2"):
        for ok, error in ranks_of(2).outcomes(different_biases, partitioning, which, timeout=60):
            assert ok == (which != replicated)
            assert ok or (error[0] == "ValueError" and re.search(rf"rank 1: {which} has digest", error[1]))


def infinite_shard(rank, world_size, partitioning, which):
    use("native")
    problem = draw((4, 2), H, F)
    w1, b1, w2, b2 = shards(problem, rank, world_size, partitioning)
    (w1, b1, w2, b2)[which].fill_(float("inf") if rank == 1 else 1)
    call(problem.x, w1, b1, w2, b2, partitioning=partitioning, group=new_group(world_size))


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_what_is_infinite_on_one_rank(partitioning, ranks_of):
    for which, name in enumerate(("w1", "b1", "w2", "b2")):
        for ok, error in ranks_of(2).outcomes(infinite_shard, partitioning, which, timeout=60):
            assert not ok
            assert error[0] == "ValueError"
            assert f"rank 1: {name} has NaN or infinity" in error[1]


def fails_later(rank, world_size, partitioning, what):
    """Make good calls, until nothing is compared; then rank 1 fails on its way through another."""
    use("native")
    group = new_group(world_size, timeout=datetime.timedelta(seconds=3))
    problem = draw((4, 2), H, F)
    w1, b1, w2, b2 = (t.requires_grad_() for t in shards(problem, rank, world_size, partitioning))
    options = {"partitioning": partitioning, "group": group}
    for _ in range(6):
        call(problem.x, w1, b1, w2, b2, **options).backward(problem.dy)

    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and what != "arguments":
            patch.setattr(native, what, out_of_memory)
        x = problem.x[..., 1:] if rank == 1 and what == "arguments" else problem.x
        call(x, w1, b1, w2, b2, **options).backward(problem.dy)


@pytest.mark.parametrize(
    ("partitioning", "what", "note"),
    [
        ("column_column", "arguments", r"rank 1 rejected: column_column with gelu .* got x \[4, 2, 7\]"),
        ("row_column", "activate", "rank 1 raised RuntimeError: out of memory"),
        ("column_column", "dact", "rank 1 raised RuntimeError: out of memory"),
    ],
)
def test_a_rank_that_fails_on_its_way_is_named(partitioning, what, note, ranks_of):
    (ok, error), (fine, own) = ranks_of(2).outcomes(fails_later, partitioning, what, timeout=60)
    assert not ok
    assert not fine
    assert own[0] == ("ValueError" if what == "arguments" else "RuntimeError")
    assert error[0] == "CollectiveError"
    assert re.search(note, error[1]), error[1]


def test_one_rank_without_a_group():
    problem = draw((4, 2), H, F)
    for name in PARTITIONINGS:
        x, w1, w2, b1, b2 = problem.leaves()
        with pytest.raises(ValueError, match=rf"{name} with gelu over 1 ranks, by w2 H=8, F=12: .*; got x \[4, 2, 8\]"):
            call(x, w1[1:], b1, w2, b2, partitioning=name)
    with pytest.raises(ValueError, match="partitioning None is not one of column_row"):
        call(x, w1, b1, w2, b2, partitioning=None)
    with pytest.raises(TypeError, match="tp_group must be None, a ProcessGroup or a 1-D DeviceMesh, got str"):
        call(x, w1, b1, w2, b2, partitioning="row_row", group="tp")
