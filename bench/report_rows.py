"""Read what bench/peers.py wrote: rows, checked, as sections of points.

row      one peer at one point; peers_measure.py lists the fields
point    what one run interleaved: a shape, mode, run and l2 of one file, a row a peer; ours is `fused`
section  the points of one device, dtype and activation: what may stand in one table or picture
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import checkout  # noqa: F401
import tables
from peer import EAGER, FUSED, TWO_GEMMS
from tables import Row
from workloads import MODES

MODE_WORDS = {"fwd": "forward", "fwd_bwd": "forward+backward"}
RUN_WORDS = {"eager": "host launches", "graph": "CUDA graph"}

_TEXT, _WHOLE, _NUMBER, _NONE = (str,), (int,), (int, float), (type(None),)
# What is asked of a row; it may have more.
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("impl", "label", "mode", "shape", "regime", "activation", "dtype", "run", "l2"), _TEXT),
    **dict.fromkeys(("device", "device_type", "backend", "torch", "triton", "python"), _TEXT),
    **dict.fromkeys(("tokens", "hidden", "ffn_per_rank", "iters", "ranks", "cores", "threads"), _WHOLE),
    **dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "tflops", "flops", "moved_bytes", "gb_per_s"), _NUMBER),
    **dict.fromkeys(("ratio_p20", "ratio_p50", "ratio_p80", "error_vs_eager", "saved_bytes"), _NUMBER + _NONE),
    **{"load_average": _NUMBER + _NONE, "cuda": _TEXT + _NONE, "commit": _TEXT + _NONE},
    **{"triton_interpret": (bool,), "uncommitted_changes": (bool, *_NONE)},
}
_POSITIVE = ("tokens", "hidden", "ffn_per_rank", "ms_p20", "ms_p50", "ms_p80", "tflops", "flops", "moved_bytes")


@dataclass(frozen=True)
class Point:
    """What one run interleaved: impl → row, all of one file; see the module docstring."""

    file: Path
    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        """Any of the rows, for what all of them share."""
        return next(iter(self.rows.values()))

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """The shape's name, M, H and F/P."""
        row = self.first
        return row["shape"], row["tokens"], row["hidden"], row["ffn_per_rank"]

    @property
    def how(self) -> str:
        """How the step was run, and what was in L2: nothing to tell on a CPU, where it is always the same."""
        run, l2 = self.first["run"], self.first["l2"]
        return f"{RUN_WORDS.get(run, run)}, L2 {l2}" if self.first["device_type"] == "cuda" else ""

    @property
    def step(self) -> str:
        """Forward alone, or forward and backward."""
        return MODE_WORDS[self.first["mode"]]

    @property
    def words(self) -> str:
        """Shape, step, how it was run and activation."""
        first = self.first
        return ", ".join(filter(None, (first["shape"], self.step, self.how, first["activation"])))

    def figure(self, impl: str, field: str) -> float | None:
        """Return a row's figure, None where there is no such row or figure."""
        return self.rows[impl][field] if impl in self.rows else None

    def ratios(self, p: int = 50) -> dict[str, float]:
        """Return peer → its time over ours, a quantile over rounds; those that were timed beside ours."""
        found = {impl: row[f"ratio_p{p}"] for impl, row in self.rows.items() if impl != FUSED}
        return {impl: ratio for impl, ratio in found.items() if ratio is not None}

    def saved_vs_eager(self) -> float | None:
        """Return the bytes that ours keeps for backward over eager's; None: one of them is unknown, or eager's 0."""
        ours, eager = self.figure(FUSED, "saved_bytes"), self.figure(EAGER, "saved_bytes")
        return None if ours is None or not eager else ours / eager


@dataclass(frozen=True)
class Section:
    """What may stand in one table or picture: points of one device, dtype and activation."""

    device: str
    dtype: str
    activation: str
    points: list[Point]

    @cached_property
    def rows(self) -> list[Row]:
        """Every point's rows."""
        return [row for point in self.points for row in point.rows.values()]

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.rows[0]["device_type"] == "cuda"

    @cached_property
    def hows(self) -> list[str]:
        """Every way to run a step, as points say it."""
        return [*dict.fromkeys(point.how for point in self.points)]

    @cached_property
    def modes(self) -> list[str]:
        """The modes, forward first."""
        return [mode for mode in MODES if any(point.first["mode"] == mode for point in self.points)]

    @cached_property
    def peers(self) -> list[str]:
        """Every peer but ours, in the files' order, eager first and the bare GEMMs last."""
        found = dict.fromkeys(row["impl"] for row in self.rows if row["impl"] != FUSED)
        return sorted(found, key=lambda impl: (impl == TWO_GEMMS, impl != EAGER))

    @property
    def words(self) -> str:
        """Device, dtype and activation."""
        return f"{self.device}, {self.dtype}, {self.activation}, with biases"

    @property
    def commits(self) -> str:
        """Every commit that was measured."""
        return ", ".join(dict.fromkeys(tables.commit_of(row) for row in self.rows))

    def at(self, how: str, mode: str) -> list[Point]:
        """Return the points of one way to run a step and one mode."""
        return [point for point in self.points if (point.how, point.first["mode"]) == (how, mode)]


def load(paths: Sequence[Path], regimes: Sequence[str] | None = None) -> list[Section]:
    """Return the sections of these files, in their order; regimes: of these rows alone.

    Raises: ValueError: a file that cannot be read, is not peers.py's, has no rows, or has one row twice; a regime of
    which no file has rows.
    """
    found: dict[tuple[str, str, str], dict[tuple, Point]] = {}
    there: set[str] = set()
    for path in dict.fromkeys(paths):
        for row in _rows_of(path):
            there.add(row["regime"])
            if regimes is not None and row["regime"] not in regimes:
                continue
            section = found.setdefault((row["device"], row["dtype"], row["activation"]), {})
            which = (path, *(row[name] for name in ("shape", "tokens", "hidden", "ffn_per_rank", "mode", "run", "l2")))
            point = section.setdefault(which, Point(path, {}))
            if row["impl"] in point.rows:
                where = "{impl} at {shape}, {mode}, {run}, {l2}".format(**row)
                raise ValueError(f"{path} has two rows of {where}")
            point.rows[row["impl"]] = row
    if missing := sorted({*(regimes or ())} - there):
        raise ValueError(f"no rows of regime {', '.join(missing)}: the files have {', '.join(sorted(there))}")
    return [Section(*key, [*points.values()]) for key, points in found.items()]


def _rows_of(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} was not written by peers.py --json: it is no list of rows")
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        if wrong := _wrong(row):
            raise ValueError(f"{path} was not written by peers.py --json: row {number} {wrong}")
    return rows


def _wrong(row: object) -> str | None:
    """Say what is wrong with a row."""
    if not isinstance(row, dict):
        return "is no object"
    for name, types in FIELDS.items():
        if name not in row:
            return f"has no {name}"
        # JSON's true is no number, though Python's is.
        if not isinstance(row[name], types) or (isinstance(row[name], bool) and bool not in types):
            return f"has {name} {row[name]!r}"
    if row["mode"] not in MODES:
        return f"has mode {row['mode']!r}, which is none of {', '.join(MODES)}"
    return next((f"has {name} {row[name]!r}, not above 0" for name in _POSITIVE if row[name] <= 0), None)


def _not_finite(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no figure")
