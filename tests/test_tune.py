"""bench/tune.py: a wrong candidate is not timed, and what is written is what kernels/_tuned.py reads.

Searches run in the interpreter, on one tiny shape, without a compiler; candidates and filter: test_tune_candidates.py.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))

import tune
import tune_measure
import tune_search
import tune_workloads
from tune_candidates import candidates, name_of
from tune_cases import Case, all_cases, given_shard, shards_of
from tune_filter import OK, FilterFailed

from tpffn_triton.kernels import _tuned
from tpffn_triton.kernels._configs import KERNELS, Config

pytestmark = pytest.mark.cpu_only
LINEAR = Case("linear", "16bit", 16, 32, 32)
TINY = ["--shape", "16,32,64", "--kernel", "linear", "--candidates", "2"]


class Approves:
    """A filter that compiles nothing and drops nothing."""

    def __init__(self, arch: str, arithmetic: str, jobs: int, budget: object) -> None:
        self.arithmetic = arithmetic

    def __enter__(self) -> Approves:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, kernel: str, configs: list[Config]) -> Future[dict[Config, str]]:
        done: Future[dict[Config, str]] = Future()
        done.set_result(dict.fromkeys(configs, OK))
        return done


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process, where kernels are interpreted; its threads are put back."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield lambda *arguments: tune.main([*map(str, arguments)])
    torch.set_num_threads(threads)


@pytest.fixture
def approved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_search, "Filter", Approves)


# What is chosen


def test_the_search_writes_what_kernels_read_and_resumes(search, tmp_path: Path, capsys, monkeypatch) -> None:
    out, state = tmp_path / "new" / "tuned.json", tmp_path / "state.json"
    monkeypatch.setattr(tune_search, "Filter", Approves)
    assert search(*TINY, "--out", out, "--json", state) == 0
    data = json.loads(out.read_text())
    assert [*data] == ["schema", "device", "arch", "torch", "triton", "date", "commit", "rows"]
    assert (data["schema"], data["device"], data["arch"]) == (1, "interpreter", "sm_90")
    (row,) = data["rows"]
    assert {name: row[name] for name in Case._fields} == LINEAR._replace(inner=64)._asdict()
    assert [*row][5:] == ["config", "us", "table_us", "cublas_us", "candidates", "date", "commit"]
    assert row["candidates"] == 2
    device, (measured,) = _tuned.read(out)
    assert device == "interpreter"
    assert measured.sizes == (16, 32, 64)

    rows = json.loads(state.read_text())
    assert [(r["contender"], r["verdict"]) for r in rows if r["rows"] is None] == [("candidate", OK)] * 2
    timed = [r for r in rows if r["rows"] is not None]
    assert [r["contender"] for r in timed] == ["table", "cublas", "candidate"]
    for r in timed:
        assert 0 < r["us_p20"] <= r["us_p50"] <= r["us_p80"]
        assert 0 < r["max_rel_err"] < 2e-2
        assert r["ratio_p80"] > 0
        assert r["command"].startswith("bench/tune.py --shape 16,32,64 ")
    (chosen,) = (r for r in timed if r["chosen"])
    assert (chosen["config"], chosen["us_p50"]) == (row["config"], row["us"])
    printed = capsys.readouterr().out
    assert "THESE TIMES MEAN NOTHING" in printed

    def measured_again(*_):
        raise AssertionError

    monkeypatch.setattr(tune_search, "measure", measured_again)
    monkeypatch.setattr(Approves, "start", measured_again)
    assert search(*TINY, "--out", out, "--json", state, "--resume") == 0
    assert json.loads(out.read_text())["rows"] == data["rows"]
    assert json.loads(state.read_text()) == rows


def test_kernels_left_out_are_added_on_resuming(search, approved, tmp_path: Path) -> None:
    out, state = tmp_path / "tuned.json", tmp_path / "state.json"
    files = ["--shape", "16,32,32", "--candidates", "1", "--out", out, "--json", state]
    assert search(*files, "--kernel", "dgrad") == 0
    assert search(*files, "--kernel", "linear", "--resume") == 0
    kernels = [row["kernel"] for row in json.loads(out.read_text())["rows"]]
    assert kernels == ["dgrad", "dgrad", "linear"]  # plain and gated
    assert search(*files, "--kernel", "linear") == 0
    # What an earlier search has measured of other cases stays; on another device it does not.
    assert [row["kernel"] for row in json.loads(out.read_text())["rows"]] == ["linear", "dgrad", "dgrad"]
    out.write_text(out.read_text().replace('"interpreter"', '"NVIDIA H100"'))
    assert search(*files, "--kernel", "linear") == 0
    assert [row["kernel"] for row in json.loads(out.read_text())["rows"]] == ["linear"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_right_in_its_workload(kernel: str) -> None:
    """Odd numbers of tokens too; torch's GEMM for plain GEMMs alone."""
    shard = given_shard(70 if kernel.endswith("ffn") else 5, 32, 48)
    case = next(case for case in all_cases([shard], [kernel], "16bit"))
    rank = tune.Rank(0, 1, torch.device("cpu"), 1, None)
    tune.interpreter.install()
    config = candidates(case, "sm_90")[0]
    rows, unreached = tune_measure.measure(rank, case, [config], 1)
    assert unreached == 0
    assert [row["verdict"] for row in rows] == [OK] * len(rows)
    assert [row["contender"] for row in rows] == ["table"] + ["cublas"] * (kernel in _tuned.TORCH_INSTEAD)


