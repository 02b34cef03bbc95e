"""docs/analysis.md: its tables are those of today's plan and of the committed results; its links lead somewhere."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from commands import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))

import analysis_tables
import environment
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
    for tensor in ("y", "dx"):
        assert f"| the pass sends {tensor}'s all-reduce and 0 bytes more |" in claims
    assert "four of these side by side, 8×128×4096: 0 such tensors" in claims
    # The other two: a reduce-scatter of partial sums, an all-gather of the hidden; gloo's reduce-scatter sends twice.
    row_row, column_column = claims.splitlines()[-2:]
    assert "forward: reduce-scatter pre_act 4,194,304, all-reduce y 1,048,576; backward: all-gather d_pre" in row_row
    assert "forward: all-gather hidden 4,194,304, all-gather y 1,048,576; backward: reduce-scatter" in column_column
    forward, backward = re.search(r"\| ([\d.]+) \+ ([\d.]+) MiB by TCP \|$", row_row).groups()
    assert (float(forward), float(backward)) == pytest.approx((120, 60), rel=1e-3)


def test_ratios_are_those_of_the_features_sent(results):
    """By hand, in units of the tensor's bytes sent once: column→row sends 2H + 2H; gated pre_act has 2F features."""
    rows = {
        name: {cells[0]: cells[1:] for cells in map(cells_of, analysis_tables.TABLES[name](results).splitlines()[2:])}
        for name in ("ratios", "ratios_gated", "ratios_forward")
    }
    assert all([*found] == ["4", "1", "1/2", "1/3", "1/4", "1/16"] for found in rows.values())
    assert rows["ratios"]["1/2"] == ["2", "2", "2", "2"]
    assert rows["ratios_gated"]["1/2"] == ["2", "2.5", "2", "2.5"]
    assert rows["ratios_gated"]["1/3"] == ["2", "2.17", "1.83", "2"]
    assert rows["ratios_gated"]["1/4"] == ["2", "2", "1.75", "1.75"]
    assert rows["ratios_forward"]["1"] == ["1", "1.5", "1", "1.5"]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_times_say_of_which_ranks_they_are(results):
    table = analysis_tables.TABLES["times"](results)
    row = results.timed(strategy="row_row", shape="analysed", tp=4, pass_="backward")
    assert f"| {row['compute_ms']:.1f} | {row['exposed_ms']:.1f} ({row['exposed_ms_least']:.1f}) |" in table


def test_results_are_of_the_analysed_model(results):
    for row in results.traffic:
        assert (row["batch"], row["seq"], row["hidden"], row["ffn"]) == (8, 128, 1024, 4096)
    assert {row["tp"] for row in results.traffic} == {2, 4}
    assert {row["tp"] for row in results.strategy} == {1, 2, 4}
    changed = any(row["uncommitted_changes"] for row in (*results.traffic, *results.strategy))
    assert not changed, "measured with uncommitted changes: commit them, then make analysis"


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


def test_a_missing_row_is_named(results):
    without = [row for row in results.strategy if (row["strategy"], row["pass"]) != ("row_row", "backward")]
    with pytest.raises(ValueError, match=r"strategy results have 0 rows with strategy=row_row, .*, pass=backward, one"):
        analysis_tables.TABLES["times"](replace(results, strategy=without))
    without = [row for row in results.traffic if row["kind"] != "collective"]
    with pytest.raises(ValueError, match="traffic results have 0 rows with case=all_reduce, tp=4, elements=1048576"):
        analysis_tables.TABLES["claims"](replace(results, traffic=without))
    with pytest.raises(ValueError, match="have 2 rows"):
        analysis_tables.TABLES["claims"](replace(results, traffic=results.traffic * 2))


@pytest.fixture
def measuring(monkeypatch, tmp_path) -> list[tuple[str, ...]]:
    """As in a checkout of its own; return the commands that would run."""
    commands: list[tuple[str, ...]] = []

    def ran(*command: str) -> None:
        commands.append(command)
        raise OSError("measured")

    monkeypatch.setattr(write_analysis, "_run", ran)
    monkeypatch.setattr(write_analysis, "ROOT", tmp_path)
    monkeypatch.setattr(environment.checkout, "ROOT", tmp_path)
    return commands


def measure(folder) -> int:
    return write_analysis.main(["--measure", f"--results={folder / 'bench' / 'results' / 'new'}"])


def git(folder, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def test_a_tree_with_changes_is_not_measured(measuring, tmp_path, capsys):
    git(tmp_path, "init")
    (tmp_path / "changed.py").touch()
    with pytest.raises(SystemExit) as caught:
        measure(tmp_path)
    assert (caught.value.code, measuring) == (2, [])
    err = capsys.readouterr().err
    assert err.endswith("needs a tree without uncommitted changes, has 1: ?? changed.py\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("in_git", [True, False])
def test_a_clean_tree_is_measured_and_one_that_git_does_not_know(in_git, measuring, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if in_git:
        git(tmp_path, "init")
    assert measure(tmp_path) == 1
    assert [command[0] for command in measuring] == ["bench/traffic_bench.py"]


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
