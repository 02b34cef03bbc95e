"""mutants.py itself: its list fits the sources, and it tells a noticed mistake from a missed one and from a typo.

The mutants run by their own command, `make mutants`.
"""

import ast
import json
import shlex

import mutants
import pytest
from mutants import Mutant

pytestmark = pytest.mark.cpu_only


def test_every_text_stands_once_in_its_file_and_names_are_unique():
    assert not mutants.misplaced(mutants.MUTANTS)
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_another_program(mutant):
    source = (mutants.ROOT / mutant.file).read_text()
    broken = source.replace(mutant.text, mutant.replacement)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))
    file, *options = shlex.split(mutant.tests)
    assert (mutants.ROOT / "tests" / file).exists()
    assert len(options) in (0, 2), "quote the expression of -k"


@pytest.mark.parametrize(
    ("status", "output", "verdict", "detail"),
    [
        (0, "=== 3 passed, 1 skipped in 2 s ===", "passed", "all tests passed"),
        (0, "=== 4 skipped in 2 s ===", "broken", "4 skipped"),
        (5, "=== 84 deselected in 2 s ===", "broken", "84 deselected"),
        (2, "ERROR tests/test_a.py\n=== 1 error in 2 s ===", "broken", "1 error"),
        (1, "ERROR tests/test_a.py::test_b - fixture\n=== 1 error in 2 s ===", "broken", "1 error"),
        (1, "E   assert 1 == 2\nFAILED tests/test_a.py::test_b[x - y] - assert 1 == 2", "failed", "assert 1 == 2"),
        (1, "E   RankError: rank 0:\nE   NameError: name 'f'\nFAILED tests/t.py::a - RankError", "broken", "NameError"),
        (-11, "tests/t.py::a PASSED\ntests/t.py::b Fatal Python error: Seg", "failed", "tests/t.py::b: SIGSEGV"),
        (-11, "Fatal Python error: Segmentation fault", "broken", "before any test: SIGSEGV"),
        (-9, "tests/t.py::a ", "broken", "SIGKILL"),
    ],
)
def test_verdicts(status, output, verdict, detail):
    found = mutants.judge(status, output)
    assert found[0] == verdict
    assert detail in found[1]


def test_the_committed_report_has_todays_mutants():
    rows = (mutants.ROOT / "docs" / "mutants.md").read_text().splitlines()
    assert [row for row in rows if row.startswith("| ")][1:] == [
        f"| {m.name} | `{m.file}` | caught | `{m.tests}` |" for m in mutants.MUTANTS
    ]


@pytest.mark.slow
def test_the_command(monkeypatch, tmp_path, capsys):
    """One mutant that is noticed, one that is not, one that nothing could import."""
    noticed = next(m for m in mutants.MUTANTS if m.file == "tpffn_triton/partitionings.py")
    missed = Mutant("missed", noticed.file, noticed.text, f"{noticed.text}  # a comment", noticed.tests)
    typo = Mutant("typo", noticed.file, noticed.text, "if sises[name]:", noticed.tests)
    monkeypatch.setattr(mutants, "MUTANTS", [noticed, missed, typo])
    assert mutants.main(["--jobs", "2", "--json", str(tmp_path / "found.json")]) == 1
    assert "caught 1 / total 3" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["verdict"] for row in found] == ["caught", "SURVIVED", "broken"]
    assert mutants.main(["--only", "^tpffn_triton/partitionings.py F ", "--jobs", "2"]) == 0
    monkeypatch.setattr(mutants, "MUTANTS", [typo._replace(text="nowhere")])
    assert mutants.main([]) == 2
    assert "typo: stands 0 times in tpffn_triton/partitionings.py: 'nowhere'" in capsys.readouterr().err
