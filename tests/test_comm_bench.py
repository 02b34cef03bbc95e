"""The fit on made-up times, and the two benchmarks that measure for it, run small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import comm_bench
import comm_fit
import comm_measure
import predict_bench
import ranks

from tpffn_triton.cost_model import LIBRARY_ALGORITHMS, choices, rounds_and_bytes
from tpffn_triton.machines import ALGORITHMS, Machine
from tpffn_triton.plan import plan_ffn
from tpffn_triton.predict import predict

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[1]
SIZES = [1 << power for power in range(12, 25, 2)]


def rows_of(kind: str, p: int, alpha: float, gb_per_s: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """What would be measured where α and β held, by turns too much and too little by the share `noise`."""
    rows = []
    for number, nbytes in enumerate(SIZES):
        rounds, sent = rounds_and_bytes(kind, "ring", nbytes, p)
        us = (rounds * alpha + sent / gb_per_s / 1e3) * (1 + noise * (-1) ** number)
        rows.append({"kind": kind, "world_size": p, "bytes": nbytes, "us_p50": us})
    return rows


@settings(deadline=None)
@given(
    kind=st.sampled_from([*ALGORITHMS]),
    p=st.integers(2, 16),
    alpha=st.floats(0, 1e4),
    gb_per_s=st.floats(1e-2, 1e3),
)
def test_fit_recovers_alpha_and_beta(kind: str, p: int, alpha: float, gb_per_s: float) -> None:
    rows = rows_of(kind, p, alpha, gb_per_s)
    term = comm_fit.fit_collective(rows)
    assert (term.kind, term.world_size, term.algorithm) == (kind, p, "ring")
    for row in rows:
        assert row["us_fitted"] == pytest.approx(row["us_p50"], rel=1e-4)
    # Where one of them decides every time, nothing tells the other.
    least, most = rows_of(kind, p, alpha, gb_per_s)[0]["us_p50"], rows[-1]["us_p50"]
    rounds, _ = rounds_and_bytes(kind, "ring", 1, p)
    if rounds * alpha > 0.01 * least:
        assert term.alpha_us == pytest.approx(alpha, rel=1e-3)
    if rounds * alpha < 0.99 * most:
        assert term.gb_per_s == pytest.approx(gb_per_s, rel=1e-3)


def test_fit_of_noisy_times_is_close_at_both_ends() -> None:
    """Of logarithms: plain least squares would leave α to the noise of the largest message."""
    rows = rows_of("all_reduce", 4, 100.0, 2.0, noise=0.1)
    term = comm_fit.fit_collective(rows)
    assert term.alpha_us == pytest.approx(100, rel=0.1)
    assert term.gb_per_s == pytest.approx(2, rel=0.1)
    assert max(abs(row["fit_error"]) for row in rows) < 0.2


def test_fit_has_no_bias_under_noise_that_multiplies() -> None:
    """Divided by the measured time instead, times that are too long would hardly count: offset and slope too low."""
    x = np.array([2.0**power for power in range(12, 25)])
    random = np.random.default_rng(0)
    fits = [comm_fit.fit_line([*x], [*((500 + x / 500) * np.exp(random.normal(0, 0.5, x.size)))]) for _ in range(100)]
    offset, slope = np.median(fits, axis=0)
    assert offset == pytest.approx(500, rel=0.1)
    assert slope == pytest.approx(1 / 500, rel=0.1)


def test_fit_takes_times_that_grow_but_for_noise() -> None:
    amounts, times = [2048.0, 16384.0, 131072.0, 524288.0], [1171.2, 1198.2, 810.5, 14103.0]
    offset, slope = comm_fit.fit_line(amounts, times)
    assert slope > 0
    left = [np.log((offset + slope * a) / t) for a, t in zip(amounts, times, strict=True)]
    assert sum(left) == pytest.approx(0, abs=1e-6)
    assert comm_fit.fit_line([1, 2, 4], [5.0, 5.0, 5.0])[0] == pytest.approx(5, rel=1e-3)  # latency alone


def test_overlap_is_measured_on_the_nearest_times() -> None:
    settings = comm_measure.Settings((), (512, 1024, 2048), ("fp32", "bf16"), "bf16", 0, 1, "")
    gemms = [
        {"dtype": dtype, "gemm": name, "side": side, "us_p50": us * (1 if dtype == "bf16" else 7)}
        for dtype in ("fp32", "bf16")
        for name in ("linear", "wgrad")
        for side, us in ((512, 10.0), (1024, 80.0), (2048, 640.0))
    ]
    rows = [
        {"kind": kind, "bytes": nbytes, "us_p50": us}
        for kind in ("all_gather", "all_reduce")
        for nbytes, us in ((1, 10.0), (2, 70.0), (3, 500.0))
    ]
    gemm, row = comm_measure.nearest(settings, rows, gemms)
    assert (gemm["dtype"], gemm["gemm"], gemm["side"]) == ("bf16", "wgrad", 1024)
    assert (row["kind"], row["bytes"]) == ("all_reduce", 2)


def test_fit_is_never_negative_and_refuses_what_does_not_grow() -> None:
    offset, slope = comm_fit.fit_line([1, 2, 4], [1.0, 2.5, 6.0])  # steeper than proportional
    assert offset == 0
    assert slope == pytest.approx(1.25, rel=0.1)
    for amounts, times, shown in (
        ([1, 2], [3.0, 1.0], "times that do not grow"),
        ([1, 1], [1.0, 2.0], "two amounts"),
        ([1, 2], [0.0, 2.0], "times above 0"),
        ([1, 2], [1.0, float("nan")], "times above 0"),
    ):
        with pytest.raises(ValueError, match=shown):
            comm_fit.fit_line(amounts, times)


def result_of(p: int, gflops: float) -> dict[str, Any]:
    """A made-up result: 7 µs a launch, the given GFLOP/s in fp32."""
    rows = [] if p == 1 else [row for kind in ALGORITHMS for row in rows_of(kind, p, 50.0 * p, 1.0)]
    gemms = [
        {"dtype": dtype, "gemm": "linear", "flops": flops, "us_p50": 7 + flops / rate / 1e3}
        for dtype, rate in (("fp32", gflops), ("bf16", 4 * gflops))
        for flops in (1e6, 1e8, 1e9)
    ]
    environment = {"ranks": p, "device": "CPU", "cores": 4, "collectives": "gloo" if p > 1 else None}
    environment["device_type"] = "cpu"
    return {
        "rows": rows,
        "gemms": gemms,
        "tb_per_s": 0.02 / p,
        "overlap": {"p20": 0.1, "p50": 0.25, "p80": 0.3},
        "environment": environment,
    }


def test_fitted_machine_predicts_the_times_it_was_fitted_to() -> None:
    machine = comm_fit.fit_machine([result_of(1, 400.0), result_of(2, 200.0), result_of(4, 100.0)])
    assert (machine.ranks_per_node, machine.network, machine.name) == (4, None, "CPU, 4 cores, gloo")
    for p, gflops in ((1, 400.0), (2, 200.0), (4, 100.0)):
        compute = machine.compute(p)
        assert 1e3 * compute.rate("fp32") == pytest.approx(gflops)
        assert 1e3 * compute.rate("bf16") == pytest.approx(4 * gflops)
        assert (compute.launch_us, compute.tb_per_s) == (pytest.approx(7), 0.02 / p)
    for p in (2, 4):
        for kind in ALGORITHMS:
            for row in rows_of(kind, p, 50.0 * p, 1.0):
                (choice,) = choices(machine, kind, row["bytes"], p)
                assert choice.us == pytest.approx(row["us_p50"])
                assert choice.algorithm in LIBRARY_ALGORITHMS
    # One GEMM of the plan is one of those measured: 2·1024³ FLOPs.
    prediction = predict(plan_ffn(8, 128, 1024, 4096, 4), machine)
    assert prediction.kernels[0].us == pytest.approx(7 + 2 * 1024**3 / 100e3, rel=1e-6)
    assert prediction.exposed_us("forward") == pytest.approx(6 * 200 + 1.5 * 4 * 1048.576)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("comm") / "new"
    paths = [f"--json={out / 'here.json'}", f"--plot={out / 'here.png'}"]
    done = run(str(ROOT / "bench" / "comm_bench.py"), "--quick", "--tp=2", f"--max-bytes={8 << 20}", *paths)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, out=out, path=out / "here.json")


def test_two_ranks_measure_a_machine_that_plan_accepts(measured: SimpleNamespace) -> None:
    machine = Machine.load(measured.path)
    assert {(t.kind, t.world_size) for t in machine.link.terms} == {(kind, 2) for kind in ALGORITHMS}
    assert [c.world_size for c in machine.computes] == [2]
    (overlap,) = json.loads(measured.path.read_text())["overlap"]
    assert 0 <= overlap["p20"] <= overlap["p50"] <= overlap["p80"] <= 1
    assert machine.compute(2).overlap == overlap["p50"]
    data = json.loads(measured.path.read_text())
    assert {row["kind"] for row in data["rows"]} == {*ALGORITHMS}
    for row in data["rows"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["fit_error"] == pytest.approx(row["us_fitted"] / row["us_p50"] - 1)
        (choice,) = choices(machine, row["kind"], row["bytes"], 2)
        assert choice.us == pytest.approx(row["us_fitted"])
    (environment,) = data["environment"]
    assert (environment["ranks"], environment["collectives"]) == (2, "gloo")
    assert environment["command"].startswith("bench/comm_bench.py --quick --tp=2")
    plan = ["plan", "--batch=2", "--seq=8", "--hidden=64", "--ffn=128", "--tp=2", "--machine", str(measured.path)]
    done = subprocess.run(
        [sys.executable, "-m", "tpffn_triton", *plan], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert f"Predicted for {machine.name} (a model, not a measurement)" in done.stdout


def test_table_goes_to_stdout_and_progress_to_stderr(measured: SimpleNamespace) -> None:
    out, err = measured.done.stdout, measured.done.stderr
    assert out.count("reduce-scatter") == 6  # five sizes and the fit
    assert "β, GB/s a rank" in out
    assert "P=2: GEMMs, memory and overlap" in err
    assert "P=2: GEMMs" not in out
    assert "Gloo" not in out
    assert (measured.out / "here.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.splitlines())) < 120


def test_predictions_stand_beside_measurements(measured: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "predicted.json"
    arguments = ["--quick", "--tp=2", "--shapes=tiny", f"--machine={measured.path}", f"--json={path}"]
    done = run(str(ROOT / "bench" / "predict_bench.py"), *arguments)
    assert done.returncode == 0, done.stderr
    rows, machine = json.loads(path.read_text())["rows"], Machine.load(path)
    assert machine == Machine.load(measured.path)
    assert [(row["tp"], row["pass"]) for row in rows] == [(2, "forward"), (2, "backward")]
    prediction = predict(plan_ffn(2, 8, 64, 128, 2), machine)
    for row in rows:
        assert 0 < row["exposed_ms_least"] <= row["exposed_ms"] < row["ms_p80"]
        assert row["predicted_ms"] == pytest.approx(prediction.pass_us(row["pass"]) / 1e3)
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["ms_p50"])
    assert done.stdout.count("tiny (B=2 S=8 H=64 F=128)") == 2


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("main", "argument", "shown"),
    [
        (comm_bench.main, "--tp=0", "every P at least 1, got '0'"),
        (comm_bench.main, "--tp=2,x", "got '2,x'"),
        (comm_bench.main, "--tp=1", "needs a P above 1"),
        (comm_bench.main, "--min-bytes=2", "at least 4 and below --max-bytes, got 2 and 16777216"),
        (comm_bench.main, "--max-bytes=64", "got 4096 and 64"),
        (comm_bench.main, "--rounds=0", "--rounds must be at least 1, got 0"),
        (comm_bench.main, "--dtype=fp8", "unknown dtype 'fp8'"),
        (comm_bench.main, "--dtype=tf32", "tf32 needs a CUDA device"),
        (comm_bench.main, "--plot=x.txt", ".png, .pdf or .svg, got x.txt"),
        (comm_bench.main, "--json=/proc/no/x", "cannot write /proc/no/x"),
        (predict_bench.main, "--tp=1,2", "--tp takes P above 1, got 1,2"),
        (predict_bench.main, "--shapes=huge", "unknown shape 'huge'"),
        (predict_bench.main, "--rounds=0", "--rounds must be at least 1, got 0"),
        (predict_bench.main, "--machine=nowhere.json", "cannot read machine file nowhere.json"),
    ],
)
def test_wrong_arguments_end_in_one_line_before_any_rank_starts(
    main: Any, argument: str, shown: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "run", None)
    with pytest.raises(SystemExit) as caught:
        main([argument])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert shown in err


def test_torchrun_decides_how_many_ranks_there_are(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert comm_bench.world_sizes_of(None, "cpu") == (4,)
    with pytest.raises(ValueError, match="torchrun started 4 ranks: --tp must be 4, got 2"):
        comm_bench.world_sizes_of("2", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 of 4 ranks here"):
        comm_bench.world_sizes_of(None, "cpu")


def test_too_few_gpus_are_refused(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert comm_bench.world_sizes_of(None, "cuda") == (1, 2, 4)
    with pytest.raises(ValueError, match="--tp 8 needs 8 GPUs, found 6"):
        comm_bench.world_sizes_of("2,8", "cuda")


def test_a_times_failure_ends_in_exit_status_1(no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    broken = result_of(2, 100.0)
    for row in broken["rows"]:
        row["us_p50"] = 1e9 / row["bytes"]
    monkeypatch.setattr(ranks, "run", lambda *arguments: broken)
    assert comm_bench.main(["--tp=2"]) == 1
    assert "times that do not grow" in capsys.readouterr().err


def test_settings_reach_from_the_least_to_the_largest_message(no_gpu: None) -> None:
    parser = comm_bench.build_parser()
    full = comm_bench.settings_of(parser.parse_args([]), "cpu", "")
    assert (full.sizes[0], full.sizes[-1], full.dtypes) == (4096, 16 << 20, ("fp32", "bf16"))
    assert full.overlapped_dtype == "fp32"
    assert comm_bench.settings_of(parser.parse_args([]), "cuda", "").overlapped_dtype == "bf16"
    assert list(full.sizes) == sorted(set(full.sizes))
    quick = comm_bench.settings_of(parser.parse_args(["--quick", "--max-bytes", "5000"]), "cpu", "")
    assert quick.sizes == (4096, 5000)
    assert isinstance(quick, comm_measure.Settings)
