"""bench/peers.py --resume: what is kept of a run before, what is measured again, and what takes whose place."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from commands import ROOT
from peer_rows import US, point, write
from peer_runs import peers_here

sys.path.insert(0, str(ROOT / "bench"))

import environment
import peers_measure
import report_rows
import tune_rows
from peer_results import SAME, Results

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Run the command line; see peers_here."""
    with peers_here(monkeypatch) as main:
        yield main


def test_a_stopped_run_keeps_its_rows_and_another_goes_on(bench, monkeypatch, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.json"
    flags = ("--tokens", "6,8", "--mode", "fwd", "--peers", "eager,fused", "--json", str(out))
    measured: list[int] = []
    measure_shard = peers_measure._measure_shard

    def stopped_at_8(rank, settings, shard, *given):
        measured.append(shard.shape.tokens)
        if shard.shape.tokens == 8 and len(measured) < 3:
            raise KeyboardInterrupt
        return measure_shard(rank, settings, shard, *given)

    monkeypatch.setattr(peers_measure, "_measure_shard", stopped_at_8)
    with pytest.raises(KeyboardInterrupt):
        bench(*flags)
    before = json.loads(out.read_text())
    assert [row["tokens"] for row in before] == [6, 6]
    assert bench(*flags, "--resume") == 0
    assert measured == [6, 8, 8]
    after = json.loads(out.read_text())
    assert after[:2] == before
    assert [row["tokens"] for row in after] == [6, 6, 8, 8]
    assert "6x32x48, gelu, fp32, fwd, eager: kept as measured before: eager, fused\n" in capsys.readouterr().err
    # Other commits' rows are measured again, and replaced; what this run does not measure is kept.
    monkeypatch.setattr(environment, "_git", lambda *arguments: "def" if "rev-parse" in arguments else "")
    assert bench(*flags[:1], "8", *flags[2:], "--resume") == 0
    assert measured == [6, 8, 8, 8]
    assert [(row["tokens"], row["commit"]) for row in json.loads(out.read_text())] == [(6, "abc")] * 2 + [
        (8, "def")
    ] * 2


def test_rows_are_kept_whatever_peers_are_asked_for(bench, tmp_path: Path, capsys) -> None:
    """Only what is interleaved can be compared: a peer more would take all rows of a point along."""
    out = tmp_path / "rows.json"
    flags = ("--tokens", "6", "--mode", "fwd", "--json", str(out))
    assert bench(*flags, "--peers", "eager,fused") == 0
    before = json.loads(out.read_text())
    for peers in ("two-gemms", "eager,fused,two-gemms", "eager"):
        assert bench(*flags, "--peers", peers, "--resume") == 0
        assert json.loads(out.read_text()) == before
    words = "fwd, eager: kept as measured before: eager, fused; for two-gemms beside them start a new file\n"
    assert capsys.readouterr().err.count(words) == 2


def test_without_a_commit_rows_are_measured_again_and_replaced(bench, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    out = tmp_path / "rows.json"
    flags = ("--tokens", "6", "--mode", "fwd", "--peers", "eager,fused", "--json", str(out))
    assert bench(*flags) == 0
    before = json.loads(out.read_text())
    assert bench(*flags, "--resume") == 0
    after = json.loads(out.read_text())
    assert [row["impl"] for row in after] == ["eager", "fused"]
    assert after != before
    assert report_rows.load([out])


def test_rough_rows_take_no_full_ones_place(tmp_path: Path, bench) -> None:
    out = tmp_path / "rows.json"
    flags = ("--mode", "fwd", "--peers", "eager,fused", "--json", str(out), "--resume")
    assert bench("--tokens", "6", *flags) == 0
    full = [row | {"quick": False} for row in json.loads(out.read_text())]
    out.write_text(json.dumps(full))
    assert bench("--tokens", "6,8", *flags) == 0
    after = json.loads(out.read_text())
    assert after[:2] == full
    assert [(row["tokens"], row["quick"]) for row in after[2:]] == [(8, True)] * 2


def test_older_rows_have_a_place_in_the_csv(tmp_path: Path, bench) -> None:
    out, table = tmp_path / "rows.json", tmp_path / "rows.csv"
    write(out, [row | {"no_longer": 1} for row in point(US, quick=False, kernels="")])
    assert "tuned" not in json.loads(out.read_text())[0]
    flags = ("--mode", "fwd", "--peers", "eager,fused", "--json", str(out), "--csv", str(table), "--resume")
    assert bench("--tokens", "6", *flags) == 0
    with table.open(newline="") as file:
        old, *_, new = csv.DictReader(file)
    assert (old["no_longer"], new["no_longer"]) == ("1", "")


def test_what_tuning_has_found_is_of_the_key(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment.checkout, "ROOT", tmp_path)
    assert environment.tuned_digest() is None
    file = tmp_path / "kernels" / "tuned" / "GPU.json"
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    first = environment.tuned_digest()
    file.write_text("[0]")
    assert len({None, first, environment.tuned_digest()}) == 3
    assert "tuned" in SAME
    assert "tuned" not in tune_rows.SAME
    # Older rows, without it, can be gone on from.
    results = Results(write(tmp_path / "rows.json", point(US, quick=False, kernels="")), None)
    results.resume()
    assert {key.tuned for key in results.by_key} == {None}
