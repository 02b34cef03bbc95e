"""bench/tune.py: candidates are bounded, the compiler's verdict keeps or drops them, a wrong one is not timed, and what
is written is what kernels/_tuned.py reads. Searches run in the interpreter, on one tiny shape."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import compile_inspect
import compile_pool
import pytest
import torch
from commands import ROOT, run
from test_compile_gate import run_compiling

sys.path.insert(0, str(ROOT / "bench"))

import tune
import tune_filter
import tune_measure
import tune_rows
import tune_search
import tune_workloads
from tune_candidates import MOST, SHARED_BYTES, candidates, name_of, tables_choice
from tune_cases import REGIMES, Case, Shard, all_cases
from tune_filter import OK, Filter, FilterFailed, OutOfTime
from tune_rows import CUBLAS, State, choose

from tpffn_triton.kernels import _tuned
from tpffn_triton.kernels._configs import KERNELS, Config

pytestmark = pytest.mark.cpu_only
OWN = Config(64, 64, 64, 4, 4, USE_TMA=True)
FASTER, OTHER = replace(OWN, num_stages=3), replace(OWN, BLOCK_N=32)
LINEAR = Case("linear", "16bit", 16, 32, 32)
TINY = ["--shape", "16,32,64", "--kernel", "linear", "--candidates", "2"]


class Approves:
    """A filter that compiles nothing and drops nothing."""

    def __init__(self, arch: str, arithmetic: str, jobs: int, deadline: float) -> None:
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


# Candidates


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_candidates_are_few_and_begin_with_the_tables_choice(arch: str) -> None:
    kernels = set()
    for case in all_cases(REGIMES, KERNELS, "16bit"):
        found = candidates(case, arch)
        own = tables_choice(case, arch)
        assert (found[0] if found else None) == own
        assert len(found) == len(set(found)) <= MOST
        kernels |= {case.kernel} if len(found) > 2 else set()
        for config in found[1:]:
            assert config.BLOCK_M <= 64 or 2 * case.rows > config.BLOCK_M
            assert not (config.USE_TMA and arch in ("sm_80", "gfx942"))
            assert not (config.SPLIT_EPILOGUE and case.kernel in ("gated_ffn", "gated_linear_act"))
            if case.kernel.endswith("few_tokens"):
                assert case.rows <= config.BLOCK_M
            else:
                assert (config.SPLIT_K, config.PREFETCH_K) == (1, 0)
    few = {"few_tokens", "gated_few_tokens"}
    assert kernels == set(KERNELS) - (few if arch == "gfx942" else set())


@pytest.mark.parametrize("arithmetic", ["tf32", "ieee"])
def test_fp32_is_loaded_through_pointers(arithmetic: str) -> None:
    for case in all_cases(("analysed", "decode"), KERNELS, arithmetic):
        found = candidates(case, "sm_90")
        assert len(found) > 2
        assert not any(config.USE_TMA for config in found)


def test_the_limits_are_the_gates() -> None:
    assert SHARED_BYTES == compile_inspect.SHARED_LIMIT
    case = Case("linear", "16bit", 4096, 4096, 4096)
    assert all(
        config.num_stages * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * 2 <= SHARED_BYTES["sm_80"]
        for config in candidates(case, "sm_80", 1000)[1:]
    )


def test_cases_are_what_configurations_are_asked_for() -> None:
    """Sizes as in the launchers, plain and gated: M=4, H=32, F/P=48."""
    found = {}
    for case in all_cases((), KERNELS, "16bit", [Shard(4, 32, 48)]):
        found.setdefault(case.kernel, []).append(tuple(case[2:]))
    forward = [(4, 48, 32)]
    names = ("few_tokens", "ffn", "linear_act", "linear_dact")
    assert found == dict.fromkeys((*names, *(f"gated_{name}" for name in names)), forward) | {
        "linear": [(4, 32, 48)],
        "dgrad": [(4, 32, 48), (4, 32, 96)],
        "wgrad": [(48, 32, 4), (32, 48, 4), (96, 32, 4)],
        "weight_grads": [(96, 32, 4), (144, 32, 4)],
    }


# The filter


@pytest.mark.slow
def test_the_filter_drops_what_spills() -> None:
    spilling, good = Config(128, 128, 64, 8, 3, USE_TMA=True), Config(64, 64, 64, 4, 4, USE_TMA=True)
    assert os.environ["TRITON_INTERPRET"] == "1"  # which the compiler must not see
    with Filter("sm_90", "16bit", 2, time.monotonic() + 120) as compiler:
        found = compiler.start("linear_dact", [spilling, good]).result()
    assert found[spilling].startswith("spills: ")
    assert found[good] == OK


def test_the_filter_ends_with_its_time_or_says_why(monkeypatch, tmp_path: Path) -> None:
    sleeping, broken = tmp_path / "sleeping.py", tmp_path / "broken.py"
    sleeping.write_text("import time\ntime.sleep(60)\n")
    broken.write_text("raise SystemExit('no compiler here')\n")
    begin = time.monotonic()
    with Filter("sm_90", "16bit", 1, begin + 1) as compiler:
        monkeypatch.setattr(tune_filter, "GATE", sleeping)
        with pytest.raises(OutOfTime, match="took longer"):
            compiler.start("linear", [OWN]).result()
        with pytest.raises(OutOfTime, match="no time was left"):
            compiler.start("linear", [OWN]).result()
    assert time.monotonic() - begin < 30
    with Filter("sm_90", "16bit", 1, time.monotonic() + 60) as compiler:
        monkeypatch.setattr(tune_filter, "GATE", broken)
        with pytest.raises(FilterFailed, match=r"broken\.py reported nothing: no compiler here"):
            compiler.start("linear", [OWN]).result()


def dies_of_three(number: int) -> int:
    if number == 3:
        os._exit(13)
    return 10 * number


def test_a_compiler_that_dies_loses_one_candidate() -> None:
    numbers = range(8)
    found = compile_pool.results(dies_of_three, numbers, 2)
    assert found == {number: 10 * number for number in numbers if number != 3}


@pytest.mark.slow
def test_a_launch_finds_what_the_filter_compiled(tmp_path: Path) -> None:
    """By Triton's hash, which names the files of its cache; not of `linear`, which the gate compiles as dependent."""
    script = tmp_path / "hashes.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import stubbed_launches, torch\n"
        "hashes = []\n"
        "stubbed_launches.stub('sm_90', lambda kernel: hashes.append(kernel.hash))\n"
        "import compile_gate as gate, tune_workloads\n"
        "from tune_cases import Case\n"
        "tune_workloads.arch_of = lambda device: 'sm_90'\n"
        "config = gate.Config(64, 64, 64, 4, 3, USE_TMA=True)\n"
        "for kernel in sys.argv[2:]:\n"
        "    case = Case(kernel, '16bit', 64, 64, 64)\n"
        "    tune_workloads.workload(case, torch.device('cpu')).launch(config)\n"
        "    activation, form = gate.activations_of(kernel)[0], gate.OPTIONS.get(kernel, ())\n"
        "    whole = ('sm_90', kernel, config, '16bit', 'bf16', activation, 'all', 'bf16', form)\n"
        "    print(kernel, gate.compile_variant(gate.Variant(*whole)).hash == hashes[-1])\n"
    )
    kernels = [kernel for kernel in KERNELS if kernel not in ("linear", "gated_few_tokens", "gated_ffn")]
    result = run_compiling(script, ROOT / "bench", *kernels)
    assert result.stdout.split()[1::2] == ["True"] * len(kernels), result.stdout + result.stderr


