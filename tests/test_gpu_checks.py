"""What `make gpu` would run: a plan that fits its budget, steps that the docstring lists, tests that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "bench"))

import ffn_bench
import forms_bench
import gpu_checks
import peers

pytestmark = pytest.mark.cpu_only
PLAN = gpu_checks.plan(Path("results"), gpu_checks.BUDGET)


def test_the_shares_leave_ten_seconds() -> None:
    assert sum(step.seconds for step in PLAN) == gpu_checks.BUDGET - 10
    halved = gpu_checks.plan(Path("results"), gpu_checks.BUDGET / 2)
    assert [2 * step.seconds for step in halved] == [step.seconds for step in PLAN]


def test_the_docstring_lists_the_steps_and_their_files() -> None:
    described, results = gpu_checks.__doc__.split("Results: ")
    assert re.findall(r"^    (\w+)  ", described, re.MULTILINE) == ["environment", *(step.name for step in PLAN)]
    for name in (name for step in PLAN for name in step.produces):
        stem, suffix = name.split(".")
        assert re.search(rf"\b{stem}\.(\w+ and )?\.?{suffix}\b", results), name


def test_every_file_of_the_sanitizer_has_tests() -> None:
    (step,) = (step for step in PLAN if step.name == "sanitizer")
    command = step.command[step.command.index(sys.executable) :]
    files = [word for word in command if word.startswith("tests/")]
    listed = subprocess.run([*command, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = re.findall(r"^(tests/\w+\.py)::", listed.stdout, re.MULTILINE)
    assert set(names) == set(files)
    assert {"tests/test_single_launch.py", "tests/test_weight_grads.py"} < set(files)


def test_every_benchmark_takes_its_flags() -> None:
    parsers = {f"bench/{module.__name__}.py": module.build_parser() for module in (ffn_bench, forms_bench, peers)}
    benchmarks = [step for step in PLAN if step.name.startswith("bench_")]
    assert {step.command[1] for step in benchmarks} == set(parsers)
    for _, script, *flags in (step.command for step in benchmarks):
        assert parsers[script].parse_args(flags).dtype == "bf16"
