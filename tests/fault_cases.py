"""Everything that one rank can do wrong, for faults.py and test_faults.py, and what each rank must see of it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from fault_actions import (
    Context,
    H,
    another_number_of_backwards,
    before_the_backward,
    before_the_call,
    changes_apart,
    differs,
    drifted_bias,
    drifted_model,
    during_the_all_reduce,
    exits,
    inside_the_backward,
    killed,
    no_backward,
    nudge,
    one_call_fewer,
    one_layer_fewer,
    out_of_memory,
    poison,
    raises,
    sleeps,
    stopped,
    strided,
    zero_stride,
)


class Fault(NamedTuple):
    """run: on every rank, c.victim being true on one; own, others: patterns of what that one sees ("" where it is gone)
    and the rest; every_call: within tp.comparing_every_call."""

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
CLOSED, TIMED_OUT = GONE + r".*(closed|reset)", GONE + r".*([Tt]imed out|timeout)"
LATE = r"CollectiveError: .*rank \d (reported|gave up)"
RIGHT, WRONG = r"(y|dx) right$", r"(y|dx) WRONG"
DISAGREE = r"ValueError: ranks of the tensor-parallel group disagree:.*"
SHAPES = DISAGREE + r"rank 0: x \[6, 32\].*rank 1: x "
BITS, FINITE = DISAGREE + r"rank 1: {} has digest", DISAGREE + r"rank 0: {0} .*rank 1: {0} has NaN"
NO_MEMORY = r".*rank 1 raised OutOfMemoryError"
USER, BAD_X = "UserError", r"ValueError: x must be \[..., H=32\]"
REPORTED = GONE + r".*\n  rank 1 rejected: x must be"
NO_GRAD = {"grad": False}
SHORT_X = {"alter": lambda leaves: {"x": leaves["x"][:, 1:]}}
SLICES, FP32, CHUNKS = {"sequence_parallel": True}, {"reduce_dtype": torch.float32}, {"forward_chunks": 2}
CUT = SLICES | {"alter": lambda leaves: {"x": leaves["x"][1:]}}
SLICED = DISAGREE + r"rank 0: x \[3, 32\].*rank 1: x \[2, 32\]"
FROZEN = SLICES | {"frozen": ("w1",)}

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
    Fault("out of memory in forward", P(out_of_memory, kernel="linear"), GONE + NO_MEMORY, "OutOfMemoryError"),
    Fault("out of memory in backward", P(out_of_memory, kernel="dgrad"), GONE + NO_MEMORY, "OutOfMemoryError"),
    Fault("raises between forward and backward", P(before_the_backward, act=raises), TIMED_OUT, USER),
    Fault("raises inside of backward", P(inside_the_backward, act=raises), TIMED_OUT, USER),
    Fault("1 of 4 raises inside of backward", P(inside_the_backward, act=raises), GONE, USER, 4, 2),
    Fault("one backward missing", no_backward, TIMED_OUT, "no error"),
    # goes on after an error or a backward that it alone has left out
    Fault("out of memory in forward, rank goes on", P(out_of_memory, kernel="linear", then=3), TIMED_OUT, COMPARING),
    Fault("out of memory in backward, rank goes on", P(out_of_memory, kernel="dgrad", then=3), GONE, GONE),
    Fault("out of memory at its end, rank goes on", P(out_of_memory, kernel="weight_grads", then=3), GONE, GONE),
    Fault(
        "slices: out of memory in backward, rank goes on",
        P(out_of_memory, kernel="dgrad", then=3, **SLICES),
        GONE,
        GONE,
    ),
    Fault("one backward skipped, rank goes on", P(another_number_of_backwards, victims=0), TIMED_OUT, COMPARING),
    Fault(
        "one backward skipped, two widths, rank goes on",
        P(another_number_of_backwards, victims=0, widths=(H, H // 2)),
        TIMED_OUT,
        COMPARING,
    ),
    Fault(
        "slices: one backward skipped, rank goes on",
        P(another_number_of_backwards, victims=0, **SLICES),
        TIMED_OUT,
        COMPARING,
    ),
    Fault("one backward more, rank goes on", P(another_number_of_backwards, victims=2), TIMED_OUT, COMPARING),
    Fault(
        "slices: one backward more, rank goes on",
        P(another_number_of_backwards, victims=2, **SLICES),
        TIMED_OUT,
        COMPARING,
    ),
    # other arguments
    Fault("hidden size, first call", P(differs, wrong=SHORT_X, known=FIRST), "ValueError: another.*rank 1 rej", BAD_X),
    Fault("hidden size, later call", P(differs, wrong=SHORT_X), REPORTED, BAD_X),
    Fault("1 of 4: hidden size, later call", P(differs, wrong=SHORT_X), GONE, BAD_X, 4, 1),
    Fault(
        "hidden size, later call, rank goes on",
        P(differs, wrong=SHORT_X | NO_GRAD, known=[NO_GRAD], then=1, **NO_GRAD),
        REPORTED,
        COMPARING,
    ),
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
    Fault("activation known to the group", P(differs, wrong=(R := {"activation": "relu"}), known=[R, {}]), GONE, GONE),
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
    # sequence parallelism and other options
    Fault("slices: killed before a later call", P(before_the_call, act=killed, known=[SLICES], **SLICES), CLOSED),
    Fault("slices: sleeps before a later call", P(before_the_call, act=sleeps, known=[SLICES], **SLICES), GONE, LATE),
    Fault("slices: of another size, first call", P(differs, wrong=CUT, known=FIRST, **SLICES), SLICED, SLICED),
    Fault("slices: of another size, later call", P(differs, wrong=CUT, known=[SLICES], **SLICES), GONE, GONE),
    Fault("slices on one rank, first call", P(differs, wrong=SLICES, known=FIRST), DISAGREE, DISAGREE),
    Fault("slices on one rank, known to the group", P(differs, wrong=SLICES, known=[SLICES, {}]), GONE, GONE),
    Fault("w1 frozen on one rank, slices", P(differs, wrong=FROZEN, known=FIRST, **SLICES), DISAGREE, DISAGREE),
    Fault("reduce_dtype on one rank, first call", P(differs, wrong=B | FP32, known=FIRST, **B), DISAGREE, DISAGREE),
    Fault("reduce_dtype on one rank, later call", P(differs, wrong=B | FP32, known=[B], **B), GONE, GONE),
    Fault("forward_chunks on one rank, first call", P(differs, wrong=CHUNKS, known=FIRST), DISAGREE, DISAGREE),
    Fault(
        "slices: NaN in x, comparing every call",
        P(differs, wrong=SLICES | {"alter": poison("x")}, known=[SLICES], **SLICES),
        FINITE.format("x"),
        DISAGREE,
        every_call=True,
    ),
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
    Fault(
        "dy differs by a bit, comparing every call",
        P(differs, wrong={"dy": lambda dy: nudge("dy")({"dy": dy})["dy"]}),
        BITS.format("dy"),
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
    Fault("a layer left out where two take turns", one_layer_fewer, GONE, COMPARING),
    Fault("one call fewer", one_call_fewer, WRONG + r".*CollectiveError.*Timed out", "y right, y WRONG"),
    Fault("one call fewer, comparing every call", one_call_fewer, BITS.format("x"), DISAGREE, every_call=True),
    # no fault: strides must not matter
    Fault("x with other strides", P(differs, wrong={"alter": lambda t: {"x": strided(t["x"])}}), RIGHT, RIGHT),
    Fault("dy with other strides", P(differs, wrong={"dy": strided}), RIGHT, RIGHT),
    Fault("dy of stride 0 on every rank", zero_stride, RIGHT, RIGHT),
]
