"""Describe a machine to the cost model: what one rank computes, and what the links between ranks carry.

    Compute   tflops        dense TFLOP/s, by dtype
              tb_per_s      TB/s of device memory, reads plus writes
              launch_us     µs from one kernel to the next
              overlap       share of a collective that can run beside kernels without slowing them, 0 to 1
    AlphaBeta base_us       µs, once a collective
              alpha_us      µs, each round
              gb_per_s      GB/s that a rank sends (and receives at the same time); 1 GB is 10⁹ bytes
    Link      terms         one AlphaBeta for each algorithm, or several of which the fastest counts (protocols)
    Machine   computes      one Compute, or one for each number of ranks that it was measured with
              link, network within a node, and between nodes (None: there is one node)

All are hashable. What the figures are worth is in each `source`; presets are in presets.py, formulas in cost_model.py.

A machine file is JSON: {"schema": "tpffn_triton.machine/1", "machine": {...}}, with the fields of these classes and
whatever else beside `machine`. `bench/comm_bench.py` writes one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = "tpffn_triton.machine/1"
ALGORITHMS = {
    "all_reduce": ("ring", "tree", "one-shot", "two-shot"),
    "all_gather": ("ring", "direct"),
    "reduce_scatter": ("ring", "direct"),
}
# tf32: fp32 tensors whose GEMMs use TF32 tensor cores.
ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_MOST_BYTES = 1 << 24  # of a machine file


@dataclass(frozen=True)
class Compute:
    """What one rank reaches at best; `tflops` holds (dtype, TFLOP/s) pairs.

    world_size   the number of ranks it was measured with, all busy; 0 for any

    Raises: ValueError: a figure out of range, or an unknown dtype.
    """

    tflops: tuple[tuple[str, float], ...]
    tb_per_s: float
    launch_us: float
    overlap: float
    source: str
    world_size: int = 0

    def __post_init__(self) -> None:
        for dtype, value in self.tflops:
            if dtype not in ITEMSIZE:
                raise ValueError(f"tflops has unknown dtype {dtype!r}: one of {', '.join(ITEMSIZE)}")
            _check_number(f"tflops of {dtype}", value, 1e-6, 1e6)
        _check_number("tb_per_s", self.tb_per_s, 1e-6, 1e4)
        _check_number("launch_us", self.launch_us, 0, 1e7)
        _check_number("overlap", self.overlap, 0, 1)
        _check_whole("world_size", self.world_size, 0, 1 << 20)

    def rate(self, dtype: str) -> float:
        """Return TFLOP/s. Raises: ValueError: not known for this dtype."""
        rates = dict(self.tflops)
        if dtype not in rates:
            raise ValueError(f"no TFLOP/s of {dtype!r} known ({self.source}): only of {', '.join(rates) or 'nothing'}")
        return rates[dtype]


@dataclass(frozen=True)
class AlphaBeta:
    """Cost of one algorithm: base_us + rounds · alpha_us + bytes that a rank sends / gb_per_s.

    kind         the collective it is for; "" for all that have this algorithm
    world_size   the number of ranks it was fitted at; 0 for any

    Raises: ValueError: a figure out of range, or an unknown kind or algorithm.
    """

    algorithm: str
    base_us: float
    alpha_us: float
    gb_per_s: float
    source: str
    kind: str = ""
    world_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("", *ALGORITHMS):
            raise ValueError(f"unknown kind {self.kind!r}: one of {', '.join(ALGORITHMS)}, or empty for all")
        known = [name for kind, names in ALGORITHMS.items() if self.kind in ("", kind) for name in names]
        if self.algorithm not in known:
            raise ValueError(f"unknown algorithm {self.algorithm!r}: one of {', '.join(dict.fromkeys(known))}")
        _check_number("base_us", self.base_us, 0, 1e7)
        _check_number("alpha_us", self.alpha_us, 0, 1e7)
        _check_number("gb_per_s", self.gb_per_s, 1e-6, 1e6)
        _check_whole("world_size", self.world_size, 0, 1 << 20)


@dataclass(frozen=True)
class Link:
    """What connects ranks. Raises: ValueError: no terms."""

    name: str
    terms: tuple[AlphaBeta, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"link {self.name!r} has no terms")


@dataclass(frozen=True)
class Machine:
    """One or more nodes of `ranks_per_node` ranks; see the module docstring.

    Raises: ValueError: no computes, or ranks_per_node out of range.
    """

    name: str
    computes: tuple[Compute, ...]
    link: Link
    network: Link | None
    ranks_per_node: int

    def __post_init__(self) -> None:
        if not self.computes:
            raise ValueError(f"machine {self.name!r} has no computes")
        _check_whole("ranks_per_node", self.ranks_per_node, 1, 1 << 20)

    def __hash__(self) -> int:
        # ffn() looks a machine up at every call; a hash over all constants would cost it 20 µs.
        return hash((self.name, self.ranks_per_node))

    def compute(self, world_size: int) -> Compute:
        """Return what each of world_size ranks computes."""
        return measured_at(self.computes, world_size)[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as a machine file holds it."""
        return {"schema": SCHEMA, "machine": asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Machine:
        """Return the machine of a machine file's content. Raises: ValueError: it breaks the schema."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a machine file: schema must be {SCHEMA!r}, got {found!r}")
        given = _fields(Machine, data.get("machine"), "machine")
        computes = _list(given.pop("computes"), "machine.computes")
        network = given.pop("network")
        return cls(
            computes=tuple(_compute(data, f"machine.computes[{n}]") for n, data in enumerate(computes)),
            link=_link(given.pop("link"), "machine.link"),
            network=None if network is None else _link(network, "machine.network"),
            **given,
        )

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Return the machine of a file. Raises: ValueError: unreadable, no JSON, or it breaks the schema."""
        try:
            with Path(path).open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise ValueError(f"longer than {_MOST_BYTES} bytes")
            return cls.from_dict(json.loads(content))
        except OSError as error:
            raise ValueError(f"cannot read machine file {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"machine file {path}: {error}") from None


_T = TypeVar("_T", Compute, AlphaBeta)


def measured_at(records: Sequence[_T], world_size: int) -> list[_T]:
    """Return those that hold for any number of ranks, and of the measured ones those with the most ranks up to
    world_size, or else with the fewest."""
    measured = sorted({record.world_size for record in records if record.world_size})
    nearest = max([p for p in measured if p <= world_size] or measured[:1] or [0])
    return [record for record in records if record.world_size in (0, nearest)]


def _compute(data: Any, where: str) -> Compute:
    given = _fields(Compute, data, where)
    rates = _list(given.pop("tflops"), f"{where}.tflops")
    for pair in rates:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"{where}.tflops must hold [dtype, TFLOP/s], got {pair!r}")
    return Compute(tflops=tuple((dtype, rate) for dtype, rate in rates), **given)


def _link(data: Any, where: str) -> Link:
    given = _fields(Link, data, where)
    terms = _list(given.pop("terms"), f"{where}.terms")
    return Link(
        terms=tuple(AlphaBeta(**_fields(AlphaBeta, t, f"{where}.terms[{n}]")) for n, t in enumerate(terms)), **given
    )


def _fields(cls: Any, data: Any, where: str) -> dict[str, Any]:
    """Return data's entries, which must be exactly cls's fields; those annotated as text must be text."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    names = [field.name for field in fields(cls)]
    if missing := [name for name in names if name not in data]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := [name for name in data if name not in names]:
        raise ValueError(f"{where} has unknown {', '.join(map(str, unknown))}")
    for field in fields(cls):
        if field.type == "str" and not isinstance(data[field.name], str):
            raise ValueError(f"{where}.{field.name} must be a string, got {data[field.name]!r}")
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError(f"{where} must be a list, got {type(data).__name__}")
    return data


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
