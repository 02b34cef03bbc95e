"""One random FFN problem, and its results three ways: ours, eager in the same dtype, exact in fp64.

Used with one process and with P: every rank draws the same full tensors from the same seed and keeps its shards.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from acceptance import assert_accurate
from rank_pool import use
from torch import Tensor

import tpffn_triton as tp
from tpffn_triton.kernels.activations import GATED_ACTIVATIONS, halves
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.reference import ACTIVATIONS, ffn_reference
from tpffn_triton.regions import (
    copy_to_tp_region,
    gather_from_sp_region,
    reduce_from_tp_region,
    reduce_scatter_to_sp_region,
)
from tpffn_triton.sharding import shard_ffn

NAMES = ("y", "dx", "dw1", "dw2", "db1", "db2")


@dataclass
class Problem:
    """Full tensors: x, dy [..., H], w1 [F, H], w2 [H, F], b1 [F], b2 [H]; gated: w1 [2F, H], b1 [2F]; biases may be
    None."""

    x: Tensor
    dy: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    activation: str

    def leaves(self) -> tuple:
        """Return (x, w1, w2, b1, b2)."""
        return self.x, self.w1, self.w2, self.b1, self.b2


def draw(lead, H, F, *, activation="gelu", dtype=torch.float32, device="cpu", bias=True, seed=0) -> Problem:
    """Draw x and dy standard normal, weights at nn.Linear's scale; lead is the tuple of leading dims."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    x, dy = randn(*lead, H), randn(*lead, H)
    W = halves(activation) * F
    w1, w2 = randn(W, H, scale=max(H, 1) ** -0.5), randn(H, F, scale=max(F, 1) ** -0.5)
    b1, b2 = (randn(W, scale=0.3), randn(H, scale=0.3)) if bias else (None, None)
    return Problem(x, dy, w1, w2, b1, b2, activation)


def small_integers(problem: Problem) -> Problem:
    """Replace the values of a problem by their signs; gates move to ±128, where gelu is exactly identity or zero."""
    for name in ("x", "dy", "w1", "w2", *(("b1", "b2") if problem.b1 is not None else ())):
        setattr(problem, name, getattr(problem, name).sign())
    if problem.activation in GATED_ACTIVATIONS:
        F = problem.w2.shape[1]
        problem.b1[:F] += 128 * (1 - 2 * (torch.arange(F, device=problem.b1.device) % 2)).to(problem.b1.dtype)
    return problem


def results(function, leaves, dy) -> tuple:
    """Return (y, dx, dw1, dw2, db1, db2) of y = function(x, w1, w2, b1, b2)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    y.backward(dy)
    return (y.detach(), *(None if t is None else t.grad for t in leaves))


def ours(problem: Problem, rank=0, world_size=1, group=None, **options) -> tuple:
    """Run tp.ffn, or with the option partitioning partitioned_ffn, on this rank's shards; with the option
    sequence_parallel on its tokens."""
    x, dy = tokens(problem, rank, world_size, options.get("sequence_parallel", False))
    w1, b1, w2, b2 = shards(problem, rank, world_size, options.get("partitioning", "column_row"))
    ffn = partitioned_ffn if "partitioning" in options else tp.ffn
    return results(
        lambda *t: ffn(*t, activation=problem.activation, tp_group=group, **options), (x, w1, w2, b1, b2), dy
    )


def eager(problem: Problem, rank=0, world_size=1, group=None, sequence_parallel=False) -> tuple:
    """Run the same shards through separate torch operations and Megatron's regions."""
    enter = gather_from_sp_region if sequence_parallel else copy_to_tp_region
    leave = reduce_scatter_to_sp_region if sequence_parallel else reduce_from_tp_region

    def function(x, w1, w2, b1, b2):
        hidden = ACTIVATIONS[problem.activation](F.linear(enter(x, group), w1, b1))
        y = leave(F.linear(hidden, w2), group)
        return y if b2 is None else y + b2

    x, dy = tokens(problem, rank, world_size, sequence_parallel)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    if group is None:
        return results(
            lambda *t: ffn_reference(*t, activation=problem.activation), (problem.x, w1, w2, b1, b2), problem.dy
        )
    return results(function, (x, w1, w2, b1, b2), dy)


