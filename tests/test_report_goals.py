"""The goals table of bench/report.py: met, missed, not yet measured."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import ROOT
from peer_rows import CPU, DECODE, H100, US, point, reported, write

sys.path.insert(0, str(ROOT / "bench"))

import environment
from report_goals import GOALS, NOT_YET

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run the command; see reported."""
    return partial(reported, capsys)


def goals_of(out: str) -> dict[tuple[str, str], list[str]]:
    """Return (work, goal) → the other cells that are not empty, of the first goals table."""
    lines = out.splitlines()
    ruler = next(number for number, line in enumerate(lines) if line.startswith("---"))
    columns = [found.span() for found in re.finditer("-+", lines[ruler])]
    found: dict[tuple[str, str], list[str]] = {}
    work = ""
    for line in lines[ruler + 1 :]:
        first, goal, *others = (line[start:end].strip() for start, end in columns)
        work = first or work
        if goal:
            found[work, goal] = [cell for cell in others if cell]
        if len(found) == len(GOALS):
            break
    return found


def test_goals_met_missed_and_not_measured(said, tmp_path: Path) -> None:
    analysed = {"eager": 16.0, "compile-max-autotune": 12.0, "fused": 10.0}
    slow = {"eager": 55.0, "nvmath": 48.0, "two-gemms": 30.0, "fused": 50.0}
    file = write(
        tmp_path / "rows.json",
        point(analysed),
        point(analysed | {"eager": 9.0}, run="eager"),  # host launches: for the goals of every point alone
        point({"eager": 30.0, "fused": 20.0}, mode="fwd_bwd"),
        *(point(slow, shape) for shape in DECODE),
        point({"two-gemms": 100.0, "fused": 101.0}, ("wide", 4096, 4096, 4096)),
        point({"two-gemms": 100.0, "fused": 150.0}, ("wide", 2048, 4096, 4096)),  # too few tokens for the goal
        point({"eager": 103.0, "nvmath": 101.0, "fused": 100.0}, ("training", 2048, 4096, 2048), mode="fwd_bwd"),
    )
    result = said(file, "--goals")
    assert result.status == 0
    assert result.out.startswith(f"{H100}, against the goals for one H100, bf16\n\n")
    goals = goals_of(result.out)
    at = ["analysed, forward, CUDA graph, L2 cold, gelu", str(file)]
    work = "analysed, graph, forward"
    assert goals[work, "eager ≥ 1.5×"] == ["1.600×", "met", *at]
    assert goals[work, "compile-max-autotune ≥ 1.25×"] == ["1.200×", "missed by 4 % (1 of 1)", *at]
    assert goals[work, "addmm-epilogue ≥ 1.2×"] == [NOT_YET]
    assert goals[work, "ours ≤ 12 µs"] == ["10.0 µs", "met", *at]
    work = "analysed, graph, forward+backward"
    assert goals[work, "eager ≥ 1.5×"][:2] == ["1.500×", "met"]
    assert goals[work, "compile ≥ 1.25×"] == [NOT_YET]
    work = "decode M 1–64, H=8192, F/P=3584, cold L2"
    # Two bare GEMMs are no peer.
    assert goals[work, "no peer faster"][:2] == ["0.960× nvmath", "missed by 4 % (2 of 2)"]
    assert goals["the same, graph", "eager ≥ 1.15×"][:2] == ["1.100×", "missed by 4.3 % (2 of 2)"]
    moved = point({"fused": 50.0}, DECODE[0])[0]["moved_bytes"]
    share = goals["the same, graph", "ours ≥ 80 % of copy bandwidth"]
    percent = 100 * moved / 50e-6 / 3e12  # of the preset's 3 TB/s
    missed = f"missed by {100 * (80 - percent) / 80:.2g} % (2 of 2)"
    assert share[:3] == [f"{percent:.1f} %", missed, "decode-1, forward, CUDA graph, L2 cold, gelu"]
    assert goals["wide M 4096–16384, H 4096–8192, forward", "ours ≤ 1.02× two-gemms"][:2] == ["1.010×", "met"]
    work = "training, H=4096, forward+backward"
    assert goals[work, "eager ≥ 1.04×"][:2] == ["1.030×", "missed by 0.96 % (1 of 1)"]
    assert goals[work, "nvmath ≥ 1×"][:2] == ["1.010×", "met"]
    assert goals["every point", "eager ≥ 1×"] == [
        *("0.900×", "missed by 10 % (1 of 6)", "analysed, forward, host launches, L2 cold, gelu", str(file))
    ]
    assert goals["every point", "errors ≤ 1.1× eager's"][:2] == ["1.050×", "met"]
    assert goals["every point, forward+backward", "kept for backward ≤ 0.5× eager's"][:2] == ["0.500×", "met"]
    assert len(goals) == len(GOALS)


def test_error_and_memory_goals_are_missed(said, tmp_path: Path) -> None:
    rows = point(US, mode="fwd_bwd", error_vs_eager=1.25)
    ours = rows[-1]
    ours["saved_bytes"] *= 1.5
    goals = goals_of(said(write(tmp_path / "rows.json", rows), "--goals").out)
    assert goals["every point", "errors ≤ 1.1× eager's"][:2] == ["1.250×", "missed by 14 % (1 of 1)"]
    kept = goals["every point, forward+backward", "kept for backward ≤ 0.5× eager's"]
    assert kept[:2] == ["0.750×", "missed by 50 % (1 of 1)"]


@pytest.mark.parametrize("where", [{"device": CPU}, {"dtype": "fp16"}])
def test_elsewhere_no_goal_is_measured(where: dict, said, tmp_path: Path) -> None:
    out = said(write(tmp_path / "rows.json", point(US, **where), point(US, mode="fwd_bwd", **where)), "--goals").out
    assert out.startswith(where.get("device", H100))
    assert out.count(NOT_YET) == len(GOALS)
    assert not re.search(r"\bmet\b|missed by", out)


def test_goals_of_each_device_and_of_an_unknown_one(said, tmp_path: Path) -> None:
    slower = point({"eager": 10.0, "fused": 20.0}, activation="swiglu")
    unknown = point(US, DECODE[0], device="NVIDIA H100 PCIe MIG")
    out = said(write(tmp_path / "rows.json", point(US), slower, unknown), "--goals").out
    first, second = out.split("NVIDIA H100 PCIe MIG, against the goals")
    # Of all activations on a device the worst counts.
    assert goals_of(first)["analysed, graph, forward", "eager ≥ 1.5×"][:3] == [
        *("0.500×", "missed by 67 % (1 of 2)", "analysed, forward, CUDA graph, L2 cold, swiglu")
    ]
    assert goals_of("\n\n" + second)["the same, graph", "ours ≥ 80 % of copy bandwidth"] == [NOT_YET]
    assert "Copy bandwidth of NVIDIA H100 PCIe MIG is unknown: its share is not measured." in second
    assert f"Copy bandwidth of {H100} is unknown" not in out
    # Of some devices it was measured, of others it is the datasheet's peak.
    for device, tb_per_s in ((H100, "3 TB/s"), ("NVIDIA A100-SXM4-80GB", "2.04 TB/s")):
        out = said(write(tmp_path / "rows.json", point(US, device=device)), "--goals").out
        source = environment.ceiling(device).source
        assert f"Copy bandwidth of {device}: {tb_per_s} by tpffn_triton/presets.py: {source}.\n" in out + "\n"
