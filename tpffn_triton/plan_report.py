"""Lay a plan out as text: aligned tables of plain ASCII. What it says: `tpffn_triton.plan`.

Exact numbers, and beside the large ones a rounded form in KiB/MiB/GiB (powers of 1024) or kFLOP/MFLOP/GFLOP (powers of
1000).
"""

from __future__ import annotations

from collections.abc import Sequence

from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan_records import Collective, FFNPlan


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'; at most four digits, powers of 1024."""
    return _human(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def human_flops(count: int) -> str:
    """2147483648 -> '2.147 GFLOP'; at most four digits, powers of 1000."""
    return _human(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def render_text(plan: FFNPlan) -> str:
    """Lay the plan out as aligned tables of plain ASCII; about 110 columns wide at common sizes."""
    totals = plan.totals
    tensor_rows = [(t.name, [*t.shape], t.elements, *_size(t.bytes), t.layout) for t in plan.tensors]
    gemm_rows = [(g.name, g.pass_, g.formula, f"{g.m}, {g.n}, {g.k}", *_work(g.flops)) for g in plan.gemms]
    hbm_rows = [
        (k.kernel, k.name, f"{' '.join(k.reads)} -> {' '.join(k.writes)}", *_size(k.hbm_bytes)) for k in plan.kernels
    ]
    total_rows = [
        (
            pass_,
            *_work(totals[f"flops_{pass_}"]),
            human_flops(totals[f"flops_{pass_}_all_ranks"]),
            *_size(totals[f"hbm_bytes_{pass_}"]),
            f"{totals[f'flops_per_hbm_byte_{pass_}']:.1f}",
        )
        for pass_ in ("forward", "backward")
    ]
    saved = {
        f"this package, save={plan.save}": plan.saved_for_backward,
        "eager F.linear, activation, F.linear": plan.saved_by_eager,
    }
    saved_rows = [(who, ", ".join(names), *_size(plan.bytes_of(names))) for who, names in saved.items()]
    behind = [f"  {o.pass_} {o.tensor}: behind {', '.join(o.behind)}" for o in plan.overlaps]
    none = [f"  {n.pass_} {n.step}: none; {n.why}" for n in plan.no_communication]
    lines = [
        f"Tensor-parallel FFN: {split_of(plan)}",
        *summary(plan),
        *("", "Tensors of one rank (weights in nn.Linear layout)"),
        *align(("tensor", "shape", ">elements", ">bytes", ">", "over the group"), tensor_rows),
        f"  parameters: {_exact_size(totals['parameter_bytes'])} on each rank",
        *("", "GEMMs of one rank, in launch order"),
        *align(("gemm", "pass", "product", "M, N, K", ">FLOPs", ">"), gemm_rows),
        *("", "HBM traffic of one rank: each operand read once, each output written once"),
        *align(("kernel", "for", "reads -> writes", ">bytes", ">"), hbm_rows),
        *("", "Totals"),
        *align(
            ("pass", ">FLOPs, one rank", ">", ">all ranks", ">HBM bytes, one rank", ">", ">FLOPs per byte"),
            total_rows,
        ),
        *("", "Activations kept for backward on each rank"),
        *align(("", "tensors", ">bytes", ">"), saved_rows),
        *("", "Communication", *(line for c in plan.collectives for line in _collective(c, plan.tp)), *behind, *none),
    ]
    return "\n".join(lines)


def split_of(plan: FFNPlan) -> str:
    """Say in words how the layer is split."""
    p = PARTITIONINGS[plan.partitioning]
    sequence = ", activations sequence-parallel" if plan.sequence_parallel else ""
    return f"Linear1 {p.linear1}-parallel, Linear2 {p.linear2}-parallel{sequence}"


def summary(plan: FFNPlan) -> tuple[str, str]:
    """Return two lines of sizes and options."""
    return (
        f"batch B={plan.batch}  seq S={plan.seq}  hidden_size H={plan.hidden}  ffn_hidden_size F={plan.ffn}  "
        f"tp P={plan.tp}",
        f"tokens M=B*S={plan.batch * plan.seq}  F/P={plan.ffn // plan.tp}  dtype {plan.dtype}  "
        f"activation {plan.activation}  bias {'yes' if plan.bias else 'no'}  save {plan.save}",
    )


def _collective(c: Collective, tp: int) -> tuple[str, str]:
    kind, sent = c.kind.replace("_", "-"), f"{c.sent_per_rank} elements sent per rank"
    if c.sent_per_rank * tp != c.sent_total:
        sent = f"at most {sent}"
    return (
        f"  {c.pass_} {kind} of {c.tensor}: {c.elements} elements, {_exact_size(c.bytes)}",
        f"    ring: {c.rounds} rounds, {sent}, {c.sent_total} in all ({human_bytes(c.sent_total_bytes)}), "
        f"{c.amplification:g}x the payload",
    )


def _human(count: int, base: int, units: Sequence[str]) -> str:
    value, unit = float(count), 0
    # Compared as printed: 1023.7 KiB would print as 1024 KiB, so it goes to MiB.
    while unit + 1 < len(units) and float(f"{value:.4g}") >= base:
        value, unit = value / base, unit + 1
    return f"{value:.4g} {units[unit]}"


def _size(count: int) -> tuple[int, str]:
    return count, human_bytes(count)


def _work(flops: int) -> tuple[int, str]:
    return flops, human_flops(flops)


def _exact_size(count: int) -> str:
    return f"{count} bytes" + (f" ({human_bytes(count)})" if count >= 1024 else "")


def align(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Align columns over two spaces; a header that starts with ">" makes its column right-aligned."""
    right = [h.startswith(">") for h in headers]
    cells = [[h.removeprefix(">") for h in headers], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