def test_the_gate_refuses_what_is_no_list_of_candidates(tmp_path: Path) -> None:
    path = tmp_path / "candidates.json"
    path.write_text('[{"kernel": "linear", "arithmetic": "16bit", "config": {"BLOCK_Q": 1}}]')
    result = run_compiling(ROOT / "tests" / "compile_gate.py", "--arch", "sm_90", "--candidates", path)
    assert result.returncode == 2
    assert "unexpected keyword argument 'BLOCK_Q'" in result.stderr


# What is chosen


def test_choice() -> None:
    own = [10.0, 10.0, 10.0, 10.0, 10.0]

    def times(*percent: float) -> list[float]:
        return [a * b / 100 for a, b in zip(own, percent, strict=True)]

    slower = times(101, 102, 103, 104, 105)
    assert choose({OWN: own, FASTER: slower}, OWN) == OWN
    assert choose({OWN: own, FASTER: times(90, 91, 92, 93, 94), OTHER: times(80, 82, 81, 85, 83)}, OWN) == OTHER
    # Faster in the median, not by more than noise.
    assert choose({OWN: own, FASTER: times(90, 90, 90, 105, 105)}, OWN) == OWN
    # Torch's GEMM must beat the best by 2 %, not the tables' choice.
    assert choose({OWN: own, CUBLAS: times(99, 99, 99, 99, 99)}, OWN) == OWN
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 97, 97)}, OWN) is CUBLAS
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 97, 97), FASTER: times(96, 96, 96, 96, 96)}, OWN) == FASTER
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 99, 99)}, OWN) == OWN


