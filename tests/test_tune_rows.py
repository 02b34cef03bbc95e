"""bench/tune_rows.py: which contender becomes the row of a case, and what a state keeps when it is added to."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import tune_rows
import tune_search
from tune_cases import Case
from tune_filter import OK
from tune_rows import CUBLAS, State, choose

from tpffn_triton.kernels._configs import Config

pytestmark = pytest.mark.cpu_only
OWN = Config(64, 64, 64, 4, 4, USE_TMA=True)
FASTER, OTHER = replace(OWN, num_stages=3), replace(OWN, BLOCK_N=32)
LINEAR = Case("linear", "16bit", 16, 32, 32)


def test_choice() -> None:
    own = [10.0, 10.0, 10.0, 10.0, 10.0]

    def times(*percent: float) -> list[float]:
        return [a * b / 100 for a, b in zip(own, percent, strict=True)]

    slower = times(101, 102, 103, 104, 105)
    assert choose({OWN: own, FASTER: slower}, OWN) == OWN
    assert choose({OWN: own, FASTER: times(90, 91, 92, 93, 94), OTHER: times(80, 82, 81, 85, 83)}, OWN) == OTHER
    # Faster in the median, not by more than noise.
    assert choose({OWN: own, FASTER: times(90, 90, 90, 105, 105)}, OWN) == OWN
    # Torch's GEMM must beat the best by 2 %, not the tables' choice.
    assert choose({OWN: own, CUBLAS: times(99, 99, 99, 99, 99)}, OWN) == OWN
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 97, 97)}, OWN) is CUBLAS
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 97, 97), FASTER: times(96, 96, 96, 96, 96)}, OWN) == FASTER
    assert choose({OWN: own, CUBLAS: times(97, 97, 97, 99, 99)}, OWN) == OWN


def test_a_choice_stands_until_it_is_measured_beside_what_was_missing() -> None:
    state = State(None, {}, False)

    def rows(chosen, *configs):
        kinds = {OWN: tune_rows.TABLE, CUBLAS: tune_rows.TORCH}
        one = LINEAR._asdict() | {"verdict": OK}
        return [
            one
            | {"contender": kinds.get(config, tune_rows.CANDIDATE), "config": config and config.meta}
            | {"chosen": config == chosen}
            for config in configs
        ]

    def chosen():
        return [row["config"] for row in state.measured(LINEAR) if row["chosen"]]

    state.add(rows(FASTER, OWN, CUBLAS, FASTER))
    assert state.lacking(LINEAR, [OWN, FASTER, OTHER]) == [OTHER]
    assert state.chosen(LINEAR) == [FASTER]
    state.add(rows(OWN, OWN, CUBLAS))  # there was no time for more
    assert (chosen(), len(state.rows)) == ([FASTER.meta], 3)
    state.add(rows(OTHER, OWN, CUBLAS, FASTER, OTHER))
    assert (chosen(), len(state.rows)) == ([OTHER.meta], 4)
    state.add(rows(CUBLAS, OWN, CUBLAS, OTHER))
    assert (chosen(), len(state.rows)) == ([None], 4)
    assert state.chosen(LINEAR) == []


def test_a_state_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    where = dict.fromkeys(tune_rows.SAME, "a") | {"time_utc": ""}
    state = State(tmp_path / "state.json", where, resume=True)  # there is none yet
    state.add([tune_search._verdict_row("linear", "16bit", OWN, OK)])
    assert State(state.path, where, resume=True).verdicts("linear", "16bit") == {OWN: OK}
    assert State(state.path, where, resume=False).rows == []
    assert State(state.path, where | {"torch": None}, resume=True).rows
    for name in tune_rows.SAME:
        with pytest.raises(ValueError, match=f"measured with {name} a, this is b: start a new file"):
            State(state.path, where | {name: "b"}, resume=True)
    state.path.write_text("[{}]")
    with pytest.raises(ValueError, match=r"no state of tune.py \(KeyError\)"):
        State(state.path, where, resume=True)
