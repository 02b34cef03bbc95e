"""Choose the row of a case from times; keep what was measured (the state); make the file that kernels/_tuned.py reads.

state   a list of objects, one a verdict of the filter or a measurement: case, contender, config, verdict, times
        (tune_measure.py), and where and with what: device, versions, commit
file    {"schema": 1, "device", "arch", "torch", "triton", "date", "commit", "rows": [...]}; a row has the case's
        kernel, arithmetic, rows, cols, inner; config, null where torch's GEMM (cuBLAS) is faster; us of that;
        table_us of the tables' choice; cublas_us, or null; candidates, how many were timed; date and commit
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tables
from tables import Row
from tune_cases import Case
from tune_filter import OK

from tpffn_triton.kernels import _tuned
from tpffn_triton.kernels._configs import Config

# Torch's GEMM takes a row if it is faster by so much: every such row sends a GEMM elsewhere.
CUBLAS_MARGIN = 0.02
Contender = Config | None
CUBLAS: Contender = None
TABLE, CANDIDATE, TORCH = "table", "candidate", "cublas"
# What a state must agree in to be continued; what is None in either decides nothing.
SAME = ("device", "arch", "torch", "triton", "commit", "kernels")


def ratio_p80(ms: Sequence[float], others: Sequence[float]) -> float:
    """Return the 80 % quantile of the ratio of times, by round."""
    return float(np.quantile(np.array(ms) / np.array(others), 0.8))


def choose(ms: Mapping[Contender, Sequence[float]], own: Config) -> Contender:
    """Return the row for times of the same rounds: the fastest candidate that beats the tables' choice, own, by more
    than noise, else own; or CUBLAS where that beats either by CUBLAS_MARGIN."""
    better = [c for c in ms if c not in (CUBLAS, own) and ratio_p80(ms[c], ms[own]) < 1]
    best = min(better, key=lambda config: float(np.median(ms[config])), default=own)
    if CUBLAS in ms and ratio_p80(ms[CUBLAS], ms[best]) <= 1 - CUBLAS_MARGIN:
        return CUBLAS
    return best


class State:
    """What was measured so far, kept in a file if there is a path; surroundings: the fields of each row that say where
    and with what."""

    def __init__(self, path: Path | None, surroundings: Row, resume: bool) -> None:
        """Raises: ValueError: there is a file to resume that cannot be read, or is of other surroundings."""
        self.path, self.surroundings = path, surroundings
        self.rows: list[Row] = []
        if path is not None and resume and path.exists():
            self.rows = _read(path, surroundings)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, in the place of those of the same contenders, and write all. What was chosen of a case before is so
        until it has been measured again, beside what was missing."""
        new = [row | self.surroundings for row in rows]
        again = {_contender(row) for row in new}
        held = {_case(row) for row in self.rows if row["chosen"] and _contender(row) not in again}
        cases = {_case(row) for row in new} - held
        kept = [row for row in self.rows if _contender(row) not in again]
        self.rows = [row | {"chosen": row["chosen"] and _case(row) not in cases} for row in kept]
        self.rows += [row | {"chosen": row["chosen"] and _case(row) not in held} for row in new]
        if self.path is not None:
            tables.write_json(self.rows, self.path)

    def verdicts(self, kernel: str, arithmetic: str) -> dict[Config, str]:
        """Return what the filter has said of a kernel's configurations."""
        return {
            Config(**row["config"]): row["verdict"]
            for row in self.rows
            if row["rows"] is None and (row["kernel"], row["arithmetic"]) == (kernel, arithmetic)
        }

    def measured(self, case: Case) -> list[Row]:
        """Return a case's measurements."""
        return [row for row in self.rows if _case(row) == case]

    def lacking(self, case: Case, configs: Sequence[Config]) -> list[Config]:
        """Return which of a case's configurations were neither measured nor dropped by the filter, as the first never
        is."""
        known = {Config(**row["config"]) for row in self.measured(case) if row["config"] is not None}
        verdicts = self.verdicts(case.kernel, case.arithmetic)
        known |= {config for config, verdict in verdicts.items() if verdict != OK and config != configs[0]}
        return [config for config in configs if config not in known]

    def chosen(self, case: Case) -> list[Config]:
        """Return the configuration that was chosen of a case; none: there is no choice, or it is torch's GEMM."""
        rows = [row for row in self.measured(case) if row["chosen"] and row["config"] is not None]
        return [Config(**row["config"]) for row in rows]

    def cases(self) -> list[Case]:
        """Return what has been measured, in its order."""
        return [*dict.fromkeys(_case(row) for row in self.rows if row["rows"] is not None)]


def _case(row: Row) -> Case:
    return Case(*(row[name] for name in Case._fields))


def _contender(row: Row) -> tuple[Case, str, Contender]:
    return _case(row), row["contender"], None if row["config"] is None else Config(**row["config"])


def _read(path: Path, surroundings: Row) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            for name in SAME:
                had, has = row[name], surroundings[name]
                if had is not None and has is not None and had != has:
                    raise ValueError(f"it was measured with {name} {had}, this is {has}: start a new file")
            if row["config"] is not None:
                Config(**row["config"])
            assert {"verdict", "contender", "chosen", "us_p50", *Case._fields} <= set(row)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"cannot resume {path}: no state of tune.py ({type(error).__name__})") from None
    except ValueError as error:
        raise ValueError(f"cannot resume {path}: {error}") from None
    return rows


def row_of(case: Case, measured: Sequence[Row]) -> Row | None:
    """Return the file's row for a case's measurements; None where there is none, as the tables' choice failed."""
    by_contender = {row["contender"]: row for row in measured if row["verdict"] == OK}
    chosen = [row for row in measured if row["chosen"]]
    if not chosen:
        return None
    return case._asdict() | {
        "config": chosen[0]["config"],
        "us": chosen[0]["us_p50"],
        "table_us": by_contender[TABLE]["us_p50"],
        "cublas_us": by_contender[TORCH]["us_p50"] if TORCH in by_contender else None,
        "candidates": sum(row["verdict"] == OK and row["contender"] != TORCH for row in measured),
        "date": chosen[0]["time_utc"],
        "commit": _commit(chosen[0]),
    }


def _commit(row: Row) -> str:
    return tables.commit_of(row).removeprefix("commit ")


def file_of(state: State) -> dict[str, Any]:
    """Return the content of the file."""
    rows = [row_of(case, state.measured(case)) for case in state.cases()]
    where = state.surroundings
    header = {name: where[name] for name in ("device", "arch", "torch", "triton")}
    header |= {"date": where["time_utc"], "commit": _commit(where)}
    return {"schema": _tuned.SCHEMA, **header, "rows": [row for row in rows if row is not None]}


def merged(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content with, behind its rows, those of a file there for other cases, measured on the same device with
    the same versions: a search of some kernels loses no others. A file of anything else is replaced."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        _tuned.read(path)
        if any(before[name] != content[name] for name in ("device", "arch", "torch", "triton")):
            return content
    except (OSError, ValueError, KeyError):
        return content
    here = {_case(row) for row in content["rows"]}
    kept = [row for row in before["rows"] if _case(row) not in here]
    return content | {"rows": content["rows"] + kept}


def write(content: dict[str, Any], path: Path) -> None:
    """Replace the file at once."""
    tables.write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
