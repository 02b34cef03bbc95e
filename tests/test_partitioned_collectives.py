"""What the ranks of each partitioning exchange, when, and what they keep: counted as it runs, beside the plan."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ffn_cases import NAMES, draw, ours, shards
from launches import CountCollectives, RecordOperators
from rank_pool import use

from tpffn_triton import native, partitioned
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn

pytestmark = pytest.mark.cpu_only

REDUCE, GATHER, SCATTER = "all_reduce", "all_gather", "reduce_scatter"
# (kind, width of the full tensor) in order; H of x and y, F of the hidden, W of the pre-activation: F, gated 2F.
TABLE = {
    "column_row": ([(REDUCE, "H")], [(REDUCE, "H")]),
    "row_row": ([(SCATTER, "W"), (REDUCE, "H")], [(GATHER, "W"), (GATHER, "H")]),
    "column_column": ([(GATHER, "F"), (GATHER, "H")], [(SCATTER, "F"), (REDUCE, "H")]),
    "row_column": ([(REDUCE, "W"), (GATHER, "H")], [(REDUCE, "F"), (GATHER, "H")]),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def observed(rank, world_size, partitioning, shape, activation, dtype, bias):
    """Run both passes; return the calls of each, the shapes of what is given and returned, and of what is saved."""
    use("native")
    B, S, H, F = shape
    problem = draw((B, S), H, F, activation=activation, dtype=dtype, bias=bias)
    options = {"partitioning": partitioning, "activation": activation, "tp_group": dist.group.WORLD}
    w1, b1, w2, b2 = (
        None if t is None else t.requires_grad_() for t in shards(problem, rank, world_size, partitioning)
    )
    given = {"x": problem.x.requires_grad_(), "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = (t.shape, t.untyped_storage().nbytes())
        return t

    with CountCollectives() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = partitioned_ffn(*given.values(), **options)
    with CountCollectives() as backward:
        y.backward(problem.dy)
    for t in (w1, w2):
        del saved[t.untyped_storage().data_ptr()]
    found = (
        given | {"y": y, "dy": problem.dy} | {f"d{name}": None if t is None else t.grad for name, t in given.items()}
    )
    shapes = {name: tuple(t.shape) for name, t in found.items() if t is not None}
    return (
        forward.calls,
        backward.calls,
        shapes,
        [(math.prod(shape), shape[-1], nbytes) for shape, nbytes in saved.values()],
    )


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_collectives_are_those_of_the_table(partitioning, world_size, activation, ranks_of):
    B, S, H, F = 2, 3, 8, 24
    widths = {"H": H, "F": F, "W": 2 * F if activation == "swiglu" else F}
    expected = [[(kind, B * S * widths[width]) for kind, width in calls] for calls in TABLE[partitioning]]
    case = partitioning, (B, S, H, F), activation, torch.float32, True
    for forward, backward, *_ in ranks_of(world_size).run(observed, *case):
        assert [forward, backward] == expected


CASES = [
    (2, (2, 3, 8, 24), "gelu", "fp32", True),
    (2, (1, 5, 24, 8), "geglu", "bf16", True),
    (2, (3, 2, 16, 16), "relu", "fp16", False),
    (4, (2, 3, 8, 24), "swiglu", "fp32", True),
    (4, (1, 1, 4, 12), "silu", "bf16", False),
    (4, (4, 2, 24, 8), "relu2", "fp16", True),
]


@pytest.mark.parametrize(("world_size", "shape", "activation", "dtype", "bias"), CASES, ids=str)
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_the_plan_is_what_runs(partitioning, world_size, shape, activation, dtype, bias, ranks_of):
    """Collectives in order, by kind and elements; the shape of every tensor that comes or goes; saved bytes."""
    plan = plan_ffn(*shape, world_size, dtype=dtype, activation=activation, bias=bias, partitioning=partitioning)
    planned = [
        [(c.kind, c.elements) for c in plan.collectives if c.pass_ == pass_] for pass_ in ("forward", "backward")
    ]
    tensors = {t.name: t for t in plan.tensors}
    kept = Counter((tensors[name].elements, tensors[name].shape[-1]) for name in plan.saved_for_backward)
    case = partitioning, shape, activation, DTYPES[dtype], bias
    for *calls, shapes, saved in ranks_of(world_size).run(observed, *case):
        assert calls == planned
        assert shapes == {name: tensors[name].shape for name in shapes}
        assert len(shapes) == (12 if bias else 8)
        assert Counter((elements, width) for elements, width, _ in saved) == kept
        assert sum(nbytes for *_, nbytes in saved) == plan.totals["saved_bytes"]


def order_of_backward(rank, world_size, partitioning):
    use("native")
    problem = draw((4, 8), 32, 48)
    names = ("start_all_reduce", "start_all_gather", "start_reduce_scatter", "wait")
    w1, b1, w2, b2 = (t.requires_grad_() for t in shards(problem, rank, world_size, partitioning))
    y = partitioned_ffn(
        problem.x.requires_grad_(), w1, w2, b1, b2, partitioning=partitioning, tp_group=dist.group.WORLD
    )
    events = []

    def recorded(module, name):
        function = getattr(module, name)
        return lambda *args: events.append(name) or function(*args)

    # Its own passes over memory, not those inside of an operator.
    passes = SimpleNamespace(**{name: recorded(native, name) for name in ("activate", "dact")})
    with pytest.MonkeyPatch.context() as patch, RecordOperators(events):
        patch.setattr(partitioned, "native", passes)
        for name in names:
            patch.setattr(partitioned, name, recorded(partitioned, name))
        y.backward(problem.dy)
    return events


BACKWARDS = {
    "column_row": "linear_dact dgrad START weight_grads wait",
    "row_row": "linear_dact START column_sum wgrad column_sum wait dgrad START wgrad wait",
    "column_column": "dgrad START wgrad column_sum wait dact column_sum dgrad START wgrad wait",
    "row_column": "dgrad START activate wgrad column_sum wait dact column_sum dgrad START wgrad wait",
}


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_exchanges_are_in_flight_behind_gradients(partitioning, ranks_of):
    """Linear2's gradients behind the first exchange, Linear1's behind dx's."""
    expected = BACKWARDS[partitioning]
    for kind, _ in TABLE[partitioning][1]:
        expected = expected.replace("START", f"start_{kind}", 1)
    for events in ranks_of(2).run(order_of_backward, partitioning):
        assert " ".join(events) == expected


def group_of_one(rank, world_size, partitioning):
    use("native")
    own_group = [dist.new_group([r]) for r in range(world_size)][rank]
    problem = draw((4,), 32, 48)
    with CountCollectives() as counted:
        grouped = ours(problem, group=own_group, partitioning=partitioning)
    assert counted.get_total_counts() == 0
    for name, a, b in zip(NAMES, ours(problem), grouped, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_a_group_of_one_rank_does_not_communicate(partitioning, ranks_of):
    ranks_of(2).run(group_of_one, partitioning)
