"""Everything that one rank can do wrong, for faults.py and test_faults.py: what it does, and what each rank must see.

A fault's function runs on every rank of a group; `c.victim` is true on the one that misbehaves. What ranks see is
matched against `own` (the victim; "" where it is gone) and `others`.
"""

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

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

    def call(self, *, tokens=TOKENS, H=H, dtype=torch.float32, activation="gelu", seed=0, alter=None, grad=True):
        """Return (y, leaves, problem) of a call; alter(leaves) changes this rank's."""
        problem = draw((tokens,), H, F, dtype=dtype, activation=activation, seed=seed)
        w1, b1, w2, b2 = shards(problem, self.rank, self.world_size)
        leaves = {"x": problem.x, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
        if alter is not None:
            leaves |= alter(leaves)
        leaves = {name: t.detach().clone().requires_grad_(grad) for name, t in leaves.items()}
        return tp.ffn(**leaves, activation=activation, tp_group=self.group), leaves, problem

    def step(self, *, dy=lambda dy: dy, before_backward=lambda y: None, **options) -> None:
        """Make a call and its backward; note down whether they are right."""
        y, leaves, problem = self.call(**options)
        self.compare("y", y, ffn_reference(*problem.leaves(), activation=problem.activation))
        if not y.requires_grad:
            return
        before_backward(y)
        y.backward(dy(problem.dy))
        full = [t.clone().requires_grad_() for t in problem.leaves()]
        ffn_reference(*full, activation=problem.activation).backward(problem.dy)
        self.compare("dx", leaves["x"].grad, full[0].grad)

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


def before_the_call(c: Context, act, known=()) -> None:
    for options in known:
        c.step(**options)
    c.go()
    if c.victim:
        act(c)
    c.step()


def before_the_backward(c: Context, act) -> None:
    c.step()
    c.go()
    c.step(before_backward=lambda y: act(c) if c.victim else None)


def inside_the_backward(c: Context, act) -> None:
    c.step()
    c.go()
    c.step(before_backward=lambda y: y.register_hook(lambda dy: act(c) if c.victim else None))


def during_the_all_reduce(c: Context) -> None:
    tokens = 100_000  # 12.8 MB
    c.step(tokens=tokens)
    c.go()
    if c.victim:
        started = passes.all_reduce
        passes.all_reduce = lambda t, group: (passes.start_all_reduce(t, group), killed(c), started)
    c.step(tokens=tokens)


def inside_the_call(c: Context) -> None:
    c.step()
    c.go()
    if c.victim:

        def out_of_memory(*args):
            raise torch.OutOfMemoryError("out of memory")

        native.linear = out_of_memory
    c.step()


def differs(c: Context, wrong: dict, known=({},), then=0) -> None:
    """The victim's call has other options; `then` calls as everybody's follow, whatever has happened."""
    for options in known:
        c.step(**options)
    c.go()
    try:
        c.step(**(wrong if c.victim else {}))
    except (TypeError, ValueError):
        if not then:
            raise
    for _ in range(then):
        c.step()


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


def one_call_of_another_layer(c: Context) -> None:
    other = {"activation": "relu", "grad": False}
    for options in ({"grad": False}, other):
        c.step(**options)
    c.go()
    c.step(**(other if c.victim else {"grad": False}))
    c.step(tokens=4, grad=False)


def no_backward(c: Context) -> None:
    c.step()
    c.go()
    y, *_ = c.call()
    if not c.victim:
        y.sum().backward()


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


class Fault(NamedTuple):
    """name: unique; every_call: within tp.comparing_every_call; own, others: patterns of what is seen."""

    name: str
    run: Callable[[Context], None]
    others: str
    own: str = ""
    world_size: int = 2
    victim: int = 1
    every_call: bool = False


P = functools.partial
FIRST, SHORT, NEW = (), [{"tokens": 4}, {}], {"tokens": 5}
ABSENT = r"CollectiveError: comparing arguments over .* on rank \d of \d after .* s: rank 1 of 2 did not come"
COMPARING = "CollectiveError: comparing arguments"
GONE = r"CollectiveError: .* failed on rank \d of \d after .* s: "
CLOSED, TIMED_OUT = GONE + r".*(closed|reset)", GONE + r".*[Tt]imed out"
LATE = r"CollectiveError: .*rank \d (reported|gave up)"
RIGHT, WRONG = r"(y|dx) right$", r"(y|dx) WRONG"
DISAGREE = r"ValueError: ranks of the tensor-parallel group disagree:.*"
SHAPES = DISAGREE + r"rank 0: x \[6, 32\].*rank 1: x "
BITS, FINITE = DISAGREE + r"rank 1: {} has digest", DISAGREE + r"rank 0: {0} .*rank 1: {0} has NaN"
COUNTED = r"y WRONG; " + DISAGREE + r"rank 0: calls before: .*rank 1: calls before: "
USER, BAD_X = "UserError", r"ValueError: x must be \[..., H=32\]"
REPORTED = GONE + r".*\n  rank 1 rejected: x must be"
SHORT_X = {"alter": lambda leaves: {"x": leaves["x"][:, 1:]}}

FAULTS = [
    # gone
    Fault("killed before the first call", P(before_the_call, act=killed), ABSENT),
    Fault("killed before a later call", P(before_the_call, act=killed, known=[{}]), CLOSED),
    Fault("killed during an all-reduce", during_the_all_reduce, CLOSED),
    Fault("killed between forward and backward", P(before_the_backward, act=killed), CLOSED),
    Fault("killed inside of backward", P(inside_the_backward, act=killed), CLOSED),
    Fault("rank 0 killed before the first call", P(before_the_call, act=killed), GONE + ".*host is gone", victim=0),
    Fault("rank 0 killed before a later call", P(before_the_call, act=killed, known=[{}]), CLOSED, victim=0),
    Fault("1 of 4 killed before a later call", P(before_the_call, act=killed, known=[{}]), CLOSED, "", 4, 3),
    Fault("exits before the first call", P(before_the_call, act=exits), ABSENT),
    Fault("exits before a later call", P(before_the_call, act=exits, known=[{}]), CLOSED),
    # late
    Fault("sleeps past the timeout before the first call", P(before_the_call, act=sleeps), ABSENT, LATE),
    Fault("sleeps past the timeout before a later call", P(before_the_call, act=sleeps, known=[{}]), TIMED_OUT, LATE),
    Fault("sleeps past the timeout before backward", P(before_the_backward, act=sleeps), TIMED_OUT, LATE),
    Fault("1 of 4 sleeps before a later call", P(before_the_call, act=sleeps, known=[{}]), GONE, LATE, 4, 2),
    Fault("stopped (SIGSTOP) before the first call", P(before_the_call, act=stopped), ABSENT),
    Fault("stopped (SIGSTOP) before a later call", P(before_the_call, act=stopped, known=[{}]), TIMED_OUT),
    Fault("stopped (SIGSTOP) between forward and backward", P(before_the_backward, act=stopped), TIMED_OUT),
    Fault("rank 0 stopped before the first call", P(before_the_call, act=stopped), GONE + ".*answer", "", 2, 0),
    Fault("rank 0 stopped before a later call", P(before_the_call, act=stopped, known=[{}]), TIMED_OUT, "", 2, 0),
    Fault("rank 0 of 4 stopped before a later call", P(before_the_call, act=stopped, known=[{}]), GONE, "", 4, 0),
    # raises, and its process goes on
    Fault("raises before the first call", P(before_the_call, act=raises), ABSENT, USER),
    Fault("raises before a later call", P(before_the_call, act=raises, known=[{}]), TIMED_OUT, USER),
    Fault(
        "raises inside of the call: out of memory", inside_the_call, GONE + ".*raised OutOfMemory", "OutOfMemoryError"
    ),
    Fault("raises between forward and backward", P(before_the_backward, act=raises), TIMED_OUT, USER),
    Fault("raises inside of backward", P(inside_the_backward, act=raises), TIMED_OUT, USER),
    Fault("1 of 4 raises inside of backward", P(inside_the_backward, act=raises), GONE, USER, 4, 2),
    Fault("one backward missing", no_backward, TIMED_OUT, "no error"),
    # other arguments
    Fault("hidden size, first call", P(differs, wrong=SHORT_X, known=FIRST), "ValueError: another.*rank 1 rej", BAD_X),
    Fault("hidden size, later call", P(differs, wrong=SHORT_X), REPORTED, BAD_X),
    Fault("1 of 4: hidden size, later call", P(differs, wrong=SHORT_X), GONE, BAD_X, 4, 1),
    Fault("hidden size, later call, rank goes on", P(differs, wrong=SHORT_X, then=1), REPORTED, COMPARING),
    Fault("dtype, first call", P(differs, wrong={"dtype": torch.bfloat16}, known=FIRST), SHAPES, SHAPES),
    Fault("dtype, later call", P(differs, wrong={"dtype": torch.bfloat16}), GONE, GONE),
    Fault("dtype known to the group", P(differs, wrong=(B := {"dtype": torch.bfloat16}), known=[B, {}]), GONE, GONE),
    Fault("1 of 4: dtype, first call", P(differs, wrong=B, known=FIRST), DISAGREE, DISAGREE, 4, 1),
    Fault("sequence length, first call", P(differs, wrong=NEW, known=FIRST), SHAPES, SHAPES),
    Fault("sequence length new to the group", P(differs, wrong=NEW), GONE, GONE),
    Fault("sequence length known to the group", P(differs, wrong={"tokens": 4}, known=SHORT), GONE, GONE),
    Fault("1 of 4: sequence length known to the group", P(differs, wrong={"tokens": 4}, known=SHORT), GONE, GONE, 4, 1),
    Fault("all change to known lengths, one to another", changes_apart, DISAGREE, DISAGREE),
    Fault("activation, first call", P(differs, wrong={"activation": "relu"}, known=FIRST), SHAPES, SHAPES),
    Fault("activation, later call", P(differs, wrong={"activation": "relu"}), GONE, GONE),
    Fault(
        "activation known to the group",
        P(differs, wrong=(R := {"activation": "relu"}), known=[R, {}]),
        WRONG,
        WRONG,
    ),
    Fault(
        "activation known to the group, comparing every call",
        P(differs, wrong=R, known=[R, {}]),
        SHAPES,
        SHAPES,
        every_call=True,
    ),
    Fault(
        "shard of another size, first call",
        P(
            differs,
            wrong={"alter": lambda t: {"w1": t["w1"][:12], "b1": t["b1"][:12], "w2": t["w2"][:, :12]}},
            known=(),
        ),
        SHAPES,
        SHAPES,
    ),
    Fault("no gradient on one rank, first call", P(differs, wrong={"grad": False}, known=FIRST), SHAPES, SHAPES),
    Fault("gradient on one rank, later call", P(differs, wrong={"grad": False}), GONE, GONE),
    # other values
    Fault("b2, first call", P(differs, wrong={"alter": nudge("b2")}, known=FIRST), BITS.format("b2"), DISAGREE),
    Fault("b2 drifts later", P(differs, wrong={"alter": nudge("b2")}), RIGHT, RIGHT),
    Fault("b2 drifts later, compare_ranks", drifted_bias, BITS.format("0.linear_fc2.bias"), DISAGREE),
    Fault(
        "b2 drifts later, comparing every call",
        P(differs, wrong={"alter": nudge("b2")}),
        BITS.format("b2"),
        DISAGREE,
        every_call=True,
    ),
    Fault("another model, compare_ranks", P(drifted_model, shape=64), DISAGREE + "ffn_hidden_size=64", DISAGREE),
    Fault("x differs by a bit", P(differs, wrong={"alter": nudge("x")}), RIGHT, RIGHT),
    Fault(
        "x differs by a bit, comparing every call",
        P(differs, wrong={"alter": nudge("x")}),
        BITS.format("x"),
        DISAGREE,
        every_call=True,
    ),
    Fault("NaN in x, first call", P(differs, wrong={"alter": poison("x")}, known=()), FINITE.format("x"), DISAGREE),
    Fault("1 of 4: NaN in x, first call", P(differs, wrong={"alter": poison("x")}, known=()), DISAGREE, DISAGREE, 4, 1),
    Fault("NaN in w1, first call", P(differs, wrong={"alter": poison("w1")}, known=()), FINITE.format("w1"), DISAGREE),
    Fault("NaN in x, later call", P(differs, wrong={"alter": poison("x")}), "(y|dx) NaN", "y NaN"),
    Fault(
        "NaN in x, comparing every call",
        P(differs, wrong={"alter": poison("x")}),
        FINITE.format("x"),
        DISAGREE,
        every_call=True,
    ),
    Fault("NaN in dy", P(differs, wrong={"dy": lambda dy: poison("dy")({"dy": dy})["dy"]}), "(y|dx) NaN", "dx NaN"),
    Fault(
        "NaN in dy, comparing every call",
        P(differs, wrong={"dy": lambda dy: poison("dy")({"dy": dy})["dy"]}),
        FINITE.format("dy"),
        DISAGREE,
        every_call=True,
    ),
    Fault("another layer, then another length", one_call_of_another_layer, COUNTED, COUNTED),
    Fault("one call fewer", one_call_fewer, WRONG + r".*CollectiveError.*Timed out", "y right, y WRONG"),
    Fault("one call fewer, comparing every call", one_call_fewer, BITS.format("x"), DISAGREE, every_call=True),
    # no fault: strides must not matter
    Fault("x with other strides", P(differs, wrong={"alter": lambda t: {"x": strided(t["x"])}}), RIGHT, RIGHT),
    Fault("dy with other strides", P(differs, wrong={"dy": strided}), RIGHT, RIGHT),
    Fault("dy of stride 0 on every rank", lambda c: zero_stride(c), RIGHT, RIGHT),
]


def zero_stride(c: Context) -> None:
    """A dy as y.sum().backward() makes it."""
    c.go()
    y, leaves, problem = c.call()
    y.sum().backward()
    full = [t.clone().requires_grad_() for t in problem.leaves()]
    ffn_reference(*full, activation=problem.activation).sum().backward()
    c.compare("dx", leaves["x"].grad, full[0].grad)
