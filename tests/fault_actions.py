"""What a rank does wrong, for fault_cases.py: functions that run on every rank of a group, of which one misbehaves."""

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ffn_cases import draw, shards

import tpffn_triton as tp
from tpffn_triton import native, passes
from tpffn_triton.reference import ffn_reference

H, F, TOKENS = 32, 48, 6


class Context:
    """A rank of a fault's group; seen: what its calls since `go` computed; since: the time of `go`."""

    def __init__(self, rank: int, world_size: int, victim: bool, group: dist.ProcessGroup, seconds: float) -> None:
        self.rank, self.world_size, self.victim, self.group, self.seconds = rank, world_size, victim, group, seconds
        self.seen: list[str] = []
        self.since = 0.0

    def go(self) -> None:
        """Wait for all ranks: the fault comes now."""
        dist.barrier()
        self.seen, self.since = [], time.monotonic()

    def know(self, steps=({},)) -> None:
        """Make these steps, and the last so often that ranks compare nothing when it comes again."""
        for options in [*steps, *steps[-1:], *steps[-1:]]:
            self.step(**options)

    def own(self, t: torch.Tensor, sequence_parallel=False, **_) -> torch.Tensor:
        """Return this rank's tokens of t."""
        return t.chunk(self.world_size)[self.rank] if sequence_parallel else t

    def call(
        self,
        *,
        tokens=TOKENS,
        H=H,
        dtype=torch.float32,
        activation="gelu",
        seed=0,
        alter=None,
        grad=True,
        frozen=(),
        **options,
    ):
        """Return (y, leaves, problem) of a call; alter(leaves) changes this rank's, options are ffn's others."""
        problem = draw((tokens,), H, F, dtype=dtype, activation=activation, seed=seed)
        w1, b1, w2, b2 = shards(problem, self.rank, self.world_size)
        leaves = {"x": self.own(problem.x, **options), "w1": w1, "w2": w2, "b1": b1, "b2": b2}
        if alter is not None:
            leaves |= alter(leaves)
        leaves = {name: t.detach().clone().requires_grad_(grad and name not in frozen) for name, t in leaves.items()}
        return tp.ffn(**leaves, activation=activation, tp_group=self.group, **options), leaves, problem

    def step(self, *, dy=lambda dy: dy, before_backward=lambda y: None, **options) -> None:
        """Make a call and its backward; note down whether they are right."""
        made = self.forward(**options)
        if made[0].requires_grad:
            before_backward(made[0])
            self.backward(*made, dy=dy, **options)

    def forward(self, **options):
        """Return a call's (y, leaves, problem); note down whether y is right."""
        y, leaves, problem = self.call(**options)
        self.compare("y", y, self.own(ffn_reference(*problem.leaves(), activation=problem.activation), **options))
        return y, leaves, problem

    def backward(self, y, leaves, problem, *, dy=lambda dy: dy, retain_graph=False, **options) -> None:
        y.backward(dy(self.own(problem.dy, **options)), retain_graph=retain_graph)
        full = [t.clone().requires_grad_() for t in problem.leaves()]
        ffn_reference(*full, activation=problem.activation).backward(problem.dy)
        self.compare("dx", leaves["x"].grad, self.own(full[0].grad, **options))

    def compare(self, name: str, mine: torch.Tensor, right: torch.Tensor) -> None:
        verdict = "WRONG"
        if mine.isnan().any():
            verdict = "NaN"
        elif mine.shape == right.shape and torch.allclose(mine, right, rtol=0.05, atol=0.05):
            verdict = "right"
        self.seen.append(f"{name} {verdict}")


class UserError(Exception):
    """Raised by a fault in place of a user's mistake."""


