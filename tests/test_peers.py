"""bench/peers.py: rows, refusals and what is left out; test_peers_resumed.py has what is kept of a run before."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, run
from peer_runs import SIZES, peers_here, raising, replaced

sys.path.insert(0, str(ROOT / "bench"))

import compiler
import memory
import peer_implementations
import peer_table
import peers
import peers_measure
import ranks
import steps
import timing
import workloads
from budget import Budget
from peer import Place
from peer_implementations import PEERS
from peer_results import Results
from peer_settings import Settings
from shards import GRIDS, SHARDS, TUNED_AT, shard

pytestmark = pytest.mark.cpu_only
OWN = ["--peers", "eager,two-gemms,fused,fused-recompute"]
FIELDS = {
    *("impl", "label", "mode", "shape", "regime", "tokens", "hidden", "ffn_per_rank", "activation", "dtype"),
    *("run", "l2", "iters", "ms_p20", "ms_p50", "ms_p80", "ratio_p20", "ratio_p50", "ratio_p80", "tflops", "flops"),
    *("moved_bytes", "roofline_pct", "gb_per_s", "errors", "max_rel_err", "error_vs_eager", "saved_bytes"),
    *("peak_mem_bytes", "device", "device_type", "torch", "triton", "commit", "uncommitted_changes", "command"),
    *("versions", "kernels", "tuned", "quick"),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Run the command line; see peers_here."""
    with peers_here(monkeypatch) as main:
        yield main


