"""docs/analysis.md: its tables are those of today's plan and of the committed results; its links lead somewhere."""

import json
import re
import shutil
import sys

import pytest
from commands import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))

import analysis_tables
import write_analysis

pytestmark = pytest.mark.cpu_only
SCRIPT = ROOT / "bench" / "write_analysis.py"
TEXT = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")


@pytest.fixture
def results() -> analysis_tables.Results:
    folder = write_analysis.linked(TEXT)
    return analysis_tables.load(folder / "traffic.json", folder / "strategy.json")


def test_tables_are_up_to_date():
    assert write_analysis.written(TEXT, write_analysis.linked(TEXT)) == TEXT, "make analysis, or write_analysis.py"
    assert {*re.findall(r"<!-- table: (\w+) -->", TEXT)} == {*analysis_tables.TABLES}


@pytest.mark.parametrize(
    "stale",
    [
        TEXT.replace("1,572,864", "1,572,865"),
        write_analysis.BLOCK.sub(lambda found: f"{found[1]}{found[3]}", TEXT),
        TEXT.replace("| 24.0 |", "| 25.0 |"),
    ],
    ids=["a number", "no tables", "a cell"],
)
def test_a_stale_table_is_seen(stale):
    assert stale != TEXT
    assert write_analysis.written(stale, write_analysis.linked(TEXT)) == TEXT


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 4
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


def test_the_tables_say_what_the_study_asks_for(results):
    claims = analysis_tables.TABLES["claims"](results)
    for number in ("6 rounds, 1,572,864 a rank, 6,291,456 in all", "w1 1024×1024", "24.00 MiB by TCP"):
        assert number in claims
    # Linear1 forward and Linear2 backward: not a byte beside the all-reduce of y or dx.
    assert claims.count("| 0 bytes beside that all-reduce |") == 2
    assert "| 1/2 | 2 | 2 | 2 | 2 |" in analysis_tables.TABLES["ratios"](results)


def test_results_are_of_the_analysed_model(results):
    for row in results.traffic:
        assert (row["batch"], row["seq"], row["hidden"], row["ffn"]) == (8, 128, 1024, 4096)
    assert {row["tp"] for row in results.traffic} == {2, 4}
    assert {row["tp"] for row in results.strategy} == {1, 2, 4}
    assert not any(row["uncommitted_changes"] for row in (*results.traffic, *results.strategy))


def test_tables_and_links_follow_the_results(tmp_path, monkeypatch):
    measured = write_analysis.linked(TEXT)
    elsewhere = tmp_path / "bench" / "results" / "elsewhere"
    shutil.copytree(measured, elsewhere, ignore=shutil.ignore_patterns("*.png"))
    strategy = json.loads((elsewhere / "strategy.json").read_text())
    for row in strategy["rows"]:
        row["ms_p50"] = 1234.5
    (elsewhere / "strategy.json").write_text(json.dumps(strategy))
    monkeypatch.setattr(write_analysis, "ROOT", tmp_path)
    anew = write_analysis.written(TEXT, elsewhere)
    assert "1234.5 [" in anew
    assert measured.name not in anew
    assert "](../bench/results/elsewhere/strategy_time.png)" in anew


def test_an_unknown_table_is_refused():
    text = TEXT.replace("<!-- table: shapes -->", "<!-- table: shape -->")
    with pytest.raises(ValueError, match="no table 'shape': one of shapes"):
        write_analysis.written(text, write_analysis.linked(TEXT))


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (("--check",), 0, "up to date"),
        (("--measure",), 2, "--measure needs --results"),
        (("--results", ROOT / "docs"), 2, "must lie below bench/results"),
        (("--check", "--results", ROOT / "bench" / "results" / "nowhere"), 1, "nowhere"),
    ],
)
def test_the_command(arguments, status, shown):
    done = run(SCRIPT, *arguments)
    assert done.returncode == status
    assert shown in done.stderr