def killed(c: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(c: Context) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleeps(c: Context) -> None:
    time.sleep(c.seconds + 2)


def exits(c: Context) -> None:
    os._exit(1)


def raises(c: Context) -> None:
    raise UserError("a mistake in user code")


def before_the_call(c: Context, act, known=(), **options) -> None:
    c.know(known)
    c.go()
    if c.victim:
        act(c)
    c.step(**options)


def before_the_backward(c: Context, act) -> None:
    c.know()
    c.go()
    c.step(before_backward=lambda y: act(c) if c.victim else None)


def inside_the_backward(c: Context, act) -> None:
    c.know()
    c.go()
    c.step(before_backward=lambda y: y.register_hook(lambda dy: act(c) if c.victim else None))


def during_the_all_reduce(c: Context) -> None:
    tokens = 100_000  # 12.8 MB
    c.know([{"tokens": tokens}])
    c.go()
    if c.victim:
        start = passes.start_all_reduce
        passes.start_all_reduce = lambda t, group: (start(t, group), killed(c))[0]
    c.step(tokens=tokens)


def out_of_memory(c: Context, kernel: str, then=0, **options) -> None:
    """The victim's kernel of that name fails; `then` calls follow, whatever has happened."""

    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    works = getattr(native, kernel)
    c.know([options])
    c.go()
    if c.victim:
        setattr(native, kernel, fail)
    try:
        c.step(seed=4, **options)
    except torch.OutOfMemoryError:
        setattr(native, kernel, works)
        if not then:
            raise
    for seed in range(5, 5 + then):
        c.step(seed=seed, **options)


def differs(c: Context, wrong: dict, known=({},), then=0, **right) -> None:
    """The victim's call has other options; `then` calls as everybody's follow, whatever has happened."""
    c.know(known)
    c.go()
    try:
        c.step(**(wrong if c.victim else right))
    except (TypeError, ValueError):
        if not then:
            raise
    for _ in range(then):
        c.step(**right)


def changes_apart(c: Context) -> None:
    """Every rank's call is longer than the one before, the victim's by more."""
    for tokens in (4, 5, 6):
        c.step(tokens=tokens)
    c.go()
    c.step(tokens=5 if c.victim else 4)


def one_call_fewer(c: Context) -> None:
    c.step(grad=False)
    c.go()
    for seed in (1, 2, 3):
        if not (c.victim and seed == 2):
            c.step(seed=seed, grad=False)


def one_layer_fewer(c: Context) -> None:
    layers = [{"grad": False}, {"grad": False, "activation": "relu"}]
    for options in layers * 3:
        c.step(**options)
    c.go()
    for options in layers[1:] if c.victim else layers:
        c.step(**options)


def no_backward(c: Context) -> None:
    c.know()
    c.go()
    y, *_ = c.call()
    if not c.victim:
        y.sum().backward()


def another_number_of_backwards(c: Context, victims: int, widths=(H,), **options) -> None:
    """The victim makes so many backwards of each layer in place of one, and goes on."""
    for seed in range(7):
        if seed == 4:
            c.go()
        made = [c.forward(H=width, seed=seed, **options) for width in widths]
        number = victims if c.victim and seed == 4 else 1
        for y, leaves, problem in reversed(made):
            for _ in range(number):
                leaves["x"].grad = None
                c.backward(y, leaves, problem, retain_graph=True, **options)


def drifted_bias(c: Context) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(tp.TensorParallelFFN(H, F, tp_group=c.group), torch.nn.ReLU())
    model(torch.ones(4, H))
    if c.victim:
        with torch.no_grad():
            model[0].linear_fc2.bias[3] += 1e-6
    model(torch.ones(4, H))
    c.go()
    tp.compare_ranks(model)


def drifted_model(c: Context, shape) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(tp.TensorParallelFFN(H, shape if c.victim else F, tp_group=c.group))
    c.go()
    tp.compare_ranks(model)


def poison(name: str) -> Callable[[dict], dict]:
    """Return what puts one NaN into leaves[name]."""

    def alter(leaves: dict) -> dict:
        t = leaves[name].clone()
        t.view(-1)[3] = float("nan")
        return {name: t}

    return alter


def nudge(name: str) -> Callable[[dict], dict]:
    """Return what changes one bit of leaves[name]."""

    def alter(leaves: dict) -> dict:
        t = leaves[name].clone()
        t.view(-1).view(torch.int32)[3] ^= 1
        return {name: t}

    return alter


def strided(t: torch.Tensor) -> torch.Tensor:
    """Return t's values with strides that no collective may see."""
    return t.t().contiguous().t()


def zero_stride(c: Context) -> None:
    """A dy as y.sum().backward() makes it."""
    c.go()
    y, leaves, problem = c.call()
    y.sum().backward()
    full = [t.clone().requires_grad_() for t in problem.leaves()]
    ffn_reference(*full, activation=problem.activation).sum().backward()
    c.compare("dx", leaves["x"].grad, full[0].grad)
