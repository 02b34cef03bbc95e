"""The plan with sequence parallelism: who holds which tokens, what is gathered and scattered, behind what."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpffn_triton import __main__ as command
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_communication import ring_all_reduce, ring_slices

ANALYSED = ["--batch", "8", "--seq", "128", "--hidden", "1024", "--ffn", "4096", "--tp", "4"]
MIB = 1 << 20


@given(ranks=st.integers(2, 16), slice_elements=st.integers(1, 10**6))
def test_a_reduce_scatter_and_an_all_gather_make_an_all_reduce(ranks: int, slice_elements: int) -> None:
    """Of equal slices; the ring all-reduce itself is held to a simulation in test_plan.py."""
    elements = ranks * slice_elements
    twice = tuple(2 * count for count in ring_slices(elements, ranks))
    assert twice == ring_all_reduce(elements, ranks)


def test_the_analysed_model_through_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *ANALYSED, "--sequence-parallel", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sequence_parallel"] is True
    tensors = {t["name"]: (t["shape"], t["bytes"], t["layout"]) for t in plan["tensors"]}
    for name in ("x", "y", "dy", "dx"):
        assert tensors[name] == ([32, 8, 1024], MIB, "this rank's slice of dim 0")
    for name in ("full_x", "full_dy", "partial_y", "partial_dx", "pre_act", "hidden", "d_pre"):
        assert tensors[name][:2] == ([128, 8, 1024], 4 * MIB)
    # 2P-2 = 6 rounds, in two halves of 3; 3/4 of the tensor sent by each rank.
    ring = {"elements": 1_048_576, "bytes": 4 * MIB, "rounds": 3, "amplification": 3.0}
    ring |= {"sent_per_rank": 786_432, "sent_total": 3_145_728, "sent_total_bytes": 12 * MIB}
    ends = [("forward", "all_gather", "x"), ("forward", "reduce_scatter", "y")]
    ends += [("backward", "all_gather", "dy"), ("backward", "all_gather", "x"), ("backward", "reduce_scatter", "dx")]
    assert plan["collectives"] == [{"pass": p, "kind": k, "tensor": t} | ring for p, k, t in ends]
    assert [(o["pass"], o["tensor"], o["behind"]) for o in plan["overlaps"]] == [
        ("backward", "x", ["d_hidden", "dx"]),
        ("backward", "dx", ["db1", "dw2", "dw1", "db2"]),
    ]
    assert plan["saved_for_backward"] == ["x", "pre_act"]
    assert plan["totals"]["saved_bytes"] == 5 * MIB  # x: the slice alone
    assert plan["totals"]["saved_bytes_eager"] == 12 * MIB
    assert plan["totals"]["sent_all_ranks"] == 5 * 3_145_728


def test_flops_are_those_of_the_replicated_plan() -> None:
    for activation in ("gelu", "swiglu"):
        replicated, sliced = (
            plan_ffn(8, 128, 1024, 4096, 4, activation=activation, sequence_parallel=on) for on in (False, True)
        )
        assert [(g.name, g.m, g.n, g.k) for g in sliced.gemms] == [(g.name, g.m, g.n, g.k) for g in replicated.gemms]
        # db2 sums this rank's tokens: a quarter of dy.
        (db2,) = (one for one in replicated.memory_passes if one.name == "db2")
        less = (db2.hbm_bytes - 4096) * 3 // 4
        assert sliced.totals["hbm_bytes_backward"] == replicated.totals["hbm_bytes_backward"] - less


def test_recomputing_needs_x_before_anything_else() -> None:
    plan = plan_ffn(2, 8, 8, 32, 4, sequence_parallel=True, save="nothing", bias=False)
    assert [(o.tensor, o.behind) for o in plan.overlaps] == [("dy", ("linear1_recompute",)), ("dx", ("dw2", "dw1"))]
    assert plan.bytes_of(plan.saved_for_backward) == 4 * 2 * 2 * 8


def test_what_overlaps_are_kernels_and_collectives_of_the_plan() -> None:
    for on in (False, True):
        for save in ("pre_act", "nothing"):
            plan = plan_ffn(2, 8, 8, 32, 4, sequence_parallel=on, save=save)
            launched = {(k.pass_, k.name) for k in plan.kernels}
            sent = {(c.pass_, c.tensor) for c in plan.collectives}
            for overlap in plan.overlaps:
                assert (overlap.pass_, overlap.tensor) in sent
                assert {(overlap.pass_, name) for name in overlap.behind} <= launched


def test_sequence_not_divisible_is_refused_with_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "sequence_parallel: seq must be divisible by tp, got seq=6, tp=4 (remainder 2)"
    with pytest.raises(ValueError, match="seq=6, tp=4") as caught:
        plan_ffn(8, 6, 8, 32, 4, sequence_parallel=True)
    assert str(caught.value) == shown
    assert command.main(["plan", *ANALYSED, "--seq", "6", "--sequence-parallel"]) == 2
    assert capsys.readouterr().err == f"python -m tpffn_triton plan: error: {shown}\n"
    plan_ffn(8, 6, 8, 32, 4)


def test_one_rank_has_every_token() -> None:
    plan = plan_ffn(2, 3, 8, 32, 1, sequence_parallel=True)
    assert plan == plan_ffn(2, 3, 8, 32, 1)
    assert plan.collectives == plan.overlaps == ()


def test_text_says_which_dims_are_local(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *ANALYSED, "--sequence-parallel"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "x [32, 8, 1024] 262144 1048576 1 MiB this rank's slice of dim 0",
        "backward all-gather of dy: 1048576 elements, 4194304 bytes (4 MiB)",
        "ring: 3 rounds, 786432 elements sent per rank, 3145728 in all (12 MiB), 3x the payload",
        "backward dx: behind db1, dw2, dw1, db2",
        "linear1 forward full_x @ w1.T 1024, 1024, 1024 2147483648 2.147 GFLOP",
        "db2 [1024] 1024 4096 4 KiB sum over this rank's tokens",
    ):
        assert line in lines, line
