"""`plan --partition`: what each way to split the layer holds and sends, against tables made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpffn_triton import __main__ as command
from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_comparison import ON_SLICES, STRATEGIES
from tpffn_triton.predict import predict
from tpffn_triton.presets import machine

ANALYSED = ["--batch", "8", "--seq", "128", "--hidden", "1024", "--ffn", "4096", "--tp", "4"]
OTHER = ["--batch", "3", "--seq", "40", "--hidden", "512", "--ffn", "1536", "--tp", "8"]
FORWARD, BACKWARD = "forward", "backward"
# pass, kind, tensor, features: which of F and H the exchanged [B, S, features] has.
TABLE = {
    "column_row": [(FORWARD, "all_reduce", "y", "H"), (BACKWARD, "all_reduce", "dx", "H")],
    "row_row": [
        (FORWARD, "reduce_scatter", "pre_act", "W"),
        (FORWARD, "all_reduce", "y", "H"),
        (BACKWARD, "all_gather", "d_pre", "W"),
        (BACKWARD, "all_gather", "dx", "H"),
    ],
    "column_column": [
        (FORWARD, "all_gather", "hidden", "F"),
        (FORWARD, "all_gather", "y", "H"),
        (BACKWARD, "reduce_scatter", "d_hidden", "F"),
        (BACKWARD, "all_reduce", "dx", "H"),
    ],
    "row_column": [
        (FORWARD, "all_reduce", "pre_act", "W"),
        (FORWARD, "all_gather", "y", "H"),
        (BACKWARD, "all_reduce", "d_hidden", "F"),
        (BACKWARD, "all_gather", "dx", "H"),
    ],
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert command.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def expected(b: int, s: int, h: int, f: int, p: int, itemsize: int, width: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The table's collectives, as rings of P equal parts; width: W, of the pre-activation."""
    features, out = {"H": h, "F": f, "W": width or f}, {}
    for name, rows in TABLE.items():
        out[name] = []
        for pass_, kind, tensor, which in rows:
            elements = b * s * features[which]
            halves_of_a_ring = 2 if kind == "all_reduce" else 1
            rounds = halves_of_a_ring * (p - 1)
            sent = rounds * elements
            out[name].append(
                {
                    "pass": pass_,
                    "kind": kind,
                    "tensor": tensor,
                    "elements": elements,
                    "bytes": elements * itemsize,
                    "sent_per_rank": rounds * elements // p,
                    "sent_total": sent,
                    "sent_total_bytes": sent * itemsize,
                    "rounds": rounds,
                    "amplification": sent / elements,
                }
            )
    return out