def wrong_where(condition, factor=1.1):
    right = tune_workloads.linear

    def linear(a, weight, bias, config):
        return right(a, weight, bias, config=config) * (factor if condition(config) else 1.0)

    return linear


def test_a_wrong_candidate_is_not_timed(search, approved, tmp_path: Path, monkeypatch, capsys) -> None:
    out, state = tmp_path / "tuned.json", tmp_path / "state.json"
    own, other = candidates(LINEAR._replace(inner=64), "sm_90", 2)
    monkeypatch.setattr(tune_workloads, "linear", wrong_where(lambda config: config == other))
    assert search(*TINY, "--out", out, "--json", state) == 1
    (row,) = (r for r in json.loads(state.read_text()) if r["config"] == other.meta and r["rows"] is not None)
    assert row["verdict"].startswith(f"candidate {name_of(other)} is wrong: y is off by 0.1")
    assert row["verdict"].endswith(" against fp64, allowed 0.02")
    assert row["us_p50"] is None
    assert json.loads(out.read_text())["rows"][0]["candidates"] == 1
    assert f"FAILED: linear [16, 32] over 64, 16bit: {row['verdict']}\n" in capsys.readouterr().out

    monkeypatch.setattr(tune_workloads, "linear", wrong_where(lambda config: config == own))
    assert search(*TINY, "--out", tmp_path / "none.json") == 1
    assert not (tmp_path / "none.json").exists()  # without the tables' choice there is nothing to compare with


def test_a_candidate_with_one_wrong_row_is_not_timed(monkeypatch) -> None:
    case = Case("linear", "16bit", 16384, 32, 64)
    own, other = candidates(case, "sm_90", 2)

    def linear(a, weight, bias, config):
        y = F.linear(a, weight, bias)
        if config == other:
            y[777] = 0
        return y

    monkeypatch.setattr(tune_workloads, "linear", linear)
    rank = tune.Rank(0, 1, torch.device("cpu"), 1, None)
    rows, _ = tune_measure.measure(rank, case, [own, other], 1)
    assert [row["verdict"] == OK for row in rows] == [True, True, False]
    assert " is wrong: y is off by " in rows[2]["verdict"]
    assert rows[2]["us_p50"] is None


def test_a_candidate_that_leaves_nan_is_not_timed(search, approved, tmp_path: Path, monkeypatch) -> None:
    state = tmp_path / "state.json"
    _, other = candidates(LINEAR._replace(inner=64), "sm_90", 2)
    monkeypatch.setattr(tune_workloads, "linear", wrong_where(lambda config: config == other, float("nan")))
    assert search(*TINY, "--out", tmp_path / "tuned.json", "--json", state) == 1
    row = json.loads(state.read_text())[-1]
    assert (row["config"], row["max_rel_err"], row["us_p50"]) == (other.meta, None, None)
    assert "y is off by inf" in row["verdict"]


def test_what_a_gpu_refuses_is_passed_over(search, approved, tmp_path: Path, monkeypatch) -> None:
    right = tune_workloads.linear
    _, other = candidates(LINEAR._replace(inner=64), "sm_90", 2)

    def linear(a, weight, bias, config):
        if config == other:
            raise RuntimeError("out of resources")
        return right(a, weight, bias, config=config)

    monkeypatch.setattr(tune_workloads, "linear", linear)
    state = tmp_path / "state.json"
    assert search(*TINY, "--out", tmp_path / "tuned.json", "--json", state) == 0
    verdicts = [row["verdict"] for row in json.loads(state.read_text()) if row["rows"] is not None]
    assert verdicts == [OK, OK, f"candidate {name_of(other)} failed: RuntimeError: out of resources"]


def test_candidates_that_were_not_compiled_are_not_launched(search, tmp_path: Path, monkeypatch, capsys) -> None:
    class Drops(Approves):
        def start(self, kernel, configs):
            done = Future()
            done.set_exception(FilterFailed("no compiler"))
            return done

    monkeypatch.setattr(tune_search, "Filter", Drops)
    assert search(*TINY, "--out", tmp_path / "tuned.json") == 1
    (row,) = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert row["candidates"] == 1
    assert "FAILED: candidates of linear: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["not reached", "not compiled"])
