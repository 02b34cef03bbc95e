"""The simulator catches every mistake of mutants_of_single_launch.py, made in a copy of kernels/."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import model_mutants
import pytest
import test_ptx_lint
from kernel_cases import TINY
from mutants_of_single_launch import MUTANTS, SIMULATOR, SIMULATOR_OF_FEW
from schedules import Case, FewTokens
from shadow_memory import Fault

from tpffn_triton import interpreter

pytestmark = pytest.mark.cpu_only
interpreter.install()
KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# Seed and residency: programs started in order, and in any; row blocks one at a time, and all together.
SCHEDULES = [(seed, resident) for seed in range(4) for resident in (None, 2, 1, 3)]


@pytest.fixture
def copy_of_kernels(tmp_path, monkeypatch):
    """Return a function: (file, text, replacement) → modules of a copy with that change."""
    package = f"copied_{tmp_path.name}"

    def load(file, text, replacement):
        shutil.copytree(KERNELS, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / package / Path(file).name
        source = path.read_text()
        assert source.count(text) == 1
        path.write_text(source.replace(text, replacement))
        monkeypatch.syspath_prepend(tmp_path)
        names = ("ffn_single_launch", "ffn_few_tokens", "_counters")
        return [importlib.import_module(f"{package}.{name}") for name in names]

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cases():
    return {
        SIMULATOR: Case("gelu", TINY, True),
        SIMULATOR_OF_FEW: FewTokens("gelu", replace(TINY, SPLIT_K=2), False),
    }


def test_the_documentation_lists_every_mistake():
    """Those of the lint and of the model as well, each with what must catch it."""
    rows = [
        (name, "simulator", f"`{file}`")
        for file, mutants in MUTANTS.items()
        for name, *_, tests in mutants
        if tests in (SIMULATOR, SIMULATOR_OF_FEW)
    ]
    linted = test_ptx_lint.MUTANTS | test_ptx_lint.MUTANTS_OF_TMA
    rows += [
        (name, f"lint: {rules[0]}", f"`kernels/ffn_{'few_tokens' if name.startswith('slice') else 'single_launch'}.py`")
        for name, rules in linted.items()
        if rules
    ]
    rows += [(mutant.name, f"model: {mutant.verdict}", "the model's protocol") for mutant in model_mutants.MUTANTS]
    page = (KERNELS.parent / "docs" / "single_launch.md").read_text()
    *_, table = page.split("|---|---|---|\n")
    assert table.splitlines() == [f"| {' | '.join(row)} |" for row in rows]


def test_the_copy_without_a_mistake_passes(copy_of_kernels, cases):
    single, few, counters = copy_of_kernels("ffn_single_launch.py", "def publish(", "def publish(")
    for seed, resident in SCHEDULES[:4]:
        cases[SIMULATOR].check(single.ffn_single_launch, counters, seed, resident)
        cases[SIMULATOR_OF_FEW].check(few.ffn_few_tokens, counters, seed, resident)


@pytest.mark.parametrize(
    ("file", "text", "replacement", "simulator"),
    [
        pytest.param(file, text, replacement, tests, id=name)
        for file, mutants in MUTANTS.items()
        for name, text, replacement, tests in mutants
        if tests in (SIMULATOR, SIMULATOR_OF_FEW)
    ],
)
def test_caught(file, text, replacement, simulator, copy_of_kernels, cases):
    """In one of the schedules at the latest; by a fault, or by a wrong result."""
    single, few, counters = copy_of_kernels(file, text, replacement)
    launch = single.ffn_single_launch if simulator == SIMULATOR else few.ffn_few_tokens
    for number, (seed, resident) in enumerate(SCHEDULES, 1):
        counters._of_stream.clear()
        try:
            cases[simulator].check(launch, counters, seed, resident, most_polls=50)
        except (Fault, AssertionError) as error:
            print(f"{type(error).__name__} in schedule {number}: {error}")
            return
    pytest.fail(f"no schedule of {len(SCHEDULES)} shows it")
