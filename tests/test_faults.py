"""Ranks that die, stall, raise or differ, for real: each ends in a clear error on every other rank.

The command is faults.py, the faults are in fault_cases.py; here run those that stand for the others.
"""

import json

import faults
import pytest
from fault_cases import FAULTS

pytestmark = pytest.mark.cpu_only

REPRESENTATIVE = [
    "killed during an all-reduce",
    "rank 0 killed before the first call",
    "1 of 4 killed before a later call",
    "sleeps past the timeout before the first call",
    "stopped (SIGSTOP) before a later call",
    "rank 0 stopped before the first call",
    "raises inside of the call: out of memory",
    "hidden size, later call",
    "hidden size, later call, rank goes on",
    "1 of 4: sequence length known to the group",
    "all change to known lengths, one to another",
    "b2, first call",
    "b2 drifts later, compare_ranks",
    "NaN in w1, first call",
    "NaN in dy, comparing every call",
    "another layer, then another length",
    "one call fewer, comparing every call",
    "x with other strides",
    "dy with other strides",
    "dy of stride 0 on every rank",
]


@pytest.fixture(scope="module")
def outcomes():
    """Run them side by side: each is mostly asleep."""
    chosen = [fault for fault in FAULTS if fault.name in REPRESENTATIVE]
    return {fault.name: outcome for fault, outcome in faults.examine(chosen, jobs=8).items()}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_rank_sees_a_clear_error_or_the_right_result(name, outcomes):
    outcome = outcomes[name]
    late = name == "another layer, then another length"
    assert outcome.verdict == ("WRONG" if late else "right" if "strid" in name else "error"), outcome


def test_errors_come_within_the_timeout(outcomes):
    """What decides is the group's timeout, not the backend's default of half an hour; a loaded machine adds some."""
    for name, outcome in outcomes.items():
        slowest = max(seconds for seconds in outcome.seconds if seconds is not None)
        assert slowest < 4 * faults.GROUP_SECONDS, (name, outcome)


def test_an_error_says_what_where_and_who(outcomes):
    """The collective, its shape and dtype, the rank, the seconds, the backend's words, a guess, the culprit's note."""
    victim = next(fault.victim for fault in FAULTS if fault.name == "hidden size, later call")
    (text,) = (t for rank, t in enumerate(outcomes["hidden size, later call"].saw) if rank != victim)
    first, likely, noted = text.splitlines()
    assert first.startswith("CollectiveError: all-reduce of [6, 32] in torch.float32 failed on rank 0 of 2 after ")
    assert " s: " in first
    assert "Timed out" in first
    assert likely.startswith("  likely a rank stalled, raised, or makes another number of calls")
    assert noted.startswith("  rank 1 rejected: x must be [..., H=32]")


def test_a_rank_that_comes_too_late_learns_that_the_others_gave_up(outcomes):
    first, late = outcomes["sleeps past the timeout before the first call"].saw
    assert "rank 1 of 2 did not come" in first
    assert "rank 0 gave up after 5.0 s: rank 1 of 2 did not come" in late


def test_the_committed_table_has_todays_faults_and_no_hang():
    text = (faults.Path(faults.__file__).parents[1] / "docs" / "faults.md").read_text()
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [fault.name for fault in FAULTS]
    assert {row[-1].removesuffix(" |") for row in rows} <= {"error", "right", "NaN", "WRONG"}


@pytest.mark.parametrize(
    ("saw", "status", "hung", "verdict"),
    [
        (["CollectiveError: x", "boom Error"], [0, 0], False, "error"),
        (["CollectiveError: x", "fine"], [0, 0], False, "UNEXPECTED"),
        (["y right", "boom Error"], [0, 0], False, "UNEXPECTED"),
        (["y WRONG; CollectiveError: x", "boom Error"], [0, 0], False, "WRONG"),
        (["CollectiveError: x", None], [0, -6], False, "ABORTED"),
        (["CollectiveError: x", "boom Error"], [-6, 0], False, "ABORTED"),
        (["CollectiveError: x", "boom Error"], [0, 0], True, "HUNG"),
    ],
)
def test_verdicts(saw, status, hung, verdict):
    fault = faults.Fault("a fault", lambda c: None, "CollectiveError", "boom")
    assert faults._verdict(fault, saw, status, hung) == verdict


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    found = tmp_path / "found.json"
    assert faults.main(["--only", "^b2, first", "--json", str(found)]) == 0
    assert "rank 1: b2 has digest" in capsys.readouterr().out
    (row,) = json.loads(found.read_text())
    assert (row["fault"], row["verdict"], row["status"]) == ("b2, first call", "error", [0, 0])
    with pytest.raises(SystemExit):
        faults.main(["--only", "no such fault"])