def test_cases_measured_in_part_are_resumed(missing: str, search, tmp_path: Path, monkeypatch, capsys) -> None:
    """One whole, the other without a candidate; the first is not measured again."""
    out, state = tmp_path / "tuned.json", tmp_path / "state.json"
    flags = ("--kernel", "linear", "--candidates", "2", "--out", out, "--json", state)
    shapes = ("--shape", "16,32,64", "--shape", "16,32,96")
    measured: list[tuple[int, int]] = []

    def measure(rank, case, configs, seconds):
        measured.append((case.inner, len(configs)))
        reached = configs[:1] if missing == "not reached" and len(measured) == 2 else configs
        rows, _ = tune_measure.measure(rank, case, reached, seconds)
        return tune_measure.Measured(rows, len(configs) - len(reached))

    class Drops(Approves):
        def start(self, kernel, configs):
            done = Future()
            done.set_exception(FilterFailed("no compiler"))
            return done

    monkeypatch.setattr(tune_search, "measure", measure)
    monkeypatch.setattr(tune_search, "Filter", Approves if missing == "not reached" else Drops)
    assert search(*flags, *shapes) == (missing == "not compiled")
    monkeypatch.setattr(tune_search, "Filter", Approves)
    again = [(96, 2)] if missing == "not reached" else [(64, 2), (96, 2)]
    assert search(*flags, *shapes, "--resume") == 0
    assert measured[2:] == again
    # What was measured again takes the place of what it was.
    rows = [row for row in json.loads(state.read_text()) if row["rows"] is not None]
    assert sorted(row["inner"] for row in rows) == [64] * 3 + [96] * 3
    assert [row["candidates"] for row in json.loads(out.read_text())["rows"]] == [2, 2]
    assert search(*flags, *shapes, "--resume") == 0
    assert measured[2:] == again


def test_what_does_not_fit_the_budget_is_said(search, approved, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tuned.json"
    assert search(*TINY, "--out", out, "--budget", "1") == 0
    assert not out.exists()
    printed, progress = capsys.readouterr()
    assert "nothing was measured" in printed
    out.write_text("{}")
    assert search(*TINY, "--out", out, "--budget", "1") == 0
    assert out.read_text() == "{}"
    assert "wrote" not in progress + capsys.readouterr().err
    assert "LEFT OUT: linear [16, 32] over 64, 16bit\n" in printed


# The command line


def test_dry_run_and_list_count_the_same(search, capsys) -> None:
    assert search("--dry-run", "--arch", "sm_80", "--regime", "analysed", "--kernel", "linear,wgrad") == 0
    lines = capsys.readouterr().out.splitlines()
    cases = all_cases(shards_of(["analysed"]), ["linear", "wgrad"], "16bit")
    every = [candidates(case, "sm_80") for case in cases]
    total = [len(cases), sum(len({*found}) for found in every[:1]) + len({c for found in every[1:] for c in found})]
    assert lines[-2].split() == ["in", "all", *map(str, (*total, sum(map(len, every))))]
    assert lines[-1].startswith(f"480 s, {480 / len(cases):.1f} s a case")
    assert search("--list", "--regime", "analysed", "--kernel", "linear,wgrad") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(cases)


def test_without_a_gpu_it_says_what_to_do() -> None:
    result = run(ROOT / "bench" / "tune.py")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "needs a CUDA device; without one --filter-only compiles candidates" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "linaer"], "unknown kernel 'linaer': one of ffn, "),
        (["--regime", "dekode"], "unknown regime 'dekode': one of analysed, "),
        (["--shape", "16,32"], "--shape takes M,H,F/P, three integers, got '16,32'"),
        (["--shape", "16,32,50"], "multiples of 16, which tiles need; got '16,32,50'"),
        (["--shape", "0,32,32"], "M must be at least 1"),
        (["--shape", "16,32,32", "--regime", "decode"], "give one of them"),
        (["--budget", "0"], "--budget must be positive, got 0.0"),
        (["--budget", "nan"], "--budget must be positive, got nan"),
        (["--candidates", "0"], "--candidates must be positive, got 0"),
        (["--arithmetic", "fp8"], "invalid choice: 'fp8'"),
        (["--arch", "sm_90"], "--arch goes with --list, --dry-run or --filter-only"),
        (["--resume"], "--resume goes on from the file of --json: give it"),
        (["--list", "--dry-run"], "one of --list, --dry-run and --filter-only at a time"),
        (["--kernel", "weight_grads", "--regime", "decode"], "nothing to tune: no case of weight_grads in decode"),
        (["--json", "/dev/null/state.json"], "cannot write /dev/null/state.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message: str, search, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        search(*arguments, "--out", tmp_path / "out.json") if "--list" not in arguments else search(*arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_rehearsal_names_its_file_and_a_gpu_is_not_interpreted(search, monkeypatch, capsys) -> None:
    for available, message in ((False, "say with --out where to"), (True, "TRITON_INTERPRET=1 is set: unset it")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        with pytest.raises(SystemExit) as stopped:
            search()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
