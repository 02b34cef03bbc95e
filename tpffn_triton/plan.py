"""Work out shapes, FLOPs, bytes and communication of one tensor-parallel FFN layer, without running it.

    B, S  batch, seq; M = B·S tokens    H  hidden_size (`hidden`)    F  ffn_hidden_size (`ffn`)
    P     tp, the world_size of the tensor-parallel group; F is divisible by P
    W     F/P; with a gated activation 2F/P: gate rows of w1 above up rows, gate columns of pre_act before up's

    x, y, dy, dx             [B, S, H]    replicated; partial_y, partial_dx: one rank's term of the sum
    w1, dw1                  [W, H]       column-parallel, nn.Linear layout (on paper: H × W)
    b1, db1                  [W]
    pre_act, d_pre           [B, S, W]
    hidden                   [B, S, F/P]  act(pre_act); gated: f(gate) · up
    gate_act                 [B, S, F/P]  f(gate); gated alone, and of eager alone: no kernel here stores it
    w2, dw2                  [H, F/P]     row-parallel, nn.Linear layout (on paper: F/P × H)
    b2, db2                  [H]          replicated; b2 is added exactly once

    forward   pre_act = x @ w1.T + b1;  hidden = act(pre_act);  y = all_reduce(hidden @ w2.T) + b2
    backward  d_pre = (dy @ w2) * act'(pre_act);  dx = all_reduce(d_pre @ w1)
              dw2 = dy.T @ hidden;  dw1 = d_pre.T @ x
    sequence-parallel: tokens lie as [S, B, ...], and dim 0 of x, y, dy and dx is this rank's S/P; full_x, full_dy,
              partial_y and partial_dx, and what is made from them, have all S
              forward   full_x = all_gather(x), in place of x;  y = reduce_scatter(hidden @ w2.T) + b2
              backward  full_dy = all_gather(dy), full_x = all_gather(x);  dx = reduce_scatter(d_pre @ w1)
              x is kept for backward as the slice; db2 is the sum over this rank's tokens
    gated     d_gate = (dy @ w2) * up * f'(gate);  d_up = (dy @ w2) * f(gate);  d_pre holds both

A GEMM of linear1 (x @ w1.T, dx, dw1) is 2·M·H·W FLOPs, one of linear2 2·M·H·F/P; element-wise work is not
counted. 2 are forward, 4 backward, and with save="nothing" linear1 once more.

HBM traffic is the minimum of the fused form, one kernel per GEMM and one that sums dy's rows for db2: each
operand is read once and each output written once, in `dtype`. Backward writes `hidden` again because dw2 reads
it (with save="nothing" the recomputed linear1 does); b2 is read by rank 0, which these figures describe. Not
counted: operands read twice because a cache missed, the fp32 partial sums of db1 and db2, the collectives' own
traffic.

Communication: plan_communication.py. Units: bytes, FLOPs and elements, as exact integers; `sent_*` count elements.
Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053) for the partitioning.
"""

from __future__ import annotations

from math import prod