def test_the_search_writes_what_kernels_read_and_resumes(search, tmp_path: Path, capsys, monkeypatch) -> None:
    out, state = tmp_path / "new" / "tuned.json", tmp_path / "state.json"
    monkeypatch.setattr(tune_search, "Filter", Approves)
    assert search(*TINY, "--out", out, "--json", state) == 0
    data = json.loads(out.read_text())
    assert [*data] == ["schema", "device", "arch", "torch", "triton", "date", "commit", "rows"]
    assert (data["schema"], data["device"], data["arch"]) == (1, "interpreter", "sm_90")
    (row,) = data["rows"]
    assert {name: row[name] for name in Case._fields} == LINEAR._replace(inner=64)._asdict()
    assert [*row][5:] == ["config", "us", "table_us", "cublas_us", "candidates"]
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
    assert [row["kernel"] for row in json.loads(out.read_text())["rows"]] == ["linear"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_right_in_its_workload(kernel: str) -> None:
    """Odd numbers of tokens too; torch's GEMM for plain GEMMs alone."""
    case = next(case for case in all_cases((), [kernel], "16bit", [Shard(5, 32, 48)]))
    rank = tune.Rank(0, 1, torch.device("cpu"), 1, None)
    tune.interpreter.install()
    config = candidates(case, "sm_90")[0]
    rows, unreached = tune_measure.measure(rank, case, [config], 1)
    assert unreached == 0
    assert [row["verdict"] for row in rows] == [OK] * len(rows)
    assert [row["contender"] for row in rows] == ["table"] + ["cublas"] * (kernel in _tuned.TORCH_INSTEAD)


def wrong_where(condition):
    right = tune_workloads.linear

    def linear(a, weight, bias, config):
        return right(a, weight, bias, config=config) * (1.1 if condition(config) else 1.0)

    return linear


def test_a_wrong_candidate_is_not_timed(search, approved, tmp_path: Path, monkeypatch, capsys) -> None:
    out, state = tmp_path / "tuned.json", tmp_path / "state.json"
    own, other = candidates(LINEAR._replace(inner=64), "sm_90", 2)
    monkeypatch.setattr(tune_workloads, "linear", wrong_where(lambda config: config == other))
    assert search(*TINY, "--out", out, "--json", state) == 1
    (row,) = (r for r in json.loads(state.read_text()) if r["config"] == other.meta and r["rows"] is not None)
    assert row["verdict"].startswith("wrong: y is off by 0.1 against fp64, allowed 0.02")
    assert row["us_p50"] is None
    (row,) = json.loads(out.read_text())["rows"]
    assert row["candidates"] == 1
    assert f"FAILED: linear [16, 32] over 64, 16bit, candidate {name_of(other)}: wrong: " in capsys.readouterr().out

    monkeypatch.setattr(tune_workloads, "linear", wrong_where(lambda config: config == own))
    assert search(*TINY, "--out", tmp_path / "none.json") == 1
    assert not (tmp_path / "none.json").exists()  # without the tables' choice there is nothing to compare with


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
    assert verdicts == [OK, OK, "failed: RuntimeError: out of resources"]


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


def test_what_does_not_fit_the_budget_is_said(search, approved, tmp_path: Path, capsys) -> None:
    assert search(*TINY, "--out", tmp_path / "tuned.json", "--budget", "1") == 0
    assert not (tmp_path / "tuned.json").exists()
    assert "nothing was measured" in (printed := capsys.readouterr().out)
    assert "LEFT OUT: linear [16, 32] over 64, 16bit\n" in printed


def test_a_state_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    where = dict.fromkeys(tune_rows.SAME, "a") | {"time_utc": ""}
    state = State(tmp_path / "state.json", where, resume=True)  # there is none yet
    state.add([tune_search._verdict_row("linear", "16bit", OWN, OK)])
    assert State(state.path, where, resume=True).verdicts("linear", "16bit") == {OWN: OK}
    assert State(state.path, where, resume=False).rows == []
    assert State(state.path, where | {"torch": None}, resume=True).rows
    for name in tune_rows.SAME:
        with pytest.raises(ValueError, match=f"measured with {name} a, this is b: start a new file"):
            State(state.path, where | {name: "b"}, resume=True)
    state.path.write_text("[{}]")
    with pytest.raises(ValueError, match=r"no state of tune.py \(KeyError\)"):
        State(state.path, where, resume=True)


# The command line


def test_dry_run_and_list_count_the_same(search, capsys) -> None:
    assert search("--dry-run", "--arch", "sm_80", "--regime", "analysed", "--kernel", "linear,wgrad") == 0
    lines = capsys.readouterr().out.splitlines()
    cases = all_cases(["analysed"], ["linear", "wgrad"], "16bit")
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


@pytest.mark.slow
def test_filter_only_prints_verdicts_without_a_gpu(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    flags = ("--filter-only", "--arch", "sm_90", *TINY, "--json", state)
    result = run(ROOT / "bench" / "tune.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 candidates may be launched" in result.stdout
    rows = json.loads(state.read_text())
    assert [(row["verdict"], row["device"], row["torch"]) for row in rows] == [(OK, None, None)] * 2


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
