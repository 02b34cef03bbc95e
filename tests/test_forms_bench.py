"""bench/forms_bench.py in the interpreter: every way launches what it is named after, is checked and timed."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from commands import ROOT, run
from launches import count_launches

sys.path.insert(0, str(ROOT / "bench"))

import forms_bench
import forms_measure
import implementations
import steps
import workloads
from forms_measure import EACH, ONE, UNFUSED, LaunchedBy, Way, ways

import tpffn_triton as tp
from tpffn_triton.backends import implementation
from tpffn_triton.kernels.forward import DEPENDENT, FEW, FORMS, SINGLE, TWO

pytestmark = pytest.mark.cpu_only
BENCH = ROOT / "bench" / "forms_bench.py"
SIZES = ["--hidden", "32", "--ffn", "48", "--iters", "1", "--quick"]
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process, where kernels are interpreted; its threads are put back."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    yield lambda *arguments: forms_bench.main([*SIZES, *arguments])
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("activation", "sizes"), [("gelu", (8, 5)), ("swiglu", (5,))])
def test_every_way_is_timed(activation: str, sizes, bench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "new" / "forms.png"
    tokens_flag = ",".join(map(str, sizes))
    assert bench("--tokens", tokens_flag, "--activation", activation, "--json", str(out), "--plot", str(plot)) == 0
    rows = json.loads(out.read_text())
    compared = [(mode, way.form, way.gradients) for mode in ("fwd", "fwd_bwd") for way in ways(mode, "sm_90", FEW)]
    assert [(row["tokens"], row["mode"], row["form"], row["gradients"]) for row in rows] == [
        (tokens, *way) for tokens in sorted(sizes) for way in compared
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 < row["max_rel_err"] < 1e-2
        flops = (2 if activation == "gelu" else 3) * 2 * row["tokens"] * 32 * 48 * (1 if row["mode"] == "fwd" else 3)
        assert row["tflops"] == pytest.approx(flops / row["ms_p50"] / 1e9)
        assert (row["dtype"], row["backend"], row["triton_interpret"]) == ("bf16", "triton-interpreted", True)
        assert (row["iters"], row["graph"], row["warm_l2"]) == (1, False, False)
        assert row["command"].startswith("bench/forms_bench.py --hidden 32 ")
        first = next(r for r in rows if (r["tokens"], r["mode"], r["form"]) == (row["tokens"], row["mode"], UNFUSED))
        assert row["ratio_p50"] == pytest.approx(first["ms_p50"] / row["ms_p50"])
        assert (row["chosen"], row["configs"]) == (None, {}) or row["form"] != UNFUSED
    # What the tables choose is marked, once, with the tiles that tp.explain names.
    for tokens in sizes:
        explained = tp.explain((tokens, 32), 48, activation=activation, arch="sm_90")
        for mode in ("fwd", "fwd_bwd"):
            (row,) = (r for r in rows if r["chosen"] and (r["tokens"], r["mode"]) == (tokens, mode))
            passes = ("forward",) if mode == "fwd" else ("forward", "backward")
            launches = [launch for launch in explained.launches if launch.pass_ in passes]
            assert row["configs"] == {launch.kernel: asdict(launch.config) for launch in launches}
            assert row["why_chosen"] == "; ".join(explained.reasons[name].split("; ", 1)[1] for name in passes)
    assert printed.count("←") == 2 * len(sizes) + 1  # one in the notes
    assert "WITHOUT COMMUNICATION\n" in printed
    assert "THESE TIMES MEAN NOTHING" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_each_way_launches_what_it_says() -> None:
    shape = workloads.Shape("", 1, 24, 32, 48, 1)
    problem = workloads.shard(workloads.draw(shape, "bf16", "gelu", CPU), 0, 1, "gelu")
    shard = forms_measure.shard_of(shape, "bf16", "gelu", CPU)
    forward = implementations.IMPLEMENTATIONS["fused"].build("gelu", False)
    backward = {"linear_dact_kernel": 1, "matmul_kernel": 1}
    for way in ways("fwd_bwd", "sm_90", FEW)[1:]:
        exchanged = forms_measure.launchers(way, forms_measure.configs(shard, way))
        step = LaunchedBy("cpu", exchanged, lambda: steps.make_step(forward, problem, None, "fwd_bwd", False))
        with count_launches() as launches:
            step()
        expected = dict(backward) | (
            {"weight_grads_kernel": 1} if way.gradients == ONE else {"wgrad_kernel": 2, "column_sum_kernel": 2}
        )
        if way.form in (FEW, SINGLE):
            expected["ffn_kernel" if way.form == SINGLE else "few_tokens_kernel"] = 1
        else:
            expected |= {"linear_act_kernel": 1, "matmul_kernel": 2}
        assert launches == expected, way
        step.reset()


def test_ways() -> None:
    assert ways("fwd", "sm_90", FEW) == [Way(UNFUSED), *map(Way, FORMS)]
    assert ways("fwd", "sm_90", SINGLE) == [Way(UNFUSED), *map(Way, FORMS[1:])]
    assert Way(DEPENDENT) not in ways("fwd", "sm_80")
    assert ways("fwd_bwd", "sm_80")[1:] == [Way(form, how) for form in (SINGLE, TWO) for how in (ONE, EACH)]


def test_a_form_that_the_tables_do_not_choose_has_its_rows() -> None:
    shard = forms_measure.shard_of(workloads.Shape("", 1, 8192, 8192, 8192, 1), "bf16", "gelu", CPU)
    assert (shard.choice.form, shard.gradients.config) == (DEPENDENT, None)
    names = ["linear_act", "linear"], ["linear_dact", "dgrad"], ["wgrad dw1", "wgrad dw2"]
    assert [*forms_measure.configs(shard, Way(SINGLE, ONE))] == ["ffn", *names[1], "weight_grads"]
    assert [*forms_measure.configs(shard, Way(DEPENDENT, EACH))] == [name for group in names for name in group]


def test_launchers_are_put_back() -> None:
    kernels = implementation("cpu")
    before = dict(vars(kernels))

    def make():
        assert kernels.ffn_forward is not before["ffn_forward"]
        raise ArithmeticError("no step")

    with pytest.raises(ArithmeticError, match="no step"):
        LaunchedBy("cpu", forms_measure.launchers(Way(TWO), {}), make)
    assert vars(kernels) == before

    class Raising(steps.Step):
        def __init__(self) -> None:
            self.forward = self.problem = self.group = self.mode = None

        def __call__(self) -> None:
            make()

    step = LaunchedBy("cpu", forms_measure.launchers(Way(TWO), {}), Raising)
    with pytest.raises(ArithmeticError, match="no step"):
        step()
    assert vars(kernels) == before


def without_db2(d_pre, x, dy, act, db_partial, db2_src, *dtypes):
    *grads, db2 = forms_measure.weight_grads(d_pre, x, dy, act, db_partial, db2_src, *dtypes)
    return *grads, 0 * db2


def not_here(*_):
    raise ArithmeticError("not here")


@pytest.mark.parametrize(
    ("launcher", "why"),
    [
        (without_db2, r"\(8 tokens, bf16, fwd_bwd\) is wrong: db2 is off by 1 against fp64, allowed 0\.02"),
        (not_here, r"\(8 tokens, bf16, fwd_bwd\) failed: ArithmeticError: not here"),
    ],
)
def test_what_is_wrong_or_fails_is_not_timed(launcher, why: str, bench, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(forms_measure, "_a_launch_each", launcher)
    out = tmp_path / "rows.json"
    assert bench("--tokens", "8", "--mode", "fwd_bwd", "--json", str(out)) == 1
    assert {row["gradients"] for row in json.loads(out.read_text())} == {None, ONE}
    printed = capsys.readouterr().out
    for form in FORMS:
        assert re.search(rf"NOT TIMED: {form}, gradients a launch each {why}", printed)


def test_without_a_gpu_it_says_what_to_do() -> None:
    result = run(BENCH, "--quick")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "needs a CUDA device; TRITON_INTERPRET=1 rehearses it without one" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "64,0"], "every M at least 1, got '64,0'"),
        (["--tokens", "many"], "every M at least 1, got 'many'"),
        (["--hidden", "0"], "hidden_size must be"),
        (["--ffn", "0"], "ffn_hidden_size must be"),
        (["--iters", "0"], "--iters must be at least 1, got 0"),
        (["--graph"], "--graph needs a CUDA device"),
        (["--warm-l2"], "--warm-l2 needs a CUDA device"),
        (["--dtype", "tf32"], "invalid choice: 'tf32'"),
        (["--json", "/dev/null/rows.json"], "cannot write /dev/null/rows.json"),
        (["--plot", "forms.bmp"], "--plot writes .png, .pdf or .svg"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message: str, bench, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_interpreted_kernels_are_not_timed_on_a_gpu(bench, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        bench()
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET=1 is set: unset it" in capsys.readouterr().err


def test_not_under_torchrun(bench, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bench()
    assert "not under torchrun" in capsys.readouterr().err
