"""Predicted passes and sweeps: totals by hand, what the command prints, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tpffn_triton import __main__ as command
from tpffn_triton import sweep
from tpffn_triton.cost_model import LIBRARY_ALGORITHMS, chunk_rows, forward_chunks
from tpffn_triton.machines import AlphaBeta, Compute, Link, Machine
from tpffn_triton.plan import plan_ffn
from tpffn_triton.predict import predict
from tpffn_triton.presets import machine

SIZES = ["--batch", "8", "--seq", "128", "--hidden", "1024", "--ffn", "4096"]
FOUR = [*SIZES, "--tp", "4"]
# Arithmetic alone costs: 2 GFLOP a GEMM at 1 TFLOP/s are 2147.48 µs. 1 GB/s on the wire.
RING = Link("wire", (AlphaBeta("ring", 0, 0, 1, "test"),))
BY_HAND = Machine("by hand", (Compute((("fp32", 1.0),), 1000.0, 0.0, 1.0, "test"),), RING, None, 4)
GEMM = 2147.483648
ALL_REDUCE = 1.5 * 4 * 1048.576


def overlapping(overlap: float) -> Machine:
    return replace(BY_HAND, computes=(replace(BY_HAND.computes[0], overlap=overlap),))


def test_the_analysed_model_by_hand() -> None:
    p = predict(plan_ffn(8, 128, 1024, 4096, 4), BY_HAND)
    assert p.kernels_us("forward") == pytest.approx(2 * GEMM, rel=1e-3)
    assert p.exposed_us("forward") == pytest.approx(ALL_REDUCE)
    # dx's all-reduce outlasts dw2 and dw1.
    assert p.exposed_us("backward") == pytest.approx(ALL_REDUCE - 2 * GEMM, rel=0.01)
    assert p.pass_us("backward") == pytest.approx(4 * GEMM + ALL_REDUCE - 2 * GEMM, rel=1e-2)
    assert p.total_us == p.pass_us("forward") + p.pass_us("backward")
    assert [(c.kind, c.tensor, c.algorithm) for c in p.collectives] == [
        ("all_reduce", "y", "ring"),
        ("all_reduce", "dx", "ring"),
    ]
    db2 = p.kernels[-1]
    assert (db2.name, db2.bound, db2.us) == ("db2", "memory", pytest.approx((4 * 2**20 + 4096) / 1e9))
    assert {k.name for k in p.kernels if k.bound == "memory"} == {"db1", "db2"}


def test_without_overlap_nothing_is_saved_by_hand() -> None:
    free, half, none = (predict(plan_ffn(8, 128, 1024, 4096, 4), overlapping(share)) for share in (1.0, 0.5, 0.0))
    # Computation stands still as long either way; what runs beside it takes longer.
    assert free.exposed_us("backward") == half.exposed_us("backward") == none.exposed_us("backward")
    slowed = [p.slowed_us("backward") for p in (free, half, none)]
    assert slowed == [0, pytest.approx(GEMM, rel=0.01), pytest.approx(2 * GEMM, rel=0.01)]
    assert none.pass_us("backward") == pytest.approx(none.kernels_us("backward") + ALL_REDUCE)


def test_sequence_parallel_by_hand() -> None:
    p = predict(plan_ffn(8, 128, 1024, 4096, 4, sequence_parallel=True), BY_HAND)
    half = ALL_REDUCE / 2
    assert p.communication_us("forward") == p.exposed_us("forward") == pytest.approx(2 * half)
    exposed = [c.exposed_us for c in p.collectives if c.pass_ == "backward"]
    assert exposed == pytest.approx([half, 0, 0], abs=1e-6)  # dy; x and dx each behind two GEMMs


def test_chunks_hide_the_forward_all_reduce() -> None:
    plan = plan_ffn(8, 128, 1024, 4096, 4)
    p = predict(plan, BY_HAND, chunks=4)
    # The all-reduce outlasts the GEMM: only the first chunk's GEMM is in front of it.
    assert p.pass_us("forward") == pytest.approx(GEMM + GEMM / 4 + ALL_REDUCE, rel=1e-3)
    assert p.exposed_us("forward") == pytest.approx(ALL_REDUCE - 3 * GEMM / 4, rel=1e-3)
    half = predict(plan, overlapping(0.5), chunks=4)
    assert half.exposed_us("forward") == p.exposed_us("forward")
    assert half.slowed_us("forward") == pytest.approx(3 * GEMM / 8, rel=1e-3)
    assert predict(plan, BY_HAND, chunks=None).forward_chunks == 8
    assert predict(plan, overlapping(0), chunks=None).forward_chunks == 1
    for chunks, sequence_parallel, shown in ((0, False, "got 0"), (2, True, "got 2")):
        with pytest.raises(ValueError, match=shown):
            predict(plan_ffn(8, 128, 1024, 4096, 4, sequence_parallel=sequence_parallel), BY_HAND, chunks=chunks)


def test_chunks_are_those_that_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    """Multiples of 128 rows: of 1024 tokens 8, of 300 asked in 8 three."""
    assert predict(plan_ffn(8, 128, 1024, 4096, 4), BY_HAND, chunks=2000).forward_chunks == 8
    assert predict(plan_ffn(1, 300, 1024, 4096, 4), BY_HAND, chunks=8).forward_chunks == 3
    assert predict(plan_ffn(1, 128, 1024, 4096, 4), BY_HAND, chunks=8) == predict(
        plan_ffn(1, 128, 1024, 4096, 4), BY_HAND
    )
    assert command.main(["plan", *SIZES, "--tp", "1", "--link", "nvlink4", "--forward-chunks", "4"]) == 0
    assert "chunk" not in capsys.readouterr().out


@pytest.mark.parametrize("link", ["nvlink4", "pcie4"])
def test_automatic_chunks_and_algorithms_are_those_of_ffn(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "8", "--seq", "2048", "--hidden", "8192", "--ffn", "28672", "--dtype", "bf16", "--tp", "8"]
    assert command.main(["plan", *sizes, "--link", link, "--forward-chunks", "auto", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    chosen = forward_chunks(machine(link), 16384, 8192, 3584, 8, "bf16")  # as functional.py asks
    assert predicted["forward_chunks"] == len(chunk_rows(16384, chosen)) > 1
    assert {c["algorithm"] for c in predicted["collectives"]} <= {*LIBRARY_ALGORITHMS}
    small = ["plan", *FOUR, "--link", link, "--json"]
    for flags, used in (([], {"ring", "tree"}), (["--algorithm", "all"], {"one-shot", "two-shot"})):
        assert command.main([*small, *flags]) == 0
        found = {c["algorithm"] for c in json.loads(capsys.readouterr().out)["predicted"]["collectives"]}
        assert found <= used


def test_every_chunk_reads_the_whole_of_w2() -> None:
    slow_memory = replace(BY_HAND, computes=(Compute((("fp32", 1e6),), 1e-3, 0.0, 0.0, "test"),))  # 1 GB/s
    plan = plan_ffn(8, 128, 1024, 4096, 4, bias=False)
    whole, halves = (predict(plan, slow_memory, chunks=chunks).pass_us("forward") for chunks in (1, 2))
    assert halves - whole == pytest.approx(4 * 2**20 / 1e3)


def test_more_ranks_than_the_nodes_have_are_refused() -> None:
    with pytest.raises(ValueError, match="tp=8 exceeds 4 ranks: nodes=1, ranks_per_node=4"):
        predict(plan_ffn(8, 128, 1024, 4096, 8), BY_HAND)


def test_link_adds_the_prediction_to_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *FOUR, "--dtype", "bf16"]
    assert command.main([*arguments, "--link", "nvlink4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plan = plan_ffn(8, 128, 1024, 4096, 4, dtype="bf16")
    assert printed["predicted"] == json.loads(json.dumps(predict(plan, machine("nvlink4")).to_dict()))
    assert Machine.from_dict({"schema": printed["schema"], "machine": printed["machine"]}) == machine("nvlink4")
    totals = printed["predicted"]["totals"]
    assert totals["us"] == totals["forward"]["us"] + totals["backward"]["us"]
    assert command.main(arguments) == 0
    alone = capsys.readouterr().out
    assert command.main([*arguments, "--link", "nvlink4", "--algorithm", "ring", "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(alone.rstrip("\n"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Predicted for NVIDIA H200, nvlink4 (a model, not a measurement)" in lines
    assert any(line.startswith("all-reduce of y forward ring 32.5 32.5") for line in lines)
    (two_shot,) = (line for line in lines if line.startswith("two-shot "))
    assert two_shot.count("*") > 2


def test_machine_file_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    path.write_text(json.dumps(BY_HAND.to_dict()))
    assert command.main(["plan", *FOUR, "--machine", str(path), "--json"]) == 0
    us = json.loads(capsys.readouterr().out)["predicted"]["totals"]["us"]
    assert us == predict(plan_ffn(8, 128, 1024, 4096, 4), BY_HAND).total_us
    path.write_text("{}")
    assert command.main(["plan", *FOUR, "--machine", str(path)]) == 2
    assert "schema must be" in capsys.readouterr().err


def test_sweep_marks_the_best_and_explains_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *SIZES, "--sweep", "tp=1,2,3,4,16,32", "--link", "nvlink4", "--nodes", "2", "--dtype", "bf16"]
    assert command.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["tp"]: row for row in result["rows"]}
    assert list(rows) == [1, 2, 3, 4, 16, 32]
    assert "ffn=4096, tp=3" in rows[3]["refused"]
    assert rows[32]["refused"] == "tp=32 exceeds 16 ranks: nodes=2, ranks_per_node=8"
    assert (rows[1]["speedup"], rows[1]["efficiency"]) == (1, 1)
    one = rows[1]["predicted"]["totals"]["us"]
    for tp in (2, 4, 16):
        us = rows[tp]["predicted"]["totals"]["us"]
        assert rows[tp]["speedup"] == pytest.approx(one / us)
        assert rows[tp]["efficiency"] == pytest.approx(one / us / tp)
    fitting = [tp for tp, row in rows.items() if row["refused"] is None]
    assert result["best_tp"] == min(fitting, key=lambda tp: rows[tp]["predicted"]["totals"]["us"])
    assert rows[16]["predicted"]["nodes"] == 2
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    (best,) = (line for line in lines if "<- best" in line)
    assert best.split()[0] == str(result["best_tp"])
    assert any(line.startswith("P=3 refused: ffn must be divisible") for line in lines)


def test_sweep_compares_with_one_rank_even_where_it_is_not_asked_for() -> None:
    (row,) = sweep.sweep((8, 128, 1024, 4096), (4,), BY_HAND)
    expected = predict(plan_ffn(8, 128, 1024, 4096, 1), BY_HAND).total_us
    assert row.prediction is not None
    assert row.speedup == expected / row.prediction.total_us
    assert sweep.best(sweep.sweep((8, 128, 1024, 4096), (3, 64), BY_HAND)) is None


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_sweep_plots(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"sweep{suffix}"
    arguments = ["plan", *SIZES, "--sweep", "tp=1,2,3,4", "--link", "pcie5", "--plot", str(path)]
    assert command.main(arguments) == 0
    assert f"wrote {path}" in capsys.readouterr().err
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([*SIZES], "one of the arguments --tp --sweep is required"),
        ([*FOUR, "--sweep", "tp=1"], "not allowed with argument"),
        ([*FOUR, "--link", "nvlink9"], "unknown link 'nvlink9': one of nvlink3"),
        ([*FOUR, "--nodes", "2"], "--nodes needs --link or --machine"),
        ([*FOUR, "--forward-chunks", "auto"], "--forward-chunks needs --link or --machine"),
        ([*FOUR, "--link", "nvlink4", "--nodes", "0"], "--nodes must be at least 1, got 0"),
        ([*FOUR, "--link", "nvlink4", "--ranks-per-node", "0"], "ranks_per_node must be a whole number from 1"),
        ([*FOUR, "--link", "nvlink4", "--ranks-per-node", "2"], "tp=4 exceeds 2 ranks: nodes=1, ranks_per_node=2"),
        ([*FOUR, "--link", "nvlink4", "--forward-chunks", "-1"], "auto or at least 1, got '-1'"),
        ([*FOUR, "--link", "nvlink4", "--algorithm", "direct"], "no figures for all_reduce by direct"),
        ([*FOUR, "--link", "nvlink4", "--plot", "x.png"], "--plot needs --sweep"),
        ([*FOUR, "--machine", "nowhere.json"], "cannot read machine file nowhere.json"),
        ([*FOUR, "--machine", "x.json", "--gpu", "h100"], "cannot go with --gpu h100"),
        ([*SIZES, "--sweep", "tp=1,2"], "--sweep needs --link or --machine"),
        ([*SIZES, "--sweep", "tp=2,x", "--link", "nvlink4"], "--sweep takes tp=P,P,..."),
        ([*SIZES, "--sweep", "tp=0", "--link", "nvlink4"], "got 'tp=0'"),
        ([*SIZES, "--sweep", "dp=2", "--link", "nvlink4"], "got 'dp=2'"),
        ([*SIZES, "--sweep", "tp=2", "--link", "nvlink4", "--plot", "x.txt"], ".png, .pdf or .svg, got x.txt"),
        ([*SIZES, "--sweep", "tp=2", "--link", "nvlink4", "--plot", "no/x.png"], "cannot write no/x.png"),
        ([*SIZES, "--sweep", "tp=3", "--link", "nvlink4", "--plot", "x.png"], "nothing to plot: ffn must be"),
        ([*SIZES, "--seq", "0", "--sweep", "tp=2", "--link", "nvlink4"], "seq must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str],
    shown: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = command.main(["plan", *arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert shown in err
    assert not list(tmp_path.iterdir())


def test_plot_without_matplotlib_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["plan", *SIZES, "--sweep", "tp=2", "--link", "nvlink4", "--plot", str(tmp_path / "x.png")]
    assert command.main(arguments) == 2
    assert "pip install 'tpffn-triton[bench]'" in capsys.readouterr().err
