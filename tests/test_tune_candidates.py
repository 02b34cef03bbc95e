"""What bench/tune.py tries: few candidates, the tables' choice first, less those that the compiler speaks against."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import compile_inspect
import compile_pool
import pytest
from commands import ROOT, run
from test_compile_gate import run_compiling, versions

sys.path.insert(0, str(ROOT / "bench"))

import shards
import tune_filter
from budget import Budget
from tune_candidates import _OF_FEW_TOKENS, MOST, SHARED_BYTES, candidates, tables_choice
from tune_cases import KERNELS_OF, Case, all_cases, given_shard, shards_of
from tune_filter import OK, Filter, FilterFailed, OutOfTime

from tpffn_triton.kernels._configs import KERNELS, Config

pytestmark = pytest.mark.cpu_only
OWN = Config(64, 64, 64, 4, 4, USE_TMA=True)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_candidates_are_few_and_begin_with_the_tables_choice(arch: str) -> None:
    kernels = set()
    for case in all_cases(shards_of(KERNELS_OF), KERNELS, "16bit"):
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


def test_every_choice_for_few_tokens_is_tried() -> None:
    steps, prefetched, slices, widths = _OF_FEW_TOKENS
    for case in all_cases(shards_of(["decode"]), ["few_tokens"], "16bit"):
        found = candidates(case, "sm_90")
        assert {c.PREFETCH_K for c in found} >= {*prefetched}
        assert {(c.BLOCK_K, c.num_stages) for c in found} >= {*steps}
        assert {c.SPLIT_K for c in found} >= {*slices}
        assert {c.BLOCK_N for c in found} >= {*widths}
        assert {(c.SPLIT_K, c.BLOCK_N) for c in found} >= {(4, 128), (1, 32)}


@pytest.mark.parametrize("arithmetic", ["tf32", "ieee"])
def test_fp32_is_loaded_through_pointers(arithmetic: str) -> None:
    for case in all_cases(shards_of(["analysed", "decode"]), KERNELS, arithmetic):
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


def test_every_regime_of_a_gpu_is_tuned_at_its_shards() -> None:
    assert {*shards_of(KERNELS_OF)} == {*shards.GRIDS["cuda"]}
    sizes = {(case.rows, case.cols, case.inner) for case in all_cases(shards_of(["wide"]), ["linear_act"], "16bit")}
    assert sizes == {(m, *f_h) for m in (4096, 8192, 16384) for f_h in ((4096, 4096), (3584, 8192))}
    assert not all_cases(shards_of(["decode"]), ["dgrad"], "16bit")


def test_cases_are_what_configurations_are_asked_for() -> None:
    """Sizes as in the launchers, plain and gated: M=4, H=32, F/P=48. With more tokens, or in fp32, forward is another
    launch."""
    found = {}
    for case in all_cases([given_shard(4, 32, 48)], KERNELS, "16bit"):
        found.setdefault(case.kernel, []).append(tuple(case[2:]))
    for tokens, arithmetic in ((65, "16bit"), (4, "ieee")):
        kernels = {case.kernel for case in all_cases([given_shard(tokens, 32, 48)], KERNELS, arithmetic)}
        assert kernels == set(KERNELS) - {"few_tokens", "gated_few_tokens"}
    forward = [(4, 48, 32)]
    names = ("few_tokens", "linear_act", "linear_dact")
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
    with Filter("sm_90", "16bit", 2, Budget(120)) as compiler:
        found = compiler.start("linear_dact", [spilling, good]).result()
    assert found[spilling].startswith("spills: ")
    assert found[good] == OK


def test_the_filter_ends_with_its_time_or_says_why(monkeypatch, tmp_path: Path) -> None:
    sleeping, broken = tmp_path / "sleeping.py", tmp_path / "broken.py"
    sleeping.write_text("import time\ntime.sleep(60)\n")
    broken.write_text("raise SystemExit('no compiler here')\n")
    begin = time.monotonic()
    with Filter("sm_90", "16bit", 1, Budget(1)) as compiler:
        monkeypatch.setattr(tune_filter, "GATE", sleeping)
        with pytest.raises(OutOfTime, match="took longer"):
            compiler.start("linear", [OWN]).result()
        with pytest.raises(OutOfTime, match="no time was left"):
            compiler.start("linear", [OWN]).result()
    assert time.monotonic() - begin < 30
    with Filter("sm_90", "16bit", 1, Budget(60)) as compiler:
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


@versions
@pytest.mark.slow
def test_a_launch_finds_what_the_filter_compiled(triton_folder, tmp_path: Path) -> None:
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
    result = run_compiling(script, ROOT / "bench", *kernels, triton_folder=triton_folder)
    assert result.stdout.split()[1::2] == ["True"] * len(kernels), result.stdout + result.stderr


def test_the_gate_refuses_what_is_no_list_of_candidates(tmp_path: Path) -> None:
    path = tmp_path / "candidates.json"
    path.write_text('[{"kernel": "linear", "arithmetic": "16bit", "config": {"BLOCK_Q": 1}}]')
    result = run_compiling(ROOT / "tests" / "compile_gate.py", "--arch", "sm_90", "--candidates", path)
    assert result.returncode == 2
    assert "unexpected keyword argument 'BLOCK_Q'" in result.stderr


@pytest.mark.slow
def test_filter_only_prints_verdicts_without_a_gpu(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    flags = (
        "--filter-only",
        "--arch",
        "sm_90",
        "--shape",
        "16,32,64",
        "--kernel",
        "linear",
        "--candidates",
        "2",
        "--json",
        state,
    )
    result = run(ROOT / "bench" / "tune.py", *flags, "--json", state)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 candidates may be launched" in result.stdout
    rows = json.loads(state.read_text())
    assert [(row["verdict"], row["device"], row["torch"]) for row in rows] == [(OK, None, None)] * 2
