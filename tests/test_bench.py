"""The benchmark's command line on a tiny shape, and what it refuses; test_bench_parts.py has its parts."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import ffn_bench
import implementations
import measure
import ranks
import tables
import workloads

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[1]
BENCH = str(ROOT / "bench" / "ffn_bench.py")
TINY = workloads.SHAPES["tiny"]
OURS = "--impl=unfused,unfused-onednn,fused"  # test_megatron_bench.py has the others
ONE_RANK = ["--shapes", "tiny", "--tp", "1", "--quick", OURS]
NEEDED = {
    *("impl", "mode", "shape", "batch", "seq", "hidden", "ffn", "tp", "dtype", "graph", "iters"),
    *("activation", "sequence_parallel"),
    *("ms_p20", "ms_p50", "ms_p80", "tflops", "roofline_pct", "speedup_vs_unfused", "comm_ms", "compute_ms"),
    *("communication_included", "peak_mem_bytes", "max_rel_err", "error_vs_unfused"),
    *("device", "ranks", "cores", "threads", "backend", "torch", "triton", "numpy", "python", "commit", "command"),
    *("speedup_vs_megatron", "megatron_core", "cuda_device_max_connections"),
}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process, as on a machine without a GPU; its threads are put back."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield lambda *arguments: ffn_bench.main([*ONE_RANK, *arguments])
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    paths = [
        f"--{kind}={out / f'rows.{suffix}'}" for kind, suffix in (("json", "json"), ("csv", "csv"), ("plot", "png"))
    ]
    done = run(BENCH, "--batch=2", "--seq=8", "--hidden=64", "--ffn=128", "--tp=2", "--quick", OURS, *paths)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, out=out, rows=json.loads((out / "rows.json").read_text()))


def test_two_spawned_ranks_yield_a_row_for_each_implementation_and_mode(spawned: SimpleNamespace) -> None:
    compared = ["unfused", "unfused-onednn", "fused"]
    assert [(r["mode"], r["impl"]) for r in spawned.rows] == [(m, i) for m in ("fwd", "fwd_bwd") for i in compared]
    for row in spawned.rows:
        assert set(row) >= NEEDED
        assert (row["shape"], row["dtype"], row["tp"], row["ranks"]) == ("tiny", "fp32", 2, 2)
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 <= row["comm_ms_least"] <= row["comm_ms"]
        assert row["comm_ms"] > 0
        assert row["comm_ms"] + row["compute_ms"] == pytest.approx(row["ms_p50"])
        assert 0 < row["max_rel_err"] < 1e-5
        assert row["error_vs_unfused"] < 3
        assert row["tflops"] == pytest.approx(TINY.flops(row["mode"], "gelu") / row["ms_p50"] / 1e9)
        assert row["communication_included"] is True
        assert (row["backend"], row["collectives"], row["roofline_pct"]) == ("native", "gloo", None)
        assert row["iters"] == 3
        assert row["command"].startswith("bench/ffn_bench.py --batch=2 ")
    for row, baseline in zip(spawned.rows, [0, 0, 0, 3, 3, 3], strict=True):
        assert row["speedup_vs_unfused"] == pytest.approx(spawned.rows[baseline]["ms_p50"] / row["ms_p50"])
        onednn = spawned.rows[baseline + 1]["ms_p50"]
        assert row["speedup_vs_unfused_onednn"] == pytest.approx(onednn / row["ms_p50"])


def test_table_goes_to_stdout_and_progress_to_stderr(spawned: SimpleNamespace) -> None:
    out, err = spawned.done.stdout, spawned.done.stderr
    assert "tiny: B=2 S=8 H=64 F=128, gelu, fp32, P=2 (gloo)" in out
    assert out.count("unfused-onednn") == 2
    assert "say nothing about a GPU" in out
    assert "timing" not in out
    assert "Gloo" not in out
    assert "tiny fp32 fwd_bwd: timing unfused, unfused-onednn, fused" in err
    assert max(len(line) for line in out.splitlines()) < 160


def test_csv_and_plot_hold_the_same_rows(spawned: SimpleNamespace) -> None:
    with (spawned.out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["impl"], float(r["ms_p50"])) for r in rows] == [(r["impl"], r["ms_p50"]) for r in spawned.rows]
    png = (spawned.out / "rows.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert sorted(p.name for p in spawned.out.iterdir()) == ["rows.csv", "rows.json", "rows.png"]


def test_sequence_parallelism_is_checked_and_timed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run(BENCH, "--shapes=tiny", "--sequence-parallel", "--mode=fwd_bwd", "--quick", OURS, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "F=128, gelu, fp32, sequence-parallel, P=2 (gloo)" in done.stdout
    for row in json.loads(path.read_text()):
        assert row["sequence_parallel"] is True
        assert 0 < row["max_rel_err"] < 1e-5


def test_gated_activation_is_sharded_checked_and_timed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run(BENCH, "--shapes=tiny", "--activation=swiglu", "--mode=fwd_bwd", "--quick", OURS, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "F=128, swiglu, fp32, P=2 (gloo)" in done.stdout
    rows = json.loads(path.read_text())
    assert [row["impl"] for row in rows] == ["unfused", "unfused-onednn", "fused"]
    for row in rows:
        assert (row["activation"], row["tp"], row["ranks"]) == ("swiglu", 2, 2)
        assert 0 < row["max_rel_err"] < 1e-5
        assert row["error_vs_unfused"] < 3
        # 2·M·H·F/P with M=16 H=64 F/P=64, 9 times: 3 by each of w1's halves, 3 by w2.
        assert row["tflops"] * row["ms_p50"] * 1e9 == pytest.approx(9 * 131_072)


def test_torchrun_ranks_are_joined_and_rank_0_alone_writes(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", BENCH, "--shapes", "tiny", "--quick"]
    path = tmp_path / "rows.json"
    done = run(*launch, "--mode", "fwd_bwd", "--impl", "unfused,fused", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rel err (") == 1
    rows = json.loads(path.read_text())
    assert [(r["impl"], r["mode"], r["ranks"]) for r in rows] == [("unfused", "fwd_bwd", 2), ("fused", "fwd_bwd", 2)]
    assert rows[0]["threads"] == max(1, ranks.cores() // 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "4096 is not divisible by the tensor-parallel world_size 3"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--impl", "fused,magic"], "unknown implementation 'magic': one of unfused, unfused-onednn, fused"),
        (["--impl", "unfused-onednn", "--dtype", "fp16"], "does not exist for fp16 on cpu"),
        (["--shapes", "huge"], "unknown shape 'huge'"),
        (["--shapes", "tiny", "--seq", "8"], "cannot go with --seq"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--dtype", "tf32"], "needs a CUDA device"),
        (["--graph"], "--graph needs a CUDA device"),
        (["--iters", "0"], "--iters must be at least 1, got 0"),
        (
            ["--sequence-parallel", "--batch", "3", "--seq", "3"],
            "--sequence-parallel cuts B·S = 9 tokens into 4 equal parts",
        ),
        (["--mode", "bwd"], "invalid choice: 'bwd'"),
        (["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
        (["--plot", "rows.bmp"], "--plot writes .png, .pdf or .svg"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, one_rank, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        ffn_bench.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_torchrun_with_another_number_of_ranks_is_bad_input(one_rank, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        ffn_bench.main(["--tp", "4"])
    assert stopped.value.code == 2
    assert "torchrun started 2 ranks, but analysed has tp 4: give --tp 2" in capsys.readouterr().err


def test_missing_extra_names_the_package_to_install(one_rank, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(SystemExit):
        one_rank()
    assert "pip install 'tpffn-triton[bench]'" in capsys.readouterr().err


def without_b2(x, w1, b1, w2, b2, group):
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1))
    return torch.nn.functional.linear(hidden, w2, 0 * b2)


def tanh_for_erf(x, w1, b1, w2, b2, group):
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1), approximate="tanh")
    return torch.nn.functional.linear(hidden, w2, b2)


def not_a_number(x, w1, b1, w2, b2, group):
    return x * torch.tensor([float("nan")] + [1.0] * (x.shape[-1] - 1))


class _DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, dt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * dt


def doubled_db1(x, w1, b1, w2, b2, group):
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, _DoubledGradient.apply(b1)))
    return torch.nn.functional.linear(hidden, w2, b2)


def up_for_gate(x, w1, b1, w2, b2, group):
    up, gate = torch.nn.functional.linear(x, w1, b1).chunk(2, -1)
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2, b2)


@pytest.mark.parametrize(
    ("wrong", "modes", "tensor", "activation"),
    [
        (without_b2, {"fwd", "fwd_bwd"}, "y", "gelu"),
        (tanh_for_erf, {"fwd", "fwd_bwd"}, "y", "gelu"),
        (not_a_number, {"fwd", "fwd_bwd"}, "y", "gelu"),
        (doubled_db1, {"fwd_bwd"}, "db1", "gelu"),
        (up_for_gate, {"fwd", "fwd_bwd"}, "y", "swiglu"),
    ],
)
def test_wrong_implementation_is_refused(
    wrong, modes, tensor, activation, one_rank, monkeypatch, tmp_path, capsys
) -> None:
    bad = implementations.Implementation("wrong", "", lambda *_: wrong)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "wrong", bad)
    path = tmp_path / "rows.json"
    assert one_rank("--impl", "unfused,wrong", "--activation", activation, "--json", str(path)) == 1
    timed = {(r["impl"], r["mode"]) for r in json.loads(path.read_text())}
    assert timed == {(i, m) for i in ("unfused", "wrong") for m in ("fwd", "fwd_bwd")} - {("wrong", m) for m in modes}
    captured = capsys.readouterr()
    for mode in modes:
        line = f"wrong (tiny, fp32, {mode}) is wrong: "
        assert f"refused: {line}" in captured.err
        assert f"NOT TIMED: {line}" in captured.out
    if wrong in (without_b2, doubled_db1):
        assert f": {tensor} is off by" in captured.err


def test_implementation_that_raises_leaves_the_other_problems_their_rows(
    one_rank, monkeypatch, tmp_path, capsys
) -> None:
    def build(activation: str, sequence_parallel: bool) -> implementations.Forward:
        def forward(x, w1, b1, w2, b2, group):
            if x.dtype == torch.bfloat16:
                raise ArithmeticError("no bf16 here")
            return torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1)), w2, b2)

        return forward

    picky = implementations.Implementation("picky", "", build)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "picky", picky)
    path = tmp_path / "rows.json"
    assert one_rank("--impl", "picky", "--mode", "fwd", "--dtype", "bf16,fp32", "--json", str(path)) == 1
    assert [(r["impl"], r["dtype"]) for r in json.loads(path.read_text())] == [("picky", "fp32")]
    assert "NOT TIMED: tiny, bf16 failed: ArithmeticError: no bf16 here" in capsys.readouterr().out


def fail_on_rank_1(rank: ranks.Rank, argument: Any) -> None:
    if rank.rank == 1:
        raise ArithmeticError(f"{argument} went wrong")
    rank.barrier()


def die_on_rank_1(rank: ranks.Rank, argument: Any) -> None:
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.barrier()


def hang_on_rank_1(rank: ranks.Rank, argument: Any) -> None:
    if rank.rank == 1:
        time.sleep(600)
    rank.barrier()


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (fail_on_rank_1, r"rank 1 failed:[\s\S]*ArithmeticError: this went wrong"),
        (die_on_rank_1, "rank 1 died: .*SIGKILL"),
        (hang_on_rank_1, r"rank 0 failed:[\s\S]*[Tt]imed out"),
    ],
)
def test_failing_rank_ends_the_run_with_its_message(worker: ranks.Worker, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ranks.RankFailed, match=message):
        ranks.run(worker, "this", 2, "cpu", timeout_s=5)
    assert time.monotonic() - begin < 60


def cuda_settings(monkeypatch: pytest.MonkeyPatch, gpus: int, *arguments: str) -> list[measure.Settings]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    return ffn_bench.settings_of(ffn_bench.build_parser().parse_args(arguments), "cuda", "")


def test_fewer_gpus_than_ranks_time_one_shard(one_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = cuda_settings(monkeypatch, 1, "--graph")
    assert settings.one_shard
    assert settings.graph
    assert settings.dtypes == ("bf16",)
    assert not cuda_settings(monkeypatch, 4)[0].one_shard
    by_tp = cuda_settings(monkeypatch, 4, "--shapes", "analysed,decode,medium")
    assert [(s.one_shard, [shape.name for shape in s.shapes]) for s in by_tp] == [
        (False, ["analysed"]),
        (True, ["decode", "medium"]),
    ]
    with pytest.raises(ValueError, match="--sequence-parallel needs 4 ranks: one rank's shard alone exchanges nothing"):
        cuda_settings(monkeypatch, 1, "--sequence-parallel")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="NCCL refuses two ranks on one GPU"):
        cuda_settings(monkeypatch, 1)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_shard_is_checked_timed_and_labelled(activation, one_rank) -> None:
    """What a single GPU runs, rehearsed on the CPU: rank 0's shard of P=2 without a group."""
    (settings,) = ffn_bench.settings_of(
        ffn_bench.build_parser().parse_args(["--shapes", "tiny", "--quick", "--activation", activation, OURS]),
        "cpu",
        "command",
    )
    one_shard = measure.Settings(**{**vars(settings), "one_shard": True})
    result = ranks.run(measure.measure, one_shard, 1, "cpu")
    assert not result["refused"]
    for row in result["rows"]:
        assert row["tp"] == 2
        assert row["communication_included"] is False
        assert row["comm_ms"] is None
        assert row["compute_ms"] == row["ms_p50"]
    table = tables.table(result["rows"], [])
    assert "one rank's shard of P=2 (F/P=64), WITHOUT COMMUNICATION" in table
    assert "NOT in these figures" in table
    assert "comm ms" not in table
