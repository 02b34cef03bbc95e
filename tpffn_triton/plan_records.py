"""Hold what `plan.plan_ffn` worked out: the records of a plan, their totals, and a JSON form.

Names, formulas, units and what is counted: see `tpffn_triton.plan`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """One tensor as a rank holds it; `layout` says how it lies over the group."""

    name: str
    shape: tuple[int, ...]
    elements: int
    bytes: int
    layout: str


@dataclass(frozen=True)
class Gemm:
    """One [m, k] × [k, n] product on one rank, and the HBM traffic of the kernel that computes it."""

    name: str
    pass_: str
    kernel: str
    formula: str
    m: int
    n: int
    k: int
    flops: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    hbm_bytes: int


@dataclass(frozen=True)
class MemoryPass:
    """Work that is no GEMM: a sum over tokens, an activation by itself, a copy; and its HBM traffic."""

    name: str
    pass_: str
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    hbm_bytes: int


@dataclass(frozen=True)
class Collective:
    """`elements` and `bytes` are the payload; `sent_per_rank` is the most elements that any rank sends."""

    pass_: str
    kind: str
    tensor: str
    elements: int
    bytes: int
    sent_per_rank: int
    sent_total: int
    sent_total_bytes: int
    rounds: int
    amplification: float


@dataclass(frozen=True)
class Overlap:
    """The collective of `tensor` runs while the kernels named in `behind` do."""

    pass_: str
    tensor: str
    behind: tuple[str, ...]


@dataclass(frozen=True)
class NoCommunication:
    """A step that a reader may expect to communicate, and why it does not."""

    pass_: str
    step: str
    why: str


@dataclass(frozen=True)
class Reason:
    """Why a tensor takes a collective, of this kind, or none; `at` is the tensor."""

    pass_: str
    at: str
    kind: str | None
    why: str


@dataclass(frozen=True)
class FFNPlan:
    """The plan of one layer; `to_dict()` is what `--json` prints. Saved activations exclude parameters; the peaks are
    of everything that is alive at once on a rank."""

    batch: int
    seq: int
    hidden: int
    ffn: int
    tp: int
    dtype: str
    activation: str
    bias: bool
    save: str
    partitioning: str
    sequence_parallel: bool
    tensors: tuple[Tensor, ...]
    gemms: tuple[Gemm, ...]
    memory_passes: tuple[MemoryPass, ...]
    saved_for_backward: tuple[str, ...]
    saved_by_eager: tuple[str, ...]
    collectives: tuple[Collective, ...]
    overlaps: tuple[Overlap, ...]
    no_communication: tuple[NoCommunication, ...]
    reasons: tuple[Reason, ...]
    peak_bytes_forward: int
    peak_bytes_backward: int

    @property
    def kernels(self) -> list[Gemm | MemoryPass]:
        """Everything that a rank launches."""
        return [*self.gemms, *self.memory_passes]

    def bytes_of(self, names: tuple[str, ...]) -> int:
        return sum(t.bytes for t in self.tensors if t.name in names)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the records, per rank where the key does not end in `all_ranks`.

        All are int, but for `flops_per_hbm_byte_*` (arithmetic intensity, float).
        """
        out: dict[str, Any] = {"parameter_bytes": self.bytes_of(("w1", "b1", "w2", "b2"))}
        for pass_ in ("forward", "backward"):
            flops = sum(g.flops for g in self.gemms if g.pass_ == pass_)
            hbm_bytes = sum(k.hbm_bytes for k in self.kernels if k.pass_ == pass_)
            out[f"flops_{pass_}"] = flops
            out[f"flops_{pass_}_all_ranks"] = flops * self.tp
            out[f"hbm_bytes_{pass_}"] = hbm_bytes
            out[f"flops_per_hbm_byte_{pass_}"] = flops / hbm_bytes
        return {
            **out,
            "saved_bytes": self.bytes_of(self.saved_for_backward),
            "saved_bytes_eager": self.bytes_of(self.saved_by_eager),
            "peak_bytes_forward": self.peak_bytes_forward,
            "peak_bytes_backward": self.peak_bytes_backward,
            "sent_all_ranks": sum(c.sent_total for c in self.collectives),
            "sent_bytes_all_ranks": sum(c.sent_total_bytes for c in self.collectives),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the arguments under `inputs`, how the layer is split, every record list, and `totals`."""
        record: dict[str, Any] = asdict(self, dict_factory=_json_object)
        del record["peak_bytes_forward"], record["peak_bytes_backward"]  # among the totals
        names = ("batch", "seq", "hidden", "ffn", "tp", "dtype", "activation", "bias", "save")
        return {"inputs": {name: record.pop(name) for name in names}, **record, "totals": self.totals}


def _json_object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # `pass` is a Python keyword; tuples would come back from JSON as lists, so the dict has lists already.
    return {k.rstrip("_"): list(v) if isinstance(v, tuple) else v for k, v in items}