from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from tpffn_triton.plan_communication import collectives, no_communication, overlaps
from tpffn_triton.plan_communication import ring_all_reduce as ring_all_reduce
from tpffn_triton.plan_report import FFNPlan, Gemm, Reduction, Tensor
from tpffn_triton.validation import SAVE_MODES, check_positive

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan_ffn(
    batch: int,
    seq: int,
    hidden: int,
    ffn: int,
    tp: int,
    *,
    dtype: str = "fp32",
    activation: str = "gelu",
    bias: bool = True,
    save: str = "pre_act",
    sequence_parallel: bool = False,
) -> FFNPlan:
    """Plan y = act(x @ w1.T + b1) @ w2.T + b2 over `tp` ranks, column-parallel then row-parallel.

    Raises: TypeError: a size is not an int.
            ValueError: a size below 1, ffn not divisible by tp, with sequence_parallel seq not divisible by tp,
            unknown dtype, activation or save (the message shows the values).
    """
    sizes = {"batch": batch, "seq": seq, "hidden": hidden, "ffn": ffn, "tp": tp}
    for name, size in sizes.items():
        check_positive(name, size)
    if ffn % tp:
        raise ValueError(f"ffn must be divisible by tp, got ffn={ffn}, tp={tp} (remainder {ffn % tp})")
    if sequence_parallel and seq % tp:
        raise ValueError(
            f"sequence_parallel: seq must be divisible by tp, got seq={seq}, tp={tp} (remainder {seq % tp})"
        )
    options = {
        "dtype": (dtype, (*DTYPE_BYTES,)),
        "activation": (activation, ACTIVATIONS),
        "save": (save, SAVE_MODES),
    }
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    gated = activation in GATED_ACTIVATIONS
    # One rank holds every token anyway.
    sequence_parallel = sequence_parallel and tp > 1
    tensors = _tensors(batch, seq, hidden, ffn // tp, tp, bias, gated, DTYPE_BYTES[dtype], sequence_parallel)
    return FFNPlan(
        **sizes,
        dtype=dtype,
        activation=activation,
        bias=bias,
        save=save,
        partitioning="column->row",
        sequence_parallel=sequence_parallel,
        tensors=tuple(tensors.values()),
        gemms=_gemms(tensors, batch * seq, hidden, ffn // tp, save, sequence_parallel),
        reductions=(
            (Reduction("db2", "backward", "column_sum", ("dy",), ("db2",), tensors["dy"].bytes + tensors["db2"].bytes),)
            if bias
            else ()
        ),
        saved_for_backward=("x", "pre_act") if save == "pre_act" else ("x",),
        saved_by_eager=_saved_by_eager("full_x" if sequence_parallel else "x", activation),
        collectives=collectives(tensors, tp, sequence_parallel),
        overlaps=overlaps(tp, sequence_parallel, save, bias),
        no_communication=tuple(no_communication(tp, gated, sequence_parallel)),
    )


def _saved_by_eager(x: str, activation: str) -> tuple[str, ...]:
    if activation in GATED_ACTIVATIONS:
        # chunk's halves are views of pre_act: f keeps gate, the product keeps f(gate) and up, F.linear hidden.
        return (x, "pre_act", "gate_act", "hidden")
    # F.relu's backward reads its output, which the second F.linear keeps anyway.
    return (x, "hidden") if activation == "relu" else (x, "pre_act", "hidden")


def _tensors(
    b: int, s: int, h: int, shard: int, tp: int, bias: bool, gated: bool, itemsize: int, sequence_parallel: bool
) -> dict[str, Tensor]:
    """Every tensor of the module docstring by name; `shard` is F/P, `width` W."""
    width = 2 * shard if gated else shard
    both = "this rank's gate, then up features"
    outputs, features = (both, both) if gated else ("this rank's output features", "this rank's features")
    tokens: tuple[int, ...] = (s, b) if sequence_parallel else (b, s)
    own = (s // tp, b, h) if sequence_parallel else (b, s, h)
    given = summed = "this rank's slice of dim 0"
    if not sequence_parallel:
        given, summed = "replicated", "all-reduced" if tp > 1 else "complete"
    db2 = "sum over this rank's tokens" if sequence_parallel else "same on every rank"
    rows: list[tuple[str, tuple[int, ...], str]] = [
        ("x", own, given),
        ("full_x", (*tokens, h), "all-gathered"),
        ("w1", (width, h), f"{outputs}; paper layout {h} x {width}"),
        ("b1", (width,), outputs),
        ("pre_act", (*tokens, width), features),
        ("gate_act", (*tokens, shard), "stored by eager alone"),
        ("hidden", (*tokens, shard), "this rank's features"),
        ("w2", (h, shard), f"this rank's input features; paper layout {shard} x {h}"),
        ("b2", (h,), "replicated, added once"),
        ("partial_y", (*tokens, h), "this rank's term of y"),
        ("y", own, summed),
        ("dy", own, given),
        ("full_dy", (*tokens, h), "all-gathered"),
        ("d_pre", (*tokens, width), features),
        ("partial_dx", (*tokens, h), "this rank's term of dx"),
        ("dx", own, summed),
        ("dw1", (width, h), "as w1"),
        ("db1", (width,), "as b1"),
        ("dw2", (h, shard), "as w2"),
        ("db2", (h,), db2),
    ]
    absent = (() if bias else ("b1", "b2", "db1", "db2")) + (() if gated else ("gate_act",))
    absent += () if sequence_parallel else ("full_x", "full_dy")
    return {
        name: Tensor(name, shape, prod(shape), prod(shape) * itemsize, layout)
        for name, shape, layout in rows
        if name not in absent
    }


def _gemms(
    tensors: dict[str, Tensor], m: int, h: int, shard: int, save: str, sequence_parallel: bool
) -> tuple[Gemm, ...]:
    """The GEMMs in launch order, each with what its kernel reads and writes; `shard` is F/P."""

    def gemm(name: str, pass_: str, kernel: str, formula: str, mnk: tuple[int, int, int], io: str) -> Gemm:
        reads, writes = (tuple(t for t in side.split() if t in tensors) for side in io.split("->"))
        hbm_bytes = sum(tensors[t].bytes for t in reads + writes)
        return Gemm(name, pass_, kernel, formula, *mnk, 2 * prod(mnk), reads, writes, hbm_bytes)

    width, _ = tensors["w1"].shape
    to_width, to_shard = (m, width, h), (m, shard, h)
    kept = save == "pre_act"
    stored, made = ("hidden pre_act", "d_pre hidden db1") if kept else ("hidden", "d_pre db1")
    x, dy = ("full_x", "full_dy") if sequence_parallel else ("x", "dy")
    again = gemm("linear1_recompute", "backward", "linear_act", f"{x} @ w1.T", to_width, f"{x} w1 b1 -> pre_act hidden")
    return (
        gemm("linear1", "forward", "linear_act", f"{x} @ w1.T", to_width, f"{x} w1 b1 -> {stored}"),
        gemm("linear2", "forward", "linear", "hidden @ w2.T", (m, h, shard), "hidden w2 b2 -> partial_y"),
        *([] if kept else [again]),
        gemm("d_hidden", "backward", "linear_dact", f"{dy} @ w2", to_shard, f"{dy} w2 pre_act -> {made}"),
        gemm("dx", "backward", "dgrad", "d_pre @ w1", (m, h, width), "d_pre w1 -> partial_dx"),
        gemm("dw2", "backward", "wgrad", f"{dy}.T @ hidden", (h, shard, m), f"{dy} hidden -> dw2"),
        gemm("dw1", "backward", "wgrad", f"d_pre.T @ {x}", (width, h, m), f"d_pre {x} -> dw1"),
    )
