"""bench/report.py on files as bench/peers.py writes them (peer_rows.py): tables, Markdown pages, bad input."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import ROOT
from peer_rows import CPU, H100, US, point, reported, write

sys.path.insert(0, str(ROOT / "bench"))

import report_rows
import report_table
from report_table import BEGIN, END

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run the command; see reported."""
    return partial(reported, capsys)


def lines_of(table: str, name: str) -> list[list[str]]:
    """Return the cells of a Markdown table's lines that begin with a name."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [cells for cells in found if cells[0].startswith((name, f"[{name}"))]


def test_terminal_table_and_chart(said, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = write(tmp_path / "rows.json", point(US), point(US | {"eager": 25.0}, mode="fwd_bwd"))
    result = said(file)
    assert (result.status, result.err) == (0, "")
    table, chart = result.out.split("Each peer's time over ours; past the mark (1.0) ours is faster.")
    assert table.startswith(f"{H100}, bf16, gelu, with biases; CUDA graph, L2 cold; {file}\n")
    assert "torch 2.13.0, triton 3.7.1, CUDA 13.0, python 3.12.3, commit 0123456789ab\n" in table
    forward, both = re.findall(r"^analysed 1024×1024×1024 .*", table, re.MULTILINE)
    assert re.split(r"  +", forward)[1:] == ["forward", "10.00 µs [9.800–10.20]", "2.00", "1.50", "0.95", "1.05", "–"]
    assert re.split(r"  +", both)[1:] == [
        *("forward+backward", "10.00 µs [9.800–10.20]", "2.50", "1.50", "0.95", "1.05", "0.50")
    ]
    assert "50 interleaved rounds." in table
    assert "\nnvmath: what nvmath is.\n" in table
    titles = [line for line in chart.splitlines() if line and not line.startswith(" ")]
    words = "CUDA graph, L2 cold, gelu"
    assert titles == [f"analysed, forward, {words}", f"analysed, forward+backward, {words}"]
    assert max(map(len, chart.splitlines())) <= 80


def test_a_ratio_says_what_it_is() -> None:
    def shown(ratio: float, spread: float) -> str:
        rows = point({"eager": 10 * ratio, "fused": 10.0}, spread=spread)
        only = report_rows.Point(Path("x"), {row["impl"]: row for row in rows})
        return report_table._ratio(only, "eager")

    assert [shown(1.2, 0.01), shown(0.8, 0.01), shown(1, 0)] == ["1.20", "0.80", "≈1.00"]
    # Near 1 there are more digits, and what the rounds cannot tell from 1 says so.
    assert [shown(0.998, 0.001), shown(1.004, 0.001), shown(1.03, 0.05)] == ["0.998", "1.004", "≈1.03"]


def test_without_ours_or_eager_there_is_no_figure(said, tmp_path: Path) -> None:
    without_ours = point({"eager": 20.0, "compile": 9.0})
    without_eager = point({"compile": 12.0, "fused": 2000.0}, ("other", 8, 16, 32), mode="fwd_bwd")
    file = write(tmp_path / "rows.json", without_ours, without_eager)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert said(file, "--markdown", page).status == 0
    assert lines_of(page.read_text(), "analysed") == [
        ["analysed 1024×1024×1024", "forward", "–", "–", "–", "–", "–"],
    ]
    assert lines_of(page.read_text(), "other") == [
        ["other 8×16×32", "forward+backward", "2.000 ms [1.960–2.040]", "–", "0.01", "–", "–"],
    ]
    # The chart leaves out what has no ratio.
    chart = said(file).out.split("past the mark")[1]
    assert "analysed" not in chart
    assert "other, forward+backward" in chart
    assert "past the mark" not in said(write(file, without_ours)).out


def test_ways_to_run_a_step_have_their_own_lines(said, tmp_path: Path) -> None:
    ways = [("graph", "cold"), ("graph", "warm"), ("eager", "cold")]
    file = write(tmp_path / "rows.json", *(point(US, run=how, l2=l2) for how, l2 in ways))
    out = said(file).out
    assert f"gelu, with biases; {file}\n" in out
    for words in ("CUDA graph, L2 cold", "CUDA graph, L2 warm", "host launches, L2 cold"):
        assert f"  forward, {words}  " in out


def test_devices_and_dtypes_are_apart(said, tmp_path: Path) -> None:
    files = [
        write(tmp_path / "h100.json", point(US), point(US, dtype="fp16")),
        write(tmp_path / "h200.json", point(US, device="NVIDIA H200")),
        write(tmp_path / "cpu.json", point(US, device=CPU, dtype="fp32"), point(US, activation="swiglu")),
    ]
    out = said(*files).out
    headings = re.findall(r"^(.*), with biases", out, re.MULTILINE)
    assert headings == [
        *(f"{H100}, bf16, gelu", f"{H100}, fp16, gelu", "NVIDIA H200, bf16, gelu"),
        *(f"{CPU}, fp32, gelu", f"{H100}, bf16, swiglu"),
    ]
    assert out.count("they say nothing about a GPU") == 1
    by_cpu = out.split(f"{CPU}, fp32, gelu, with biases; ")[1]
    assert by_cpu.startswith(str(files[2]))  # no word on how it was run


def test_several_files_of_one_device_have_their_names(said, tmp_path: Path) -> None:
    files = [write(tmp_path / name, point(US, commit=name)) for name in ("a.json", "b c.json")]
    out = said(*files, files[0]).out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("analysed 1024")] == [
        str(files[0]),
        "c.json",
    ]
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\n{END}")
    said(*files, "--markdown", page)
    text = page.read_text()
    assert "commit a.json, commit b c.json**, [a.json](../a.json), [b c.json](../b%20c.json)\n" in text
    assert [cells[0] for cells in lines_of(text, "analysed")] == [
        "[analysed](../a.json) 1024×1024×1024",
        "[analysed](../b%20c.json) 1024×1024×1024",
    ]


def test_markdown_replaces_what_is_between_the_marks(said, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", point(US))
    pages = [tmp_path / "README.md", tmp_path / "results.md"]
    for page in pages:
        page.write_text(f"before\n\n<!-- end -->\n{BEGIN}\nstale\n{END}\n\nafter <!-- end -->\n")
    check = said(file, "--markdown", *pages, "--check")
    assert (check.status, check.out) == (1, "")
    assert check.err == "".join(f"{page}: not up to date\n" for page in pages)
    assert "stale" in pages[0].read_text()
    written = said(file, "--markdown", *pages)
    assert (written.status, written.err) == (0, "".join(f"wrote {page}\n" for page in pages))
    text = pages[0].read_text()
    assert text.startswith(
        f"before\n\n<!-- end -->\n{BEGIN}\n\n**{H100}, bf16, gelu, with biases; CUDA graph, L2 cold; "
    )
    assert text.endswith(f"\n\n{END}\n\nafter <!-- end -->\n")
    assert "stale" not in text
    assert "\n| shape M×H×F/P | step | ours [p20–p80] | eager | compile | nvmath | error ÷ eager's | kept ÷ " in text
    assert "\n| --- | --- | --: | --: |" in text
    assert said(file, "--markdown", *pages, "--check").status == 0
    pages[1].write_text(text.replace("0.95", "1.95"))
    check = said(file, "--markdown", *pages, "--check")
    assert (check.status, check.err) == (1, f"{pages[0]}: up to date\n{pages[1]}: not up to date\n")


def test_rows_of_some_regimes(said, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", point(US), point(US, ("decode-1", 1, 8192, 3584), regime="decode"))
    assert "decode-1" in said(file).out
    told = said(file, "--regime", "analysed").out
    assert "analysed" in told
    assert "decode-1" not in told
    refused = said(file, "--regime", "analysed,wide")
    assert refused.status == 2
    assert "no rows of regime wide: the files have analysed, decode" in refused.err


def test_markdown_has_nine_columns_at_most(said, tmp_path: Path) -> None:
    peers = {f"peer-{number}": 10.0 + number for number in range(7)}
    file, page = write(tmp_path / "rows.json", point(peers | US)), tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    said(file, "--markdown", page)
    (cells,) = lines_of(page.read_text(), "analysed")
    assert len(cells) == 9
    assert cells[3:7] == [
        *("2.00", "≈1.00", "1.10"),
        "peer-2 1.20, peer-3 1.30, peer-4 1.40, peer-5 1.50, peer-6 1.60, compile 1.50, nvmath 0.95",
    ]


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_page_without_marks_is_refused_before_any_is_written(text: str, said, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"{BEGIN}\n{END}\n")
    bad.write_text(text)
    result = said(write(tmp_path / "rows.json", point(US)), "--markdown", good, bad)
    assert (result.status, result.out) == (2, "")
    assert result.err == f"report.py: error: {bad} needs a line '{BEGIN}' once and, after it, a line '{END}'\n"
    assert (good.read_text(), bad.read_text()) == (f"{BEGIN}\n{END}\n", text)


BAD_FILES = [
    (None, "cannot read {path}: No such file or directory"),
    ("no json", "{path} is not JSON: "),
    (b"\xff\xfe", "{path} is not JSON: "),
    ("[]", "{path} has no rows"),
    ('{"rows": []}', "{path} was not written by peers.py --json: it is no list of rows"),
    ("[1]", "{path} was not written by peers.py --json: row 0 is no object"),
    ("[{}]", "{path} was not written by peers.py --json: row 0 has no impl"),
    ("[NaN]", "{path} is not JSON: NaN is no figure"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_file_of_something_else_is_one_line_and_exit_2(content, message: str, said, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = said(path)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"report.py: error: {message.format(path=path)}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "bwd", "row 3 has mode 'bwd', which is none of fwd, fwd_bwd"),
        ("ms_p50", 0, "row 3 has ms_p50 0, not above 0"),
        ("ms_p50", None, "row 3 has ms_p50 None"),
        ("tokens", True, "row 3 has tokens True"),
        ("ratio_p50", "1.0", "row 3 has ratio_p50 '1.0'"),
        ("impl", "eager", "has two rows of eager at analysed, fwd, graph, cold"),
    ],
)
def test_a_wrong_row_is_named(field: str, value: object, message: str, said, tmp_path: Path) -> None:
    rows = point(US)
    rows[3][field] = value
    result = said(write(tmp_path / "rows.json", rows), "--goals")
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_every_field_that_is_read_is_asked_for(said, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for name in report_rows.FIELDS:
        rows = point(US)
        del rows[0][name]
        result = said(write(path, rows))
        assert (result.status, f"row 0 has no {name}" in result.err) == (2, True), name
    # and nothing else is: with these alone everything can be reported
    rows = [{name: row[name] for name in report_rows.FIELDS} for row in point(US, mode="fwd_bwd")]
    path.write_text(json.dumps(rows))
    assert [said(path, *flags).status for flags in ((), ("--goals",), ("--plots", tmp_path))] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check"], "--check needs --markdown"),
        (["--format", "svg"], "--format needs --plots"),
        (["--plots", "x", "--format", "bmp"], "invalid choice: 'bmp'"),
        (["--plots", "/dev/null/plots"], "cannot write /dev/null/plots"),
        (["--goals", "--plots", "x"], "not allowed with argument"),
        (["--markdown", "/no/such/page.md"], "cannot read /no/such/page.md"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message: str, said, tmp_path: Path) -> None:
    result = said(write(tmp_path / "rows.json", point(US)), *arguments)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "flags"), [("tabulate", ()), ("tabulate", ("--goals",)), ("matplotlib", ("--plots", "."))]
)
def test_a_missing_package_says_what_to_install(package: str, flags, said, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = said(write(tmp_path / "rows.json", point(US)), *flags)
    assert (result.status, result.out) == (2, "")
    assert result.err == f"report.py: error: {package} is needed for this: pip install 'tpffn-triton[bench]'\n"