@pytest.mark.parametrize(
    ("arguments", "numbers"), [(ANALYSED, (8, 128, 1024, 4096, 4)), (OTHER, (3, 40, 512, 1536, 8))]
)
@pytest.mark.parametrize(("dtype", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_collectives_are_those_of_the_table(arguments, numbers, dtype, itemsize, capsys):
    plans = printed(capsys, *arguments, "--partition", "all", "--json", "--dtype", dtype)
    assert {name: plan["collectives"] for name, plan in plans.items()} == expected(*numbers, itemsize)


def test_the_analysed_ring() -> None:
    """Design figures: 6 rounds, 1,572,864 elements a rank, 6,291,456 in all, 24 MiB, 6 times the payload."""
    for c in plan_ffn(8, 128, 1024, 4096, 4).collectives:
        assert (c.elements, c.rounds, c.sent_per_rank, c.sent_total) == (1_048_576, 6, 1_572_864, 6_291_456)
        assert (c.sent_total_bytes, c.amplification) == (24 << 20, 6)


def test_gated_layers_exchange_both_halves_of_the_pre_activation() -> None:
    for name in PARTITIONINGS:
        plan = plan_ffn(2, 3, 8, 16, 4, activation="swiglu", partitioning=name).to_dict()
        assert plan["collectives"] == expected(2, 3, 8, 16, 4, 4, width=32)[name]


def test_shapes_by_hand() -> None:
    shards = {
        "column_row": ((6, 8), (6,), (8, 6), (8,)),
        "row_row": ((24, 2), (6,), (8, 6), (8,)),
        "column_column": ((6, 8), (6,), (2, 24), (2,)),
        "row_column": ((24, 2), (24,), (2, 24), (2,)),
    }
    between = {"column_row": (6, 6), "row_row": (6, 6), "column_column": (6, 24), "row_column": (24, 24)}
    for name in PARTITIONINGS:
        shapes = {t.name: t.shape for t in plan_ffn(2, 5, 8, 24, 4, partitioning=name).tensors}
        assert tuple(shapes[t] for t in ("w1", "b1", "w2", "b2")) == shards[name]
        assert tuple(shapes[f"d{t}"] for t in ("w1", "b1", "w2", "b2")) == shards[name]
        for t in ("x", "y", "dy", "dx"):
            assert shapes[t] == (2, 5, 8)
        reads = "full_hidden" if name == "column_column" else "hidden"
        assert (shapes["pre_act"], shapes[reads]) == tuple((2, 5, features) for features in between[name])


@settings(deadline=None)
@given(
    m=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    h=st.integers(1, 5),
    f=st.integers(1, 5),
    tp=st.integers(1, 6),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_every_partitioning_computes_the_same(m, h, f, tp, activation, bias) -> None:
    """FLOPs are equal; peaks are at least what must be there; each GEMM's operands have its sizes."""
    plans = [plan_ffn(*m, h * tp, f * tp, tp, activation=activation, bias=bias, partitioning=p) for p in PARTITIONINGS]
    tokens = m[0] * m[1]
    for plan in plans:
        for pass_ in (FORWARD, BACKWARD):
            assert plan.totals[f"flops_{pass_}"] == plans[0].totals[f"flops_{pass_}"]
        held = plan.totals["parameter_bytes"] + plan.bytes_of(("x",))
        assert plan.totals["peak_bytes_forward"] >= held + plan.bytes_of(("y", "pre_act"))
        gradients = plan.bytes_of(("dx", "dw1", "db1", "dw2", "db2"))
        assert plan.totals["peak_bytes_backward"] >= held + plan.bytes_of(("dy", "pre_act")) + gradients
        launched = [(k.pass_, k.name) for k in plan.kernels]
        assert len({*launched}) == len(launched)
        elements = {t.name: t.elements for t in plan.tensors}
        for gemm in plan.gemms:
            operands = [name.removesuffix(".T") for name in gemm.formula.split(" @ ")]
            sizes = [gemm.m * gemm.k, gemm.k * gemm.n]
            assert [elements[name] for name in operands] == sizes, gemm
        assert elements["pre_act"] * (plan.tp if plan.partitioning != "row_column" else 1) == (
            tokens * halves(activation) * plan.ffn
        )


@given(
    tokens=st.integers(1, 9),
    hidden=st.integers(1, 40),
    ffn=st.integers(1, 40),
    tp=st.integers(2, 9),
    gated=st.booleans(),
)
def test_which_sends_least_follows_from_the_ratio_of_ffn_to_hidden(tokens, hidden, ffn, tp, gated) -> None:
    """In units of M (P-1), forward + backward: 4H, 3H + 2F, 3H + 2F, 2H + 4F; gated, where pre_act has 2F: 4H, 3H + 4F,
    3H + 2F, 2H + 6F. So ungated all send the same at F = H/2, above it column_row least, below it row_column."""
    H, F, activation = 6 * hidden * tp, ffn * tp, "swiglu" if gated else "gelu"
    sent, forward = {}, {}
    for name in PARTITIONINGS:
        plan = plan_ffn(1, tokens, H, F, tp, activation=activation, partitioning=name)
        sent[name] = sum(c.sent_total for c in plan.collectives)
        forward[name] = sum(c.sent_total for c in plan.collectives if c.pass_ == FORWARD)
    unit, W = tokens * (tp - 1), 2 * F if gated else F
    assert sent == {
        "column_row": 4 * H * unit,
        "row_row": (3 * H + 2 * W) * unit,
        "column_column": (3 * H + 2 * F) * unit,
        "row_column": (2 * H + 2 * W + 2 * F) * unit,
    }
    assert forward == {
        "column_row": 2 * H * unit,
        "row_row": (2 * H + W) * unit,
        "column_column": (H + F) * unit,
        "row_column": (H + 2 * W) * unit,
    }


def test_one_rank_exchanges_nothing_however_it_is_split(capsys) -> None:
    plans = printed(capsys, *ANALYSED, "--tp", "1", "--partition", "all", "--json")
    assert [*plans] == [*PARTITIONINGS]
    for name, plan in plans.items():
        assert plan.pop("partitioning") == name
        assert plan["collectives"] == plan["overlaps"] == plan["reasons"] == []
    assert plans["row_row"] == plans["column_row"]
    assert "One rank holds every weight" in printed(capsys, *ANALYSED, "--tp", "1", "--explain")


def test_sequence_parallelism_beside_them(capsys) -> None:
    """The bytes of one all-reduce forward, and less kept for backward."""
    plans = printed(capsys, *ANALYSED, "--partition", "all", "--sequence-parallel", "--json")
    assert [*plans] == [*PARTITIONINGS, ON_SLICES]
    sent = {
        name: sum(c["sent_total_bytes"] for c in plan["collectives"] if c["pass"] == FORWARD)
        for name, plan in plans.items()
    }
    assert sent[ON_SLICES] == sent["column_row"] == min(sent.values()) == 24 << 20
    saved = {name: plan["totals"]["saved_bytes"] >> 20 for name, plan in plans.items()}
    assert saved == {"column_row": 8, "row_row": 5, "column_column": 24, "row_column": 17, ON_SLICES: 5}


def test_names_may_have_spaces_around_them(capsys) -> None:
    assert [*printed(capsys, *ANALYSED, "--partition", "row_row, column_row ,row_row", "--json")] == [
        "row_row",
        "column_row",
    ]


def test_text_has_shapes_collectives_and_totals(capsys) -> None:
    text = printed(capsys, *ANALYSED, "--partition", "all", "--sequence-parallel", "--explain")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 140
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "w1 1024x1024 4096x256 1024x1024 4096x256 1024x1024",
        "full_hidden - - 8x128x4096 - -",
        "row_row forward reduce-scatter pre_act 4194304 16777216 3 3145728 12582912 3x",
        "forward all-gather y 1048576 4194304 3 786432 3145728 3x",
        "activations kept for backward 8 MiB 5 MiB 24 MiB 17 MiB 5 MiB",
        "sent in both 48 MiB 132 MiB 132 MiB 216 MiB 60 MiB",
        "row_column: Linear1 row-parallel, Linear2 column-parallel",
    ):
        assert line in lines, line


def test_every_reason_belongs_to_a_collective_or_to_none(capsys) -> None:
    plans = printed(capsys, *ANALYSED, "--partition", "all", "--sequence-parallel", "--json")
    for name, plan in plans.items():
        given = [(r["pass"], r["kind"], r["at"]) for r in plan["reasons"] if r["kind"]]
        made = [(c["pass"], c["kind"], c["tensor"]) for c in plan["collectives"]]
        assert sorted(given) == sorted(made), name
        assert all(len(r["why"]) > 20 for r in plan["reasons"])
        if name in PARTITIONINGS:
            explained = printed(capsys, *ANALYSED, "--partition", name, "--explain")
            assert explained.count("no collective;") == sum(r["kind"] is None for r in plan["reasons"])
    steps = {name: [(n["pass"], n["step"]) for n in plan["no_communication"]] for name, plan in plans.items()}
    assert steps == {
        "column_row": [(FORWARD, "linear1"), (BACKWARD, "linear2")],
        "row_row": [(BACKWARD, "linear2")],
        "column_column": [(FORWARD, "linear1")],
        "row_column": [],
        ON_SLICES: [],
    }


def test_predicted_times_of_each(capsys) -> None:
    plans = printed(capsys, *ANALYSED, "--partition", "all", "--link", "nvlink4", "--dtype", "bf16", "--json")
    where = machine("nvlink4", None, None)
    for name, plan in plans.items():
        again = predict(plan_ffn(8, 128, 1024, 4096, 4, dtype="bf16", partitioning=name), where).to_dict()
        assert plan["predicted"] == again
    us = {name: plan["predicted"]["totals"]["us"] for name, plan in plans.items()}
    assert min(us, key=us.__getitem__) == "column_row"
    text = printed(capsys, *ANALYSED, "--partition", "all", "--link", "nvlink4", "--dtype", "bf16")
    assert "predicted forward, us" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "diagonal"], "partitioning must be one of column_row, row_row, column_column, row_column"),
        (["--partition", "row_row", "--hidden", "1022"], "hidden=1022, tp=4 (remainder 2); row_row cuts it"),
        (["--partition", "row_row", "--sequence-parallel"], "cannot go with row_row alone"),
        (["--partition", "row_column", "--save", "nothing"], "save are for column_row"),
        (["--partition", "all", "--link", "nvlink4", "--forward-chunks", "4"], "not with row_row, got 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message, capsys) -> None:
    assert command.main(["plan", *ANALYSED, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_sweep_is_of_one_partitioning(capsys) -> None:
    sizes = ANALYSED[:-2]
    assert command.main(["plan", *sizes, "--sweep", "tp=1,2", "--link", "nvlink4", "--partition", "all"]) == 2
    assert "--sweep predicts column_row" in capsys.readouterr().err


def test_strategies_are_the_partitionings_and_column_row_on_slices() -> None:
    assert [*STRATEGIES][:2] == ["column_row", ON_SLICES]
    options = {name: strategy.options for name, strategy in STRATEGIES.items()}
    assert options.pop(ON_SLICES) == {"partitioning": "column_row", "sequence_parallel": True}
    assert options == {name: {"partitioning": name, "sequence_parallel": False} for name in PARTITIONINGS}
    assert len({strategy.words for strategy in STRATEGIES.values()}) == len(STRATEGIES)
