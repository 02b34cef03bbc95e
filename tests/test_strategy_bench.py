"""bench/strategy_bench.py on a tiny shape: rows, plans beside them, tables and plots again from a file, refusals."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ROOT, run
from rank_pool import use

sys.path.insert(0, str(ROOT / "bench"))

import ranks
import strategy_bench
import strategy_measure
import strategy_plot
import strategy_report
import workloads

from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn
from tpffn_triton.sharding import unshard_ffn

pytestmark = pytest.mark.cpu_only
TINY = workloads.SHAPES["tiny"]
SPLIT = ["column_row", "column_row_sequence_parallel", "row_row", "column_column", "row_column"]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("strategy") / "new" / "folder"
    paths = [f"--json={out / 'out.json'}", f"--csv={out / 'out.csv'}", f"--plots={out}"]
    done = run(ROOT / "bench" / "strategy_bench.py", "--quick", "--tp=1,2", "--shapes=tiny", "--threads=1", *paths)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "out.json").read_text())
    return SimpleNamespace(done=done, out=out, path=out / "out.json", results=results, rows=results["rows"])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without GPUs, in an empty folder; no rank may start."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ranks, "run", None)
    monkeypatch.chdir(tmp_path)


def test_every_strategy_has_a_row_for_each_pass(spawned: SimpleNamespace) -> None:
    found = [(row["tp"], row["strategy"], row["pass"]) for row in spawned.rows]
    wanted = [(1, "unsplit"), *((2, name) for name in SPLIT)]
    assert found == [(*which, pass_) for which in wanted for pass_ in ("forward", "backward")]
    for row in spawned.rows:
        assert set(row) >= {*strategy_report.FIELDS, "predicted_exposed_ms", "max_rel_err", "command", "time_utc"}
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 <= row["exposed_ms_least"] <= row["exposed_ms"] <= row["ms_p50"]
        assert (row["exposed_ms"] > 0) == (row["tp"] > 1)
        assert row["compute_ms"] == pytest.approx(row["ms_p50"] - row["exposed_ms"])
        assert 0 < row["max_rel_err"] < 1e-5
        assert (row["rounds"], row["threads"], row["ranks"]) == (3, 1, row["tp"])
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["ms_p50"])
        assert 0 <= row["predicted_exposed_ms"] < row["predicted_ms"]
        base = row["times_column_row"]
        assert base is None if row["tp"] == 1 else base == 1 if row["strategy"] == "column_row" else base > 0
    lines = list(csv.DictReader((spawned.out / "out.csv").open(encoding="utf-8")))
    assert [line["strategy"] for line in lines] == [row["strategy"] for row in spawned.rows]


def test_planned_bytes_are_the_plans(spawned: SimpleNamespace) -> None:
    of_h, of_f = 2 * 8 * 64 * 4, 2 * 8 * 128 * 4  # bytes of y and of the hidden
    sent = {
        ("unsplit", "forward"): 0,
        ("unsplit", "backward"): 0,
        ("column_row", "forward"): 2 * of_h,  # at P=2 an all-reduce sends its payload twice, the others once
        ("column_row_sequence_parallel", "backward"): 3 * of_h,
        ("row_row", "backward"): of_f + of_h,
        ("column_column", "forward"): of_f + of_h,
        ("row_column", "forward"): 2 * of_f + of_h,
    }
    found = {(row["strategy"], row["pass"]): row["sent_bytes"] for row in spawned.rows}
    assert {key: found[key] for key in sent} == sent
    for row in spawned.rows:
        plan = plan_ffn(2, 8, 64, 128, row["tp"], **strategy_measure.TIMED[row["strategy"]].options)
        assert row["sent_bytes"] == sum(c.sent_total_bytes for c in plan.collectives if c.pass_ == row["pass"])
        assert row["saved_bytes"] == plan.totals["saved_bytes"]
        assert row["peak_bytes"] == plan.totals[f"peak_bytes_{row['pass']}"]


def test_table_and_plots_are_drawn_again_from_the_file(
    spawned: SimpleNamespace, here: None, capsys: Any, tmp_path: Path
) -> None:
    assert strategy_bench.main([f"--from={spawned.path}", f"--plots={tmp_path / 'again'}"]) == 0
    out = capsys.readouterr().out
    assert out == spawned.done.stdout
    assert max(map(len, out.splitlines())) <= 120
    lines = out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("column→row,"))
    assert (lines[at].split()[1], lines[at + 1].split()[:2]) == ("forward", ["sequence-parallel", "backward"])
    assert "P=2 (gloo)" in out
    for name in strategy_plot.PLOTS:
        drawn = (tmp_path / "again" / name).read_bytes()
        assert drawn.startswith(b"\x89PNG")
        assert drawn == (spawned.out / name).read_bytes()


def test_progress_is_on_stderr(spawned: SimpleNamespace) -> None:
    assert "tiny, P=2: comparing with fp64" in spawned.done.stderr
    assert "comparing" not in spawned.done.stdout
    assert "Gloo" not in spawned.done.stdout


def test_bars_and_lines_have_the_rows_lengths(spawned: SimpleNamespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_key = {(row["strategy"], row["pass"]): row for row in spawned.rows}
    figures = {name: draw(plt, spawned.rows) for name, draw in strategy_plot.PLOTS.items()}
    (times,), (sent, memory) = figures["strategy_time.png"].axes, figures["strategy_bytes.png"].axes
    ends = [bar.get_x() + bar.get_width() for bar in times.patches]
    shown = [by_key[name, pass_] for name in SPLIT for pass_ in ("forward", "backward")]
    assert ends[::2] == pytest.approx([row["compute_ms"] for row in shown])
    assert ends[1::2] == pytest.approx([row["ms_p50"] for row in shown])
    both = [sum(by_key[name, pass_]["sent_bytes"] for pass_ in ("forward", "backward")) for name in SPLIT]
    assert [bar.get_x() + bar.get_width() for bar in sent.patches][1::2] == pytest.approx([n / 2**20 for n in both])
    kept = [by_key[name, "forward"]["saved_bytes"] / 2**20 for name in SPLIT]
    assert [bar.get_width() for bar in memory.patches][::2] == pytest.approx(kept)
    speed_up = sum(by_key["unsplit", pass_]["ms_p50"] for pass_ in ("forward", "backward")) / sum(
        by_key["row_row", pass_]["ms_p50"] for pass_ in ("forward", "backward")
    )
    (scaling,) = figures["strategy_scaling.png"].axes
    assert [*scaling.lines[3].get_ydata()] == pytest.approx([1, speed_up])
    (predicted,) = figures["strategy_predicted.png"].axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in predicted.lines[: len(spawned.rows)]]
    assert points == [(row["ms_p50"], row["predicted_ms"]) for row in spawned.rows]
    for figure in figures.values():
        plt.close(figure)


def test_a_strategy_has_its_place_in_every_panel(spawned: SimpleNamespace) -> None:
    """Also where another was refused for one shape alone."""
    refused = [row | {"shape": "other"} for row in spawned.rows if row["strategy"] != "row_row"]
    (_, second), places = strategy_plot._at_largest_p([*spawned.rows, *refused])
    assert [*places] == SPLIT
    assert [places[name] for name in second] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("device_type", "tp", "threads", "ideal"), [("cpu", 4, 1, 4), ("cpu", 8, 1, 4), ("cpu", 4, 4, 1), ("cuda", 8, 4, 8)]
)
def test_ideal_speed_up_is_bounded_by_cores(device_type: str, tp: int, threads: int, ideal: float) -> None:
    row = {"device_type": device_type, "tp": tp, "threads": threads, "cores": 4}
    assert strategy_plot._ideal(row) == ideal


def with_one_wrong(rank: int, world_size: int) -> dict[str, Any]:
    """Measure where row_row adds b2 on no rank; under sequence parallelism nothing changes."""
    use("native")
    right = strategy_measure.partitioned_ffn

    def wrong(x: Any, w1: Any, w2: Any, b1: Any, b2: Any, **options: Any) -> Any:
        return right(x, w1, w2, b1, b2 if options["partitioning"] != "row_row" else b2 * 0, **options)

    strategy_measure.partitioned_ffn = wrong
    place = ranks.Rank(rank, world_size, torch.device("cpu"), 1, torch.distributed.group.WORLD)
    try:
        settings = strategy_measure.Settings((TINY,), "fp32", "gelu", 1, True, 1, None, "")
        return strategy_measure.measure(place, settings)
    finally:
        strategy_measure.partitioned_ffn = right


def test_a_wrong_strategy_is_not_timed(ranks_of: Any) -> None:
    for found in ranks_of(2).run(with_one_wrong):
        assert list(dict.fromkeys(row["strategy"] for row in found["rows"])) == [n for n in SPLIT if n != "row_row"]
        (line,) = found["refused"]
        assert line.startswith("row_row (tiny, P=2, fp32) is wrong: ")
        assert line.endswith("allowed 1e-05")


def test_a_wrong_strategy_ends_in_exit_status_1(
    spawned: SimpleNamespace, here: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    left = [row for row in spawned.rows if row["tp"] == 2 and row["strategy"] != "row_row"]
    found = {"rows": left, "refused": ["row_row is wrong"], "machine": None}
    monkeypatch.setattr(ranks, "run", lambda *arguments: found)
    arguments = ["--tp=2", "--shapes=tiny", f"--machine={spawned.path}", f"--json={tmp_path / 'out.json'}"]
    assert strategy_bench.main(arguments) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED: row_row is wrong" in out
    assert "row→row" not in out
    plots = [f"--plots={tmp_path}"]  # not measured at P=1, and one strategy less
    assert strategy_bench.main([f"--from={tmp_path / 'out.json'}", *plots]) == 1
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_expected_gradients_are_the_shards_of_the_whole(partitioning: str, activation: str) -> None:
    full = workloads.draw(TINY, "fp32", activation, torch.device("cpu"))
    whole = workloads.reference(full, "fwd_bwd", activation)
    parts = [workloads.own_part(whole, full, activation, rank, 2, partitioning=partitioning) for rank in range(2)]
    names = ("dw1", "db1", "dw2", "db2")
    joined = unshard_ffn(
        [tuple(part[name] for name in names) for part in parts], activation=activation, partitioning=partitioning
    )
    for name, t in zip(names, joined, strict=True):
        assert t is not None
        assert torch.equal(t, whole[name])
    own = workloads.shard(full, 1, 2, activation, partitioning)
    assert {f"d{name}": t.shape for name, t in own.leaves().items()} == {
        name: t.shape for name, t in parts[1].items() if name != "y"
    }


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--tp=1"], "needs a P above 1"),
        (["--tp=2,x"], "got '2,x'"),
        (["--shapes=huge"], "unknown shape 'huge'"),
        (["--shapes=decode"], "decode: sequence parallelism cuts S = 1 into 2 equal parts"),
        (["--shapes=small", "--tp=3"], "1024 is not divisible by the tensor-parallel world_size 3"),
        (["--rounds=0"], "--rounds must be at least 1, got 0"),
        (["--threads=0"], "--threads must be at least 1, got 0"),
        (["--machine=nowhere.json"], "cannot read machine file nowhere.json"),
        (["--json=/proc/no/x"], "cannot write /proc/no/x"),
        (["--plots=/proc/no"], "cannot write /proc/no/strategy_time.png"),
        (["--from=nowhere.json"], "cannot read nowhere.json"),
        (["--from=nowhere.json", "--tp=2"], "--from measures nothing: it cannot go with --tp"),
        (["--quick", "--from=nowhere.json"], "--from measures nothing: it cannot go with --quick"),
        (["--from=nowhere.json", "--csv=/proc/no/x"], "cannot write /proc/no/x"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments: list[str], shown: str, here: None, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        strategy_bench.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert shown in err


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda results: results["rows"][0].pop("ms_p50"), "has a row without ms_p50"),
        (lambda results: results["rows"][0].update(strategy="diagonal"), "unknown strategy 'diagonal'"),
        (lambda results: results.pop("rows"), "it has no rows"),
        (lambda results: results.pop("machine"), "machine must be an object"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    change: Any, shown: str, spawned: SimpleNamespace, here: None, capsys: Any, tmp_path: Path
) -> None:
    results = json.loads(spawned.path.read_text())
    change(results)
    (tmp_path / "other.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit) as caught:
        strategy_bench.main([f"--from={tmp_path / 'other.json'}"])
    err = capsys.readouterr().err
    assert (caught.value.code, err.count("\n")) == (2, 1)
    assert shown in err


def test_what_it_needs_is_said(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = strategy_bench.build_parser().parse_args([])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="one GPU has nobody to communicate with"):
        strategy_bench.settings_of(args, "cuda", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    wanted = strategy_bench.settings_of(args, "cuda", "")
    assert [*wanted] == [1, 2, 4]
    assert {settings.dtype for settings in wanted.values()} == {"bf16"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="not under torchrun"):
        strategy_bench.settings_of(args, "cpu", "")


def test_every_rank_has_the_same_threads_at_every_p(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "cores", lambda: 8)
    wanted = strategy_bench.settings_of(strategy_bench.build_parser().parse_args([]), "cpu", "")
    assert {p: settings.threads for p, settings in wanted.items()} == {1: 2, 2: 2, 4: 2}
