"""What README shows is true: its example runs as written, its commands exist, its numbers stand in committed files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


# Appended to the example. A thread of gloo that is left over may let go of its last tensor while the interpreter shuts
# down, and then aborts the process: "terminate called without an active exception", in about one run of twenty on a
# loaded machine.
COUNT_GLOO_THREADS = """
from pathlib import Path
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(f"{names.count('pt_gloo_runloop')} threads of gloo left")
"""

# In one process: most of each would be the import of torch.
HELP_OF_EACH = """
import runpy, sys
from pathlib import Path
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, end.code)
    print("\f")
"""


def run(*command) -> str:
    """Run a command in the checkout with compiled kernels; return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_example_runs_as_written(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (launcher,) = re.findall(r"# torchrun (.*) example\.py", code)
    example = tmp_path / "example.py"
    example.write_text(code + COUNT_GLOO_THREADS)
    output = run(sys.executable, "-m", "torch.distributed.run", "--standalone", *launcher.split(), str(example))
    # The ranks share a pipe and may write into each other's lines.
    assert output.count("torch.Size([8, 128, 1024])") == output.count("torch.Size([1024, 1024])") == 4
    assert output.count("0 threads of gloo left") == 4


def test_plan_command_gives_the_numbers_in_the_text():
    command, sweep, partitionings = re.findall(r"^    (python -m tpffn_triton plan .*)$", README, re.MULTILINE)
    assert "<- best" in run(sys.executable, *sweep.split()[1:])
    assert "row_column: Linear1 row-parallel" in run(sys.executable, *partitionings.split()[1:])
    output = run(sys.executable, *command.split()[1:])
    for number in ("1,048,576", "1,572,864", "6,291,456"):
        assert number in README
        assert number.replace(",", "") in output


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    commands = re.findall(r"^    .*?((?:bench|tests|examples)/\w+\.py)(.*)$", README, re.MULTILINE)
    assert len(commands) > 5
    scripts = sorted({script for script, _ in commands})
    *helps, rest = run(sys.executable, "-c", HELP_OF_EACH, *scripts).split("\f")
    assert not rest.strip()
    for script, known in zip(scripts, helps, strict=True):
        assert script.rpartition("/")[2] in known
        for flag in re.findall(r"--[\w-]+", " ".join(flags for other, flags in commands if other == script)):
            assert flag in known, (script, flag)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_host_cost_quotes_its_file():
    (fused, unfused, path) = re.findall(
        r"costs\s+the host (\d+) µs, three torch operations (\d+) µs \(\[host_cost\.json\]\((.*?)\)", README
    )[0]
    row = json.loads((ROOT / path).read_text())["rows"][0]
    assert (round(row["fused_us"]), round(row["unfused_us"])) == (int(fused), int(unfused))


def written(name: str) -> dict:
    """Return a results file that the documents quote."""
    return json.loads((ROOT / "bench" / "results" / "2026-11-23_cpu" / f"{name}.json").read_text())


def quantiles(row: dict, what: str, form: str) -> str:
    """Return p50 [p20–p80] as the documents show them."""
    return "{p50:{form}} [{p20:{form}}–{p80:{form}}]".format(
        form=form, **{f"p{p}": row[f"{what}_p{p}"] for p in (20, 50, 80)}
    )


def test_communication_quotes_its_files():
    """Every row of the table of exchanges, from the two files that it names; and the fitted latency."""
    text = (ROOT / "docs" / "communication.md").read_text()
    four, two = written("exchange")["rows"], written("exchange_2_ranks")["rows"]
    assert len(four) == len(two) > 8
    for rows in zip(four, two, strict=True):
        cells = [f"{rows[0]['work']}, {rows[0]['dtype']}", rows[0]["way"]]
        for row in rows:
            cells += [quantiles(row, "ms", ".1f"), f"{row['comm_ms']:.1f}", quantiles(row, "ratio", ".2f")]
        cells.append("" if rows[0]["y_rel_err"] is None else f"{rows[0]['y_rel_err']:.2e}")
        assert f"| {' | '.join(cells)} |" in text, rows[0]["way"]
    (alpha,) = re.findall(r"6 rounds of the (\d+) µs", text)
    terms = written("comm")["machine"]["link"]["terms"]
    assert [round(t["alpha_us"]) for t in terms if (t["kind"], t["world_size"]) == ("all_reduce", 4)] == [int(alpha)]


def test_cost_model_quotes_its_file():
    text = (ROOT / "docs" / "cost_model.md").read_text()
    rows = written("predicted")["rows"]
    assert len(rows) > 8
    for row in rows:
        sizes = f"B={row['batch']} S={row['seq']} H={row['hidden']} F={row['ffn']}"
        where = f"| {row['shape']}: {sizes} | {row['tp']} | {row['pass']} |"
        predicted = f"{row['predicted_ms']:.2f} | {row['predicted_ms'] / row['ms_p50']:.2f}"
        exposed = f"{row['exposed_ms']:.2f} ({row['exposed_ms_least']:.2f}) | {row['predicted_exposed_ms']:.2f}"
        assert f"{where} {quantiles(row, 'ms', '.2f')} | {predicted} | {exposed} |" in text, where


def test_table_quotes_its_files():
    """Each measured row of the table names a results file and says what stands in it."""
    rows = re.findall(
        r"^\| .*, (forward(?:\+backward)?) \| ([\d.]+) ms \| ([\d.]+) ms \| \[.*\]\((.*\.json)\) \|$", README, re.M
    )
    assert rows
    for mode, unfused, fused, path in rows:
        written = {
            (row["mode"], row["impl"]): row["ms_p50"] for row in json.loads((ROOT / path).read_text()) if row["tp"] == 4
        }
        mode = "fwd_bwd" if "backward" in mode else "fwd"
        assert written[mode, "unfused"] == pytest.approx(float(unfused), rel=0.01)
        assert written[mode, "fused"] == pytest.approx(float(fused), rel=0.01)


def test_tables_of_peers_are_those_of_the_committed_file():
    report = (sys.executable, "bench/report.py", "bench/results/2026-11-28_cpu/peers.json")
    run(*report, "--regime", "analysed", "--markdown", "README.md", "--check")
    run(*report, "--markdown", "bench/results/README.md", "--check")


def test_what_batch_invariance_costs():
    rows = json.loads((ROOT / "bench" / "results" / "2026-11-28_cpu" / "peers.json").read_text())
    ratios = [row["ratio_p50"] for row in rows if (row["impl"], row["mode"]) == ("fused-invariant", "fwd")]
    (least, most) = re.search(r"On a CPU, in fp32, forward takes ([\d.]+) to ([\d.]+) times as long", README).groups()
    assert (f"{min(ratios):.1f}", f"{max(ratios):.1f}") == (least, most)
