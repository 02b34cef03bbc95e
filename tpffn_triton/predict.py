"""Predict a plan's time on a machine: the roofline of each kernel, each collective by its best algorithm.

    pass     = Σ kernels + Σ slowed + Σ exposed
    behind   = min(collective, Σ kernels that it runs behind)     (the plan's `overlaps`; of row chunks, Linear2's)
    exposed  = collective - behind                                in which computation stands still
    slowed   = (1 - overlap) · behind                             by which kernels beside a collective take longer

The collectives are those of a process group, ring and tree, unless told otherwise. Formulas and what they leave out:
cost_model.py. Times are µs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tpffn_triton.cost_model import (
    LIBRARY_ALGORITHMS,
    choices,
    forward_chunks,
    kernel_us,
    linear2_pipeline,
    nodes_needed,
)
from tpffn_triton.machines import Compute, Machine
from tpffn_triton.plan_records import FFNPlan, Gemm, MemoryPass
from tpffn_triton.plan_report import align, human_bytes

PASSES = ("forward", "backward")
LIBRARY_NOTE = "one-shot, two-shot, direct: would take symmetric memory; a process group, so ffn(), runs ring or tree."
# Messages of the table of algorithms.
SIZES = tuple(1 << power for power in range(14, 29, 2))


@dataclass(frozen=True)
class KernelTime:
    """One kernel; `bound` says whether arithmetic or memory decides its time."""

    name: str
    pass_: str
    us: float
    bound: str


@dataclass(frozen=True)
class CollectiveTime:
    """One collective by its best algorithm; what of it nothing hides, and by how much it slows what hides the rest."""

    pass_: str
    kind: str
    tensor: str
    algorithm: str
    us: float
    exposed_us: float
    slowed_us: float


@dataclass(frozen=True)
class Prediction:
    """The predicted times of one layer on one machine; forward_chunks is how many row chunks Linear2 really has."""

    machine: str
    nodes: int
    forward_chunks: int
    kernels: tuple[KernelTime, ...]
    collectives: tuple[CollectiveTime, ...]

    def kernels_us(self, pass_: str) -> float:
        return sum(k.us for k in self.kernels if k.pass_ == pass_)

    def communication_us(self, pass_: str) -> float:
        return sum(c.us for c in self.collectives if c.pass_ == pass_)

    def exposed_us(self, pass_: str) -> float:
        return sum(c.exposed_us for c in self.collectives if c.pass_ == pass_)

    def slowed_us(self, pass_: str) -> float:
        return sum(c.slowed_us for c in self.collectives if c.pass_ == pass_)

    def pass_us(self, pass_: str) -> float:
        return self.kernels_us(pass_) + self.slowed_us(pass_) + self.exposed_us(pass_)

    @property
    def total_us(self) -> float:
        return sum(map(self.pass_us, PASSES))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the records, and under `totals` what they sum up to, by pass."""
        record = asdict(self, dict_factory=lambda items: {k.rstrip("_"): v for k, v in items})
        totals = {
            pass_: {
                "kernels_us": self.kernels_us(pass_),
                "communication_us": self.communication_us(pass_),
                "exposed_us": self.exposed_us(pass_),
                "slowed_us": self.slowed_us(pass_),
                "us": self.pass_us(pass_),
            }
            for pass_ in PASSES
        }
        lists = {name: list(record[name]) for name in ("kernels", "collectives")}
        return {**record, **lists, "totals": {**totals, "us": self.total_us}}