def eager_partitioned(problem: Problem, world_size: int, partitioning: str, first: int = 0) -> tuple:
    """Compute every rank's products in this process, by separate torch operations: chunks where ranks hold parts, sums,
    from rank `first` on, and concatenations where they communicate. Returns full tensors."""
    act, parts = ACTIVATIONS[problem.activation], halves(problem.activation)
    linear1, linear2 = partitioning.split("_")

    def cut(t, dim, parts=1):
        if t is None:
            return [None] * world_size
        chunks = [half.chunk(world_size, dim) for half in t.chunk(parts, dim)]
        return [torch.cat(own, dim) for own in zip(*chunks, strict=True)]

    def total(terms):
        return sum(terms[first + 1 :] + terms[:first], start=terms[first])

    def linears(inputs, weights, biases):
        return list(map(F.linear, inputs, weights, biases))

    def function(x, w1, w2, b1, b2):
        everywhere, nowhere = [x] * world_size, [None] * world_size
        if linear1 == "column":
            hidden = [act(z) for z in linears(everywhere, cut(w1, 0, parts), cut(b1, 0, parts))]
        else:
            pre_act = total(linears(cut(x, -1), cut(w1, 1), nowhere))
            hidden = cut(act(pre_act if b1 is None else pre_act + b1), -1)
        if linear2 == "row":
            y = total(linears(hidden, cut(w2, 1), nowhere))
            return y if b2 is None else y + b2
        return torch.cat(linears([torch.cat(hidden, -1)] * world_size, cut(w2, 0), cut(b2, 0)), -1)

    return results(function, problem.leaves(), problem.dy)


def exact(problem: Problem, rank=0, world_size=1, sequence_parallel=False) -> tuple:
    """Run the unsharded reference in fp64 and cut out what this rank should hold."""
    leaves = [None if t is None else t.double() for t in problem.leaves()]
    y, dx, dw1, dw2, db1, db2 = results(
        lambda *t: ffn_reference(*t, activation=problem.activation), leaves, problem.dy.double()
    )
    dw1, db1, dw2, db2 = shard_ffn(dw1, db1, dw2, db2, rank, world_size, activation=problem.activation)
    if sequence_parallel:
        y, dx, own_dy = (t.chunk(world_size)[rank] for t in (y, dx, problem.dy))
        db2 = None if db2 is None else own_dy.double().flatten(0, -2).sum(0)
    return y, dx, dw1, dw2, db1, db2


def assert_all_accurate(mine: tuple, eagers: tuple, exacts: tuple) -> None:
    """Apply the acceptance rules to (y, dx, dw1, dw2, db1, db2); biases may be None."""
    for name, ours_, eager_, exact_ in zip(NAMES, mine, eagers, exacts, strict=True):
        assert (ours_ is None) == (exact_ is None), f"{name}: {ours_} where {exact_} is right"
        if exact_ is not None:
            # The interpreter adds the rows of a tile one after the other, a GPU pairwise.
            assert_accurate(name, ours_, eager_, exact_, noise=2 * exact_.abs() if name == "db1" else None)


def matches_reference(
    rank, world_size, implementation, activation, dtype, options, shape=((3, 20), 64, 96), device="cpu"
) -> None:
    """Apply the acceptance rules on a rank of rank_pool.py; "cuda" is each rank's own GPU. Bits are the same from run
    to run, and those of what is replicated on all ranks."""
    use(implementation)
    slices = options.get("sequence_parallel", False)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    problem = draw(*shape, activation=activation, dtype=dtype, device=device)
    place = rank, world_size, dist.group.WORLD
    mine, again = (ours(problem, *place, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "bits differ from run to run"
    for t in () if slices else (mine[0], mine[1], mine[5]):
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, t.cpu())
        assert all(torch.equal(t.cpu(), other) for other in everywhere)
    assert_all_accurate(mine, eager(problem, *place, slices), exact(problem, rank, world_size, slices))


def tokens(problem: Problem, rank: int, world_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """Return this rank's (x, dy)."""
    parts = world_size if sequence_parallel else 1
    return problem.x.chunk(parts)[rank % parts], problem.dy.chunk(parts)[rank % parts]


def shards(problem: Problem, rank: int, world_size: int, partitioning: str = "column_row") -> tuple:
    """Return this rank's (w1, b1, w2, b2)."""
    p = problem
    options = {"activation": p.activation, "partitioning": partitioning}
    return shard_ffn(p.w1, p.b1, p.w2, p.b2, rank, world_size, **options)
