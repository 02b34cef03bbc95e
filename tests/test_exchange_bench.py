"""bench/exchange_bench.py on a small shape: every way is timed, the timelines show the orders they claim."""

import json

import pytest
from commands import ROOT, run

pytestmark = pytest.mark.cpu_only
BENCH = ROOT / "bench" / "exchange_bench.py"
WAYS = [
    ("backward", "serial"),
    ("backward", "overlapped"),
    ("backward", "serial, slices"),
    ("backward", "overlapped, slices"),
    *(("forward", f"{n} chunk{'s' if n > 1 else ''}") for n in (1, 2)),  # of 128 of its 256 rows
    ("reduction", "added in bf16"),
    ("reduction", "added in fp32"),
]


def test_every_way_and_its_timeline(tmp_path):
    out, trace, plot = tmp_path / "out.json", tmp_path / "trace.json", tmp_path / "new" / "timeline.png"
    result = run(BENCH, "--quick", "--shape", "small", "--threads", 1, "--json", out, "--trace", trace, "--plot", plot)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    assert [(row["work"], row["way"]) for row in written["rows"]] == WAYS
    for row in written["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 <= row["comm_ms"] < row["ms_p80"]
        assert row["ratio_p50"] == 1 or row["way"] not in ("serial", "serial, slices", "1 chunk", "added in bf16")
        assert row["way"] in result.stdout
    errors = {row["way"]: row["y_rel_err"] for row in written["rows"] if row["work"] == "reduction"}
    assert errors["added in fp32"] < errors["added in bf16"] < 0.01
    # On a busy machine an overlapped collective may still run late; a serial one never runs beside a GEMM.
    for name, timeline in written["timelines"].items():
        spans = timeline["spans"]
        slices = "slices" in name
        gradients = ["column_sum", "wgrad", "wgrad", "column_sum"] if slices else ["weight_grads"]
        assert [span[0] for span in spans if span[1] == "compute"] == ["linear_dact", "dgrad", *gradients]
        collectives = [span for span in spans if span[1] == "collective"]
        assert len(collectives) == (3 if slices else 1)
        if "serial" in name:
            assert timeline["beside_wgrad_ms"] == 0
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"gloo:all_reduce", "tpffn::weight_grads"} <= events
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp", 1), "--tp must be at least 2, got 1"),
        (("--shape", "tiny", "--tp", 32), "cuts B·S = 16 tokens into 32 equal parts"),
        (("--iters", 0), "--iters must be at least 1, got 0"),
        (("--plot", "x.txt"), "--plot writes"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = run(BENCH, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