def predict(
    plan: FFNPlan,
    machine: Machine,
    *,
    nodes: int = 1,
    chunks: int | None = 1,
    algorithms: tuple[str, ...] | None = LIBRARY_ALGORITHMS,
) -> Prediction:
    """Predict the plan's forward and backward on `nodes` nodes of a machine.

    chunks       row chunks of Linear2 at most (without sequence parallelism); None: as forward_chunks chooses
    algorithms   the collectives' algorithms to choose from; None: all

    Raises: ValueError: more ranks than the nodes have, and as cost_model.collective_us and kernel_us.
    """
    room = nodes * machine.ranks_per_node
    if plan.tp > room:
        raise ValueError(f"tp={plan.tp} exceeds {room} ranks: nodes={nodes}, ranks_per_node={machine.ranks_per_node}")
    shape = (machine, plan.batch * plan.seq, plan.hidden, plan.ffn // plan.tp, plan.tp, plan.dtype)
    replicated = plan.partitioning == "column_row" and not plan.sequence_parallel
    if chunks is None:
        chunks = 1 if not replicated else forward_chunks(*shape, algorithms=algorithms)
    if chunks < 1:
        raise ValueError(f"forward chunks must be at least 1, got {chunks}")
    if chunks > 1 and not replicated:
        which = "sequence parallelism" if plan.sequence_parallel else plan.partitioning
        raise ValueError(f"forward chunks are for column_row's all-reduce of y: not with {which}, got {chunks}")
    compute = machine.compute(plan.tp)
    kernels = [_kernel_time(kernel, plan.dtype, compute) for kernel in plan.kernels]
    own_us = {(kernel.pass_, kernel.name): kernel.us for kernel in kernels}
    behind = {(o.pass_, o.tensor): sum(own_us[o.pass_, name] for name in o.behind) for o in plan.overlaps}
    pieces, times = 1, []
    for c in plan.collectives:
        best = choices(machine, c.kind, c.bytes, plan.tp, algorithms)[0]
        us, algorithm = best.us, best.algorithm
        beside = min(us, behind.get((c.pass_, c.tensor), 0.0))
        if c.pass_ == "forward" and chunks > 1:
            cut = linear2_pipeline(*shape, chunks, algorithms=algorithms)
            pieces, us, beside, algorithm = cut.chunks, cut.all_reduces_us, cut.beside_us, cut.algorithm
            kernels = [replace(k, us=cut.gemms_us) if k.name == "linear2" and pieces > 1 else k for k in kernels]
        slowed = (1 - compute.overlap) * beside
        times.append(CollectiveTime(c.pass_, c.kind, c.tensor, algorithm, us, us - beside, slowed))
    return Prediction(machine.name, nodes_needed(machine, plan.tp), pieces, tuple(kernels), tuple(times))


def _kernel_time(kernel: Gemm | MemoryPass, dtype: str, compute: Compute) -> KernelTime:
    flops = kernel.flops if isinstance(kernel, Gemm) else 0
    us = kernel_us(compute, dtype, flops, kernel.hbm_bytes)
    memory_us = kernel_us(compute, dtype, 0, kernel.hbm_bytes)
    return KernelTime(kernel.name, kernel.pass_, us, "arithmetic" if us > memory_us else "memory")


def named(c: CollectiveTime, nodes: int) -> str:
    """Say by which algorithm; over several nodes it is the one between them."""
    return c.algorithm if nodes == 1 else f"{c.algorithm} between nodes"


def _of(c: CollectiveTime) -> str:
    return f"{c.kind.replace('_', '-')} of {c.tensor}"


def render_text(prediction: Prediction, plan: FFNPlan, machine: Machine) -> str:
    """Lay the prediction out as aligned tables, with the algorithms' times by message size."""
    kernels = [(k.name, k.pass_, f"{k.us:.1f}", k.bound) for k in prediction.kernels]
    # Where overlap is free, nothing is slowed.
    slowing = any(c.slowed_us for c in prediction.collectives)
    collectives = [
        (_of(c), c.pass_, named(c, prediction.nodes), f"{c.us:.1f}", f"{c.exposed_us:.1f}")
        + ((f"{c.slowed_us:.1f}",) if slowing else ())
        for c in prediction.collectives
    ]
    totals = [
        (
            pass_,
            f"{prediction.kernels_us(pass_):.1f}",
            *((f"{prediction.slowed_us(pass_):.1f}",) if slowing else ()),
            f"{prediction.exposed_us(pass_):.1f}",
            f"{prediction.pass_us(pass_):.1f}",
        )
        for pass_ in PASSES
    ]
    spread = f" on {prediction.nodes} nodes" if prediction.nodes > 1 else ""
    chunks = f", Linear2 in {prediction.forward_chunks} row chunks" if prediction.forward_chunks > 1 else ""
    lines = [
        f"Predicted for {prediction.machine}{spread}{chunks} (a model, not a measurement)",
        *align(("kernel", "pass", ">us", "bound by"), kernels),
    ]
    if collectives:
        headers = ("collective", "pass", "algorithm", ">us", ">exposed us", *([">slows kernels by"] if slowing else []))
        lines += ["", *align(headers, collectives)]
    headers = ("pass", ">kernels us", *([">slowed by us"] if slowing else []), ">exposed us", ">all us")
    lines += ["", *align(headers, totals)]
    for kind in dict.fromkeys(c.kind for c in plan.collectives):
        lines += ["", f"{kind.replace('_', '-')} over {plan.tp} ranks by message size, us; * is the fastest"]
        lines += _by_size(machine, kind, plan.tp)
    if {term.algorithm for term in machine.link.terms} - {*LIBRARY_ALGORITHMS}:
        lines += ["", LIBRARY_NOTE]
    return "\n".join(lines)


def _by_size(machine: Machine, kind: str, world_size: int) -> list[str]:
    columns = [choices(machine, kind, size, world_size) for size in SIZES]
    names = sorted(choice.algorithm for choice in columns[0])
    rows = []
    for name in names:
        cells = []
        for column in columns:
            us = next(choice.us for choice in column if choice.algorithm == name)
            cells.append(f"{us:.1f}{'*' if column[0].algorithm == name else ' '}")
        rows.append((name, *cells))
    return align(("algorithm", *(f">{human_bytes(size)} " for size in SIZES)), rows)