def test_rows_and_table(bench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, sheet = tmp_path / "rows.json", tmp_path / "rows.csv"
    assert bench("--tokens", "6,8", *OWN, "--json", str(out), "--csv", str(sheet)) == 0
    rows = json.loads(out.read_text())
    expected = [("fwd", name) for name in ("eager", "two-gemms", "fused")]
    expected += [("fwd_bwd", name) for name in ("eager", "fused", "fused-recompute")]
    found = [(row["tokens"], row["mode"], row["impl"]) for row in rows]
    assert found == [(m, *way) for m in (6, 8) for way in expected]
    for row in rows:
        assert set(row) >= FIELDS
        both = row["mode"] == "fwd_bwd"
        m, passes = row["tokens"], 3 if both else 1
        assert (row["shape"], row["regime"], row["run"], row["l2"]) == (f"{m}x32x48", "other", "eager", "as left")
        assert (row["iters"], row["activation"], row["dtype"]) == (3, "gelu", "fp32")
        assert (row["hidden"], row["ffn_per_rank"], row["commit"]) == (32, 48, "abc")
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["flops"] == 4 * m * 32 * 48 * passes
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms_p50"] / 1e9)
        weights = 2 * 32 * 48 + 32 + 48
        moved = 4 * (2 * m * 32 + weights)
        moved += 4 * (3 * m * 32 + 2 * 32 * 48 + weights) if both else 0
        assert row["moved_bytes"] == moved
        assert row["gb_per_s"] == pytest.approx(moved / row["ms_p50"] / 1e6)
        assert list(row["errors"]) == ["y", *(["dx", "dw1", "db1", "dw2", "db2"] if both else [])]
        assert 0 < row["max_rel_err"] == max(row["errors"].values()) < 1e-5
        assert (row["ratio_p50"] == row["ratio_p20"] == 1) or row["impl"] != "fused"
        assert (row["error_vs_eager"] is None) == (row["impl"] == "two-gemms")
        assert (row["saved_bytes"] is None) == (not both)
        assert row["label"] == PEERS[row["impl"]].label
        assert set(row["versions"]) == {
            *("liger-kernel", "megatron-core", "nvmath-python", "quack-kernels", "transformer_engine")
        }
    eager = rows[3]
    assert (eager["impl"], eager["error_vs_eager"]) == ("eager", 1)
    printed = capsys.readouterr().out
    assert printed.count("WITHOUT COMMUNICATION") == 2
    assert "8x32x48: M=8 H=32 F/P=48, gelu, fp32" in printed
    assert "THESE TIMES MEAN NOTHING" in printed
    assert max(len(line) for line in printed.splitlines()) < 160
    table = list(csv.DictReader(sheet.open()))
    assert [json.loads(line["errors"]) for line in table] == [row["errors"] for row in rows]


def test_ratios_are_by_round(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ms = {"eager": [1.0, 8.0, 9.0], "fused": [2.0, 4.0, 1.0]}

    def time_rounds(steps, rank, **how):
        return {name: timing.Times(ms[name], [], []) for name in steps}, 3

    monkeypatch.setattr(timing, "time_rounds", time_rounds)
    out = tmp_path / "rows.json"
    assert bench("--tokens", "6", "--mode", "fwd", "--peers", "eager,fused", "--json", str(out)) == 0
    eager, fused = json.loads(out.read_text())
    # 0.5, 2, 9: their median is 2, where the medians' ratio is 4.
    assert [eager[f"ratio_p{p}"] for p in (20, 50, 80)] == pytest.approx([1.1, 2, 6.2])
    assert [fused[f"ratio_p{p}"] for p in (20, 50, 80)] == [1, 1, 1]
    assert bench("--tokens", "6", "--mode", "fwd", "--peers", "eager", "--json", str(out)) == 0
    (eager,) = json.loads(out.read_text())
    assert [eager[f"ratio_p{p}"] for p in (20, 50, 80)] == [None] * 3


def half_of(build: Any) -> Any:
    """The peer with y halved."""

    def built(activation: str) -> Any:
        forward = build(activation)
        return lambda *given: forward(*given) / 2

    return built


@pytest.mark.parametrize(("name", "status"), [("eager", 0), ("fused", 1)])
@pytest.mark.parametrize(
    ("breaks", "why"),
    [
        (half_of, r"fp32, fwd, eager) is wrong: y is off by 0.5 against fp64, allowed 1e-05"),
        (lambda build: raising, "fwd) failed: ArithmeticError: not here"),
        (lambda build: lambda activation: raising, "fp32, fwd, eager) failed: ArithmeticError: not here"),
    ],
    ids=["wrong", "raises when built", "raises when run"],
)
def test_what_is_wrong_or_raises_is_named_and_the_others_go_on(
    name: str, status: int, breaks, why: str, bench, monkeypatch, tmp_path: Path, capsys
) -> None:
    replaced(monkeypatch, name, breaks(PEERS[name].build))
    out = tmp_path / "rows.json"
    flags = ("--tokens", "6", "--mode", "fwd", "--peers", "eager,two-gemms,fused", "--json", str(out))
    assert bench(*flags) == status
    others = [other for other in ("eager", "two-gemms", "fused") if other != name]
    assert [row["impl"] for row in json.loads(out.read_text())] == others
    printed = capsys.readouterr().out
    assert f"NOT TIMED: {name} (6x32x48, " in printed
    assert why in printed


@pytest.mark.parametrize(("name", "status"), [("eager", 0), ("fused", 1)])
def test_a_peer_that_fails_while_it_is_weighed_is_named_and_the_others_go_on(
    name: str, status: int, bench, monkeypatch, tmp_path: Path, capsys
) -> None:
    forwards: list[Any] = []
    build, peak_bytes = PEERS[name].build, memory.peak_bytes

    def noted(activation: str) -> Any:
        forwards.append(build(activation))
        return forwards[-1]

    def no_memory(step, rank):
        if step.forward in forwards:
            raise MemoryError("too large")
        return peak_bytes(step, rank)

    replaced(monkeypatch, name, noted)
    monkeypatch.setattr(memory, "peak_bytes", no_memory)
    out = tmp_path / "rows.json"
    assert bench("--tokens", "6", "--mode", "fwd_bwd", "--peers", "eager,fused", "--json", str(out)) == status
    assert [row["impl"] for row in json.loads(out.read_text())] == [{"eager": "fused", "fused": "eager"}[name]]
    why = f"{name} (6x32x48, gelu, fp32, fwd_bwd, eager) failed: MemoryError: too large"
    assert f"NOT TIMED: {why}\n" in capsys.readouterr().out + "\n"


def test_bare_gemms_are_compared_with_their_own_product(bench, monkeypatch, capsys) -> None:
    for activation in ("gelu", "swiglu"):
        assert bench("--tokens", "6", "--peers", "two-gemms", "--activation", activation) == 0
    assert "NOT TIMED" not in capsys.readouterr().out
    replaced(monkeypatch, "two-gemms", PEERS["eager"].build)
    assert bench("--tokens", "6", "--peers", "two-gemms") == 0
    assert "NOT TIMED: two-gemms" in capsys.readouterr().out


def test_a_shape_that_fails_leaves_the_others(bench, monkeypatch, tmp_path: Path, capsys) -> None:
    expected = workloads.expected

    def no_memory_for_6(problem, *given):
        if problem.x.shape[1] == 6:
            raise MemoryError("too large")
        return expected(problem, *given)

    monkeypatch.setattr(workloads, "expected", no_memory_for_6)
    out = tmp_path / "rows.json"
    assert bench("--tokens", "6,8", "--mode", "fwd", *OWN[:1], "eager", "--json", str(out)) == 1
    assert [row["tokens"] for row in json.loads(out.read_text())] == [8]
    assert "NOT TIMED: 6x32x48 failed: MemoryError: too large" in capsys.readouterr().out


def test_the_budget_is_divided_and_says_what_it_leaves_out(bench, monkeypatch, tmp_path: Path, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr("budget.time.monotonic", lambda: now[0])
    budget = Budget(30)
    assert [budget.share(3).left(), Budget(None).share(3).left()] == [10, None]
    now[0] = 25
    assert budget.share(2).left() == 2.5
    now[0] = 40
    assert (budget.left(), budget.is_spent(), Budget(None).is_spent()) == (0, True, False)

    given: list[Any] = []
    time_rounds = timing.time_rounds

    def in_time(*arguments, seconds, **how):
        given.append(seconds)
        now[0] += 8
        return time_rounds(*arguments, seconds=seconds, **how)

    monkeypatch.setattr(timing, "time_rounds", in_time)
    out = tmp_path / "rows.json"
    flags = ("--tokens", "4,6,8", "--peers", "eager", "--json", str(out))
    assert bench(*flags, "--budget", "24") == 0
    # 8 s of 24 over two modes, of which the first takes all; 4 of the 8 left; nothing for the third shape.
    assert given == [4, 0, 2, 0]
    assert [row["tokens"] for row in json.loads(out.read_text())] == [4, 4, 6, 6]
    printed = capsys.readouterr().out
    for mode in ("fwd", "fwd_bwd"):
        assert f"LEFT OUT, the budget is spent: 8x32x48, gelu, fp32, {mode}, eager\n" in printed + "\n"


def test_saved_bytes_are_what_the_formula_says() -> None:
    shape = workloads.Shape("", 1, 8, 32, 48, 1)
    problem = workloads.shard(workloads.draw(shape, "fp32", "gelu", torch.device("cpu")), 0, 1, "gelu")
    found = {
        name: memory.saved_bytes(PEERS[name].build("gelu"), problem) for name in ("eager", "fused", "fused-recompute")
    }
    hidden = 8 * 48 * 4
    assert found == {"eager": 2 * hidden, "fused": hidden, "fused-recompute": 0}


def test_compiled_eager_is_a_peer(bench, tmp_path: Path) -> None:
    if reason := compiler.missing():
        pytest.skip(reason)
    out = tmp_path / "rows.json"
    assert bench("--tokens", "8", "--mode", "fwd", "--peers", "eager,compile", "--json", str(out)) == 0
    assert [row["impl"] for row in json.loads(out.read_text())] == ["eager", "compile"]


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_addmm_epilogue_is_forward_alone(activation: str, bench, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ("--tokens", "8", "--peers", "addmm-epilogue", "--activation", activation, "--json", str(out))
    assert bench(*flags) == 0
    assert [row["mode"] for row in json.loads(out.read_text())] == ["fwd"]


def test_the_list_of_peers_measures_nothing(bench, monkeypatch, capsys) -> None:
    monkeypatch.delattr(peers, "measure")
    assert bench("--list-peers", "--activation", "silu") == 0
    assert capsys.readouterr().out == peer_implementations.listing(Place("cpu", "fp32", "silu")) + "\n"


def test_runs_and_states_of_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; the clock and the graphs themselves are rehearsed in test_bench_parts.py."""
    made: list[object] = []
    timed: list[tuple[bool, bool]] = []

    def make_step(forward, problem, group, mode, graph):
        made.append(graph)
        return steps.Step(forward, problem, group, mode)

    def time_rounds(named, rank, *, graph, warm_l2, **how):
        timed.append((graph, warm_l2))
        return {name: timing.Times([1.0], [], []) for name in named}, 1

    monkeypatch.setattr(peers_measure, "make_step", make_step)
    monkeypatch.setattr(memory, "peak_bytes", lambda step, rank: made.append("weighed"))
    monkeypatch.setattr(timing, "time_rounds", time_rounds)
    place, rank = Place("cpu", "fp32", "relu"), ranks.Rank(0, 1, torch.device("cpu"), 1, None)
    chosen = (shard("other", "tiny", 6, 32, 48),)
    how = (("fwd",), ("eager", "graph"), ("cold", "warm"), None, True, None, "")
    results = Results(None, None)
    assert not peers_measure.measure(rank, Settings(chosen, ("fused",), place, *how), results).refused
    assert made == ["weighed", False, "weighed", True]  # never after what was captured
    assert timed == [(False, False), (False, True), (True, False), (True, True)]
    found = [(row["run"], row["l2"]) for row in results.rows()]
    assert found == [(name, l2) for name in ("eager", "graph") for l2 in ("cold", "warm")]
    cuda = [row | {"device_type": "cuda", "backend": "triton", "cuda": "13.0"} for row in results.rows()]
    printed = peer_table.table(cuda, peers_measure.Untimed())
    for how_run, l2 in found:
        assert f"WITHOUT COMMUNICATION, {how_run}, L2 {l2}\n" in printed


def test_shapes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(peers, "interpreting", lambda: False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parsed = peers.build_parser().parse_args
    settings = peers.settings_of(parsed([]), "cuda", "")
    assert (settings.shards, settings.place) == (GRIDS["cuda"], Place("cuda", "bf16", "gelu", (9, 0)))
    assert (settings.runs, settings.l2s) == (("eager", "graph"), ("cold",))
    wide = peers.settings_of(parsed(["--regime", "wide", "--run", "graph", "--l2", "cold,warm"]), "cuda", "")
    assert len(wide.shards) == 6
    assert {shard.regime for shard in wide.shards} == {"wide"}
    assert (wide.runs, wide.l2s) == (("graph",), ("cold", "warm"))
    tuned = PEERS["compile-max-autotune"]
    assert [name for name in SHARDS if tuned.is_timed(name, "fwd")] == list(TUNED_AT) == ["analysed", "wide-4096x4096"]
    with pytest.raises(ValueError, match="compile-max-autotune is not timed at these shapes in fwd or fwd_bwd"):
        peers.settings_of(parsed(["--shapes", "training", "--peers", "compile-max-autotune"]), "cuda", "")
    monkeypatch.setattr(peers, "interpreting", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set: unset it"):
        peers.settings_of(parsed([]), "cuda", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "64,0"], "every M at least 1, got '64,0'"),
        (["--tokens", "8", "--hidden", "0"], "hidden_size must be"),
        (["--hidden", "8"], "--hidden needs --tokens"),
        (["--shapes", "huge"], "unknown shape 'huge'"),
        (["--regime", "wide"], "unknown regime here 'wide': one of analysed, decode"),
        (["--shapes", "analysed", "--tokens", "8"], "--shapes and --tokens both say which shapes"),
        (["--peers", "apex"], "unknown peer 'apex': one of eager,"),
        (["--peers", "liger"], "peer liger runs on cuda alone, not on cpu"),
        (["--peers", "two-gemms", "--mode", "fwd_bwd"], "peer two-gemms is not timed at these shapes in fwd_bwd"),
        (["--iters", "0"], "--iters must be at least 1, got 0"),
        (["--budget", "0"], "--budget must be above 0 seconds, got 0.0"),
        (["--budget", "nan"], "--budget must be above 0 seconds, got nan"),
        (["--run", "graph"], "--run graph needs a CUDA device"),
        (["--run", "twice"], "unknown run 'twice'"),
        (["--l2", "cold"], "--l2 needs a CUDA device"),
        (["--dtype", "tf32"], "--dtype tf32 needs a CUDA device"),
        (["--resume"], "--resume needs --json"),
        (["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
        (["--resume", "--json", str(ROOT / "pyproject.toml")], "has no rows of this benchmark"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message: str, bench, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_from_elsewhere_with_native_kernels(tmp_path: Path) -> None:
    flags = ("--tokens", "8", *SIZES, "--mode", "fwd", "--peers", "eager,fused")
    result = run(ROOT / "bench" / "peers.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "our kernels: native" in result.stdout
    assert "TIMES MEAN NOTHING" not in result.stdout
