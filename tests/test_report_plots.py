"""What bench/report.py draws: four pictures, and bars in the terminal."""

from __future__ import annotations

import itertools
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import ROOT, run
from peer_rows import ANALYSED, CPU, DECODE, H100, US, point, reported, write

sys.path.insert(0, str(ROOT / "bench"))

import figures
import peer_styles
import report_goals
import report_plots
import report_rows
import terminal_chart

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run the command; see reported."""
    return partial(reported, capsys)


def test_plots(said, tmp_path: Path) -> None:
    points = [point(US, shape, mode=mode) for shape in (ANALYSED, *DECODE) for mode in ("fwd", "fwd_bwd")]
    result = said(write(tmp_path / "rows.json", *points), "--plots", tmp_path / "new" / "plots")
    names = ["speedup.png", "roofline.png", "latency.png", "memory.png"]
    paths = [tmp_path / "new" / "plots" / name for name in names]
    assert (result.status, result.err) == (0, "".join(f"wrote {path}\n" for path in paths))
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000


def drawn(kind: str, *points: list) -> list:
    """Return the axes of a picture of one section."""
    of_peer = [report_rows.Point(Path("x"), {row["impl"]: row for row in rows}) for rows in points]
    first = points[0][0]
    section = report_rows.Section(first["device"], first["dtype"], first["activation"], of_peer)
    figure = report_plots.KINDS[kind](figures.pyplot(), section, peer_styles.Styles([section]))
    figures.pyplot().close(figure)
    return figure.axes


def lines_in(axis) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axis.lines}


def test_speedup_draws_ratios_and_whiskers() -> None:
    fwd, both = drawn(
        "speedup", point(US, spread=0.1), point(US | {"eager": 5.0}, DECODE[0]), point(US, mode="fwd_bwd")
    )
    for axis, ratios in ((fwd, [2.0, 0.5]), (both, [2.0])):
        containers = {container.get_label(): container for container in axis.containers}
        assert [*containers] == ["eager", "compile", "nvmath"]
        points, *_ = containers["eager"]
        assert [*points.get_xdata()] == pytest.approx(ratios)
        assert [*points.get_ydata()] == [4 * place for place in range(len(ratios))]  # three peers and a gap
        low, high = axis.get_xlim()
        assert low < 0.5 < 2.2 < high
        assert lines_in(axis)["ours = 1.0"] == [(1, 0), (1, 1)]
    (start, end) = fwd.containers[0][2][0].get_segments()[0]
    assert (start[0], end[0]) == pytest.approx((1.8, 2.2))
    assert [tick.get_text().split("\n")[0] for tick in fwd.get_yticklabels()] == ["analysed", "decode-1"]
    assert [text.get_text() for text in fwd.texts] == ["1.0: ours"]
    assert [text.get_text() for text in both.texts] == ["1.0: ours", "not measured"]


def test_roofline_has_the_ceilings_of_a_known_device_alone() -> None:
    rows = point({"eager": 20.0, "fused": 10.0})
    (known,) = drawn("roofline", rows, point({"fused": 50.0}, DECODE[0]))
    lines = lines_in(known)
    intensity = rows[0]["flops"] / rows[0]["moved_bytes"]
    assert lines["eager"] == [pytest.approx((intensity, rows[0]["tflops"]))]
    assert len(lines["ours (fused)"]) == 2
    (left, low), ridge, (_, high) = lines["800 TFLOP/s, 3 TB/s"]
    assert (low, high) == pytest.approx((3 * left, 800))
    assert ridge == pytest.approx((800 / 3, 800))
    (unknown,) = drawn("roofline", point({"eager": 20.0, "fused": 10.0}, device=CPU))
    assert not any("TFLOP/s" in label for label in lines_in(unknown))
    assert [text.get_text() for text in known.texts] == ["decode-1", "analysed"]


def test_shapes_on_the_roofline_do_not_overlap() -> None:
    (axis,) = drawn("roofline", *(point({"fused": 10.0}, (f"shape-{m}", m, 4096, 4096)) for m in (4000, 4050, 4096)))
    axis.figure.canvas.draw()
    # The text alone, without its line, is as wide as 8 pt are high.
    starts = sorted(text.xyann[0] * axis.bbox.width for text in axis.texts)
    assert len(starts) == 3
    assert min(b - a for a, b in itertools.pairwise(starts)) > 8 * axis.figure.dpi / 72


def test_latency_has_a_panel_a_layer_and_mode_with_several_m() -> None:
    other = point({"fused": 1.0}, ("other", 8, 64, 64))
    panels = drawn("latency", point(US, DECODE[1]), point(US | {"eager": 7.0}, DECODE[0]), other, point(US))
    (axis,) = panels
    assert axis.get_title() == "H=8192 F/P=3584\nforward, CUDA graph, L2 cold"
    lines = lines_in(axis)
    assert lines["eager"] == [pytest.approx((1, 7.0)), pytest.approx((64, 20.0))]
    assert [*lines] == ["eager", "compile", "nvmath", "ours (fused)"]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert len(axis.collections) == 4


def test_memory_has_a_bar_a_peer_and_half_of_eagers() -> None:
    both = [point(US, mode="fwd_bwd", l2=l2) for l2 in ("cold", "warm")]
    (axis,) = drawn("memory", point(US), *both)  # the same bytes whatever L2 held: one panel
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["eager", "compile", "nvmath", "ours (fused)"]
    assert [bar.get_width() for bar in axis.patches] == [4, 4, 2, 2]
    assert lines_in(axis)["half of eager's"][0][0] == 2
    assert [text.get_text() for text in axis.texts] == ["4 (1.00×)", "4 (1.00×)", "2 (0.50×)", "2 (0.50×)"]
    both[1][0]["saved_bytes"] *= 2
    titles = [axis.get_title().split("\n")[0] for axis in drawn("memory", *both)]
    assert titles == ["analysed, CUDA graph, L2 cold", "analysed, CUDA graph, L2 warm"]


def test_plots_without_rows_are_left_out_and_say_why(said, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", point({"eager": 20.0}, device=CPU, commit=None))
    result = said(file, "--plots", tmp_path, "--format", "svg")
    assert result.status == 0
    assert result.err.splitlines() == [
        f"wrote {tmp_path / 'roofline.svg'}",
        "left out speedup.svg: no peer was timed beside fused",
        "left out latency.svg: no H and F/P was measured at several M",
        "left out memory.svg: no row of mode fwd_bwd has saved_bytes",
    ]
    svg = (tmp_path / "roofline.svg").read_text()
    for words in ("the ceilings of this device are unknown", "CPU figures: they say nothing about a GPU"):
        assert words in svg
    assert not list(tmp_path.glob("speedup*"))


def test_plots_of_several_devices_do_not_overwrite_one_another(said, tmp_path: Path) -> None:
    rows = [point(US), point(US, device="NVIDIA H200")]
    assert said(write(tmp_path / "rows.json", *rows), "--plots", tmp_path).status == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{kind}_{device}_bf16_gelu.png"
        for kind in ("speedup", "roofline")
        for device in ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H200")
    }


def test_one_point_in_two_files_is_not_drawn(said, tmp_path: Path) -> None:
    files = [write(tmp_path / name, point(US)) for name in ("a.json", "b.json")]
    result = said(*files, "--plots", tmp_path / "plots")
    assert (result.status, result.out) == (2, "")
    assert result.err == (
        f"report.py: error: analysed, forward, CUDA graph, L2 cold, gelu is in {files[0]} and in {files[1]}: "
        "draw one of them at a time\n"
    )


def test_colours_stay_with_their_peers() -> None:
    def styles(*peers: str) -> peer_styles.Styles:
        rows = {row["impl"]: row for row in point(dict.fromkeys((*peers, "fused"), 1.0))}
        section = report_rows.Section(H100, "bf16", "gelu", [report_rows.Point(Path("x"), rows)])
        return peer_styles.Styles([section])

    names = ("eager", "compile", "nvmath", "two-gemms", "fused")
    one, other = styles("eager", "compile", "nvmath", "two-gemms"), styles("own", "nvmath", "compile")
    assert [one.colour(name) for name in names] == [other.colour(name) for name in names]
    many = styles("eager", "two-gemms", *(f"peer-{number}" for number in range(25)))
    looks = [(many.line(f"peer-{n}")["color"], many.line(f"peer-{n}")["marker"]) for n in range(25)]
    assert len({*looks}) == 25
    ours = one.line("fused")
    assert all(ours["linewidth"] > one.line(name)["linewidth"] for name in names[:-1])


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(0.8, 2.2, [0.8, 1, 1.2, 1.5, 2]), (0.5, 40, [0.5, 1, 2, 5, 10, 20, 40]), (0.97, 1.06, [1])],
)
def test_round_values(least: float, most: float, expected: list[float]) -> None:
    assert peer_styles.round_values(least, most, 9) == pytest.approx(expected)


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_chart_fits_its_width(width: int, blocks: bool) -> None:
    pairs = [("eager", 2.0), ("compile-max-autotune", 1.0), ("slow", 9.0), ("fast", 0.5)]
    chart = terminal_chart.bars([("a title of several words and more", pairs), ("second", pairs[:1])], width, blocks)
    assert all(len(line) <= width for line in chart.splitlines())
    assert chart.isascii() != blocks
    bars = [line.rstrip() for line in chart.splitlines() if re.match(r"  \S", line)]
    assert len(bars) == 5
    mark, filled, more = ("│", "█", "▶") if blocks else ("|", "#", ">")
    (place,) = {bar.index(mark) for bar in bars}
    eager, same, slow, fast, _ = bars
    start = same.index(filled)
    assert eager.count(filled) == pytest.approx(2 * (place - start), abs=3)
    assert same.endswith(filled + mark)
    assert fast.count(filled) == pytest.approx((place - start) / 2, abs=1)
    assert slow.endswith(more)
    assert sum(more in bar for bar in bars) == 1
    if width > 30:
        assert same.startswith("  compile-max-autotune   1.00 ")


def test_terminal_without_block_characters(tmp_path: Path, monkeypatch) -> None:
    file = write(tmp_path / "rows.json", point(US, device=CPU, dtype="fp32"))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("COLUMNS", "70")
    ascii_only = run(ROOT / "bench" / "report.py", file)
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert re.search(r"^analysed 1024x1024x1024  forward +10.00 us \[9.800-10.20\] ", ascii_only.stdout, re.MULTILINE)
    assert re.search(r"^  eager +2\.00 #+\|#+$", ascii_only.stdout, re.MULTILINE)
    assert ascii_only.stdout.isascii()
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    assert re.search(r"^  eager +2\.00 █+│█+$", run(ROOT / "bench" / "report.py", file).stdout, re.MULTILINE)


def test_goals_in_ascii() -> None:
    text = report_goals.table([])
    assert terminal_chart.printable(text, "utf-8") == text
    assert terminal_chart.printable("≥ 1.5× µs ≤ ½ p20–p80 ✓", "ascii") == ">= 1.5x us <= 1/2 p20-p80 ?"
