"""Define what is computed: named shapes, a seeded random problem for each, its fp64 reference, a rank's part.

    x, dy   [B, S, H]   drawn from N(0, 1); replicated
    w1, b1  [F, H], [F] drawn from U(±1/√H)           a rank holds [F/P, H], [F/P]; gated: 2F rows, 2F/P
    w2, b2  [H, F], [H] drawn from U(±1/√F)           a rank holds [H, F/P], [H]

All are rounded to the benchmark's dtype before the reference widens them to fp64, so that an error is the
implementation's own. Every rank draws the same full problem.
"""

from dataclasses import dataclass, replace

import checkout  # noqa: F401
import torch
from torch import Tensor

from tpffn_triton.kernels.activations import halves
from tpffn_triton.plan import plan_ffn
from tpffn_triton.reference import ffn_reference
from tpffn_triton.sharding import shard_ffn
from tpffn_triton.validation import check_sizes

MODES = ("fwd", "fwd_bwd")
# tf32: fp32 tensors whose GEMMs may use TF32 tensor cores.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = 20_240_229
# What a pass must read and write: its inputs and its results.
_PASS_TENSORS = {
    "forward": ("x", "w1", "b1", "w2", "b2", "y"),
    "backward": ("x", "w1", "w2", "dy", "dx", "dw1", "db1", "dw2", "db2"),
}


@dataclass(frozen=True)
class Shape:
    """One FFN layer: B, S, H, the full F, P ranks. Raises: ValueError: a size below 1, or F % P != 0."""

    name: str
    batch: int
    seq: int
    hidden: int
    ffn: int
    tp: int

    def __post_init__(self) -> None:
        for name, size in (("batch", self.batch), ("seq", self.seq)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_sizes(self.hidden, self.ffn, self.tp)

    @property
    def tokens(self) -> int:
        """M."""
        return self.batch * self.seq

    def flops(self, mode: str, activation: str) -> int:
        """FLOPs of one rank's GEMMs (plan.py counts them); nothing element-wise counts."""
        return sum(flops for flops, _ in self.pass_floors(mode, "fp32", activation))

    def pass_floors(self, mode: str, dtype: str, activation: str) -> list[tuple[int, int]]:
        """(FLOPs, bytes) of each pass on one rank; it reads its inputs once and writes its results once."""
        sizes = (self.batch, self.seq, self.hidden, self.ffn, self.tp)
        plan = plan_ffn(*sizes, dtype="fp32" if dtype == "tf32" else dtype, activation=activation)
        passes = ("forward",) if mode == "fwd" else ("forward", "backward")
        return [(plan.totals[f"flops_{pass_}"], plan.bytes_of(_PASS_TENSORS[pass_])) for pass_ in passes]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("analysed", batch=8, seq=128, hidden=1024, ffn=4096, tp=4),
        Shape("decode", batch=64, seq=1, hidden=8192, ffn=28672, tp=8),
        Shape("medium", batch=2, seq=2048, hidden=4096, ffn=16384, tp=8),
        Shape("large", batch=4, seq=2048, hidden=8192, ffn=28672, tp=8),
        Shape("wide", batch=8, seq=256, hidden=1536, ffn=6144, tp=4),
        Shape("small", batch=4, seq=64, hidden=256, ffn=1024, tp=2),
        Shape("tiny", batch=2, seq=8, hidden=64, ffn=128, tp=2),
    )
}


@dataclass
class Problem:
    """The tensors of one FFN, full or one rank's; shapes in the module docstring."""

    x: Tensor
    dy: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The tensors whose gradients are wanted, by name."""
        return {"x": self.x, "w1": self.w1, "b1": self.b1, "w2": self.w2, "b2": self.b2}


class Draws:
    """Random tensors, one after another; the same numbers in every process with this device type."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(SEED)

    def normal(self, *size: int) -> Tensor:
        """Draw from N(0, 1)."""
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def uniform(self, fan_in: int, *size: int) -> Tensor:
        """Draw from U(±1/√fan_in)."""
        unit = torch.rand(size, generator=self.generator, device=self.device)
        return unit.mul_(2).sub_(1).mul_(fan_in**-0.5).to(self.dtype)


def draw(shape: Shape, dtype: str, activation: str, device: torch.device) -> Problem:
    """Return the full problem; the same numbers in every process with this device type."""
    draws = Draws(DTYPES[dtype], device)
    normal, uniform = draws.normal, draws.uniform
    tokens = (shape.batch, shape.seq, shape.hidden)
    h, f = shape.hidden, shape.ffn
    width = halves(activation) * f
    return Problem(
        x=normal(*tokens),
        dy=normal(*tokens),
        w1=uniform(h, width, h),
        b1=uniform(h, width),
        w2=uniform(f, h, f),
        b2=uniform(f, h),
    )


def shard(problem: Problem, rank: int, world_size: int, activation: str, partitioning: str = "column_row") -> Problem:
    """Return rank's problem: copies of its weights, with gradients wanted; x and dy are shared."""
    full = (problem.w1, problem.b1, problem.w2, problem.b2)
    own = shard_ffn(*full, rank, world_size, activation=activation, partitioning=partitioning)
    w1, b1, w2, b2 = (t.clone().requires_grad_() for t in own if t is not None)
    return Problem(problem.x.detach().requires_grad_(), problem.dy, w1, b1, w2, b2)


def own_tokens(problem: Problem, rank: int, world_size: int) -> Problem:
    """Return rank's problem under sequence parallelism: x and dy [B·S/P, H], its part of the tokens."""
    x, dy = (t.detach().flatten(0, 1).chunk(world_size)[rank].clone() for t in (problem.x, problem.dy))
    return replace(problem, x=x.requires_grad_(), dy=dy)


def reference(problem: Problem, mode: str, activation: str) -> dict[str, Tensor]:
    """Return the full results in fp64: y, and in mode fwd_bwd dx, dw1, db1, dw2, db2."""
    wide = {name: t.detach().double().requires_grad_(mode == "fwd_bwd") for name, t in problem.leaves().items()}
    y = ffn_reference(**wide, activation=activation)
    if mode == "fwd":
        return {"y": y}
    y.backward(problem.dy.double())
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in wide.items() if t.grad is not None}


def own_part(
    full: dict[str, Tensor],
    problem: Problem,
    activation: str,
    rank: int,
    world_size: int,
    sequence_parallel: bool = False,
    partitioning: str = "column_row",
) -> dict[str, Tensor]:
    """Return what rank must get of the full results of `reference`: gradients cut into shards; with sequence_parallel
    y, dx and db2 of its tokens."""
    found = dict(full)
    if "dx" in full:
        grads = (full["dw1"], full["db1"], full["dw2"], full["db2"])
        own = shard_ffn(*grads, rank, world_size, activation=activation, partitioning=partitioning)
        named = zip(("dw1", "db1", "dw2", "db2"), own, strict=True)
        found |= {name: t for name, t in named if t is not None}
    if sequence_parallel:
        found |= {name: full[name].flatten(0, 1).chunk(world_size)[rank] for name in ("y", "dx") if name in full}
        if "dx" in full:
            found["db2"] = problem.dy.double().flatten(0, 1).chunk(world_size)[rank].sum(0)
    return found


def expected(
    problem: Problem, mode: str, activation: str, rank: int = 0, world_size: int = 1, sequence_parallel: bool = False
) -> dict[str, Tensor]:
    """Return what rank must get, in fp64; see `reference` and `own_part`."""
    full = reference(problem, mode, activation)
    return own_part(full, problem, activation, rank, world_size, sequence_parallel)
