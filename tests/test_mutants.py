"""The list of mutants fits the sources, and the command that runs them works; all of them run by `make mutants`."""

import subprocess
import sys

import mutants
import pytest

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow]


def test_every_text_stands_once_and_every_name_too():
    assert not mutants.misplaced(mutants.MUTANTS)
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names) > 60


def test_the_command_catches_a_mutant():
    command = [sys.executable, "tests/mutants.py", "--only", "last partial row of a column sum", "--jobs", "1"]
    result = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "caught 1 / total 1" in result.stdout
