"""Ranks that die, stall, raise or differ, for real: each ends in a clear error on every other rank.

The command is faults.py, the faults are in fault_cases.py; here run those that stand for the others.
"""

import json

import faults
import pytest
from fault_cases import FAULTS

pytestmark = pytest.mark.cpu_only

# They run side by side: each is mostly asleep.
REPRESENTATIVE = {
    "gone": [
        "killed during an all-reduce",
        "rank 0 killed before the first call",
        "1 of 4 killed before a later call",
    ],
    "stopped": ["stopped (SIGSTOP) before a later call", "rank 0 stopped before the first call"],
    "raises": ["out of memory in forward", "out of memory in backward", "raises inside of backward"],
    "goes on": [
        "out of memory in forward, rank goes on",
        "out of memory at its end, rank goes on",
        "one backward skipped, rank goes on",
        "one backward skipped, two widths, rank goes on",
        "slices: one backward skipped, rank goes on",
        "slices: one backward more, rank goes on",
    ],
    "other shapes": [
        "hidden size, later call, rank goes on",
        "dtype known to the group",
        "1 of 4: sequence length known to the group",
        "all change to known lengths, one to another",
        "activation known to the group",
        "a layer left out where two take turns",
    ],
    "other values": [
        "b2, first call",
        "b2 drifts later, compare_ranks",
        "another model, compare_ranks",
        "x differs by a bit, comparing every call",
        "dy differs by a bit, comparing every call",
        "NaN in w1, first call",
        "NaN in dy, comparing every call",
        "one call fewer, comparing every call",
    ],
}


def outcomes_of(*names) -> dict:
    chosen = [fault for fault in FAULTS if fault.name in names]
    assert len(chosen) == len(names)
    return {fault.name: outcome for fault, outcome in faults.examine(chosen, jobs=len(chosen)).items()}


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_every_other_rank_sees_a_clear_error(kind):
    """Within the group's timeout, not the backend's default of half an hour; a loaded machine adds some."""
    for name, outcome in outcomes_of(*REPRESENTATIVE[kind]).items():
        assert outcome.verdict == "error", (name, outcome)
        assert max(filter(None, outcome.seconds)) < 4 * faults.GROUP_SECONDS, (name, outcome)


def test_strides_never_reach_a_collective():
    """gloo would reduce other elements, silently."""
    names = ("x with other strides", "dy with other strides", "dy of stride 0 on every rank")
    for name, outcome in outcomes_of(*names).items():
        assert outcome.verdict == "right", (name, outcome)


def test_what_is_not_looked_for_stands_in_the_table_as_wrong():
    (outcome,) = outcomes_of("one call fewer").values()
    assert outcome.verdict == "WRONG"
    assert outcome.saw[0].startswith("y right, y WRONG; CollectiveError")


def test_an_error_says_what_where_and_who():
    """The collective, its shape and dtype, the rank, the seconds, the backend's words, a guess, the culprit's note."""
    (outcome,) = outcomes_of("hidden size, later call").values()
    first, likely, noted = outcome.saw[0].splitlines()
    assert first.startswith("CollectiveError: all-reduce of [6, 32] in torch.float32 failed on rank 0 of 2 after ")
    assert " s: " in first
    assert "Timed out" in first
    assert likely.startswith("  likely a rank stalled, raised, or makes another number of calls")
    assert noted.startswith("  rank 1 rejected: x must be [..., H=32]")


def test_a_rank_that_comes_too_late_learns_that_the_others_gave_up():
    (outcome,) = outcomes_of("sleeps past the timeout before the first call").values()
    first, late = outcome.saw
    assert "rank 1 of 2 did not come" in first
    assert "rank 0 gave up after 5.0 s: rank 1 of 2 did not come" in late


def test_the_committed_table_has_todays_faults_and_no_hang():
    text = (faults.Path(faults.__file__).parents[1] / "docs" / "faults.md").read_text()
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [fault.name for fault in FAULTS]
    verdicts = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    assert [name for name, verdict in verdicts.items() if verdict == "WRONG"] == ["one call fewer"]
    assert set(verdicts.values()) == {"error", "right", "NaN", "WRONG"}


@pytest.mark.parametrize(
    ("saw", "status", "hung", "verdict"),
    [
        (["CollectiveError: x", "boom Error"], [0, 0], False, "error"),
        (["CollectiveError: x", "fine"], [0, 0], False, "UNEXPECTED"),
        (["y right", "boom Error"], [0, 0], False, "UNEXPECTED"),
        (["y WRONG; CollectiveError: x", "boom Error"], [0, 0], False, "UNEXPECTED"),
        (["CollectiveError: x", "y WRONG; boom Error"], [0, 0], False, "UNEXPECTED"),
        (["CollectiveError: x", None], [0, -6], False, "ABORTED"),
        (["CollectiveError: x", "boom Error"], [-6, 0], False, "ABORTED"),
        (["CollectiveError: x", "boom Error"], [0, 0], True, "HUNG"),
    ],
)
def test_verdicts(saw, status, hung, verdict):
    fault = faults.Fault("a fault", lambda c: None, "CollectiveError", "boom")
    assert faults._verdict(fault, saw, status, hung) == verdict


def test_a_wrong_result_has_a_verdict_of_its_own_only_where_it_is_expected():
    fault = faults.Fault("a fault", lambda c: None, "y WRONG; CollectiveError", "y right")
    assert faults._verdict(fault, ["y WRONG; CollectiveError: x", "y right"], [0, 0], False) == "WRONG"


def test_a_wrong_result_that_is_not_expected_fails_the_command(monkeypatch):
    outcome = faults.Outcome(["y WRONG", "y right"], [0.0, 0.0], [0, 0], "UNEXPECTED")
    monkeypatch.setattr(faults, "examine", lambda chosen, jobs: dict.fromkeys(chosen, outcome))
    assert faults.main(["--only", "^b2, first"]) == 1


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    found = tmp_path / "found.json"
    assert faults.main(["--only", "^b2, first", "--json", str(found)]) == 0
    assert "rank 1: b2 has digest" in capsys.readouterr().out
    (row,) = json.loads(found.read_text())
    assert (row["fault"], row["verdict"], row["status"]) == ("b2, first call", "error", [0, 0])
    with pytest.raises(SystemExit):
        faults.main(["--only", "no such fault"])
