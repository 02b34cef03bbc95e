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
    gated     d_gate = (dy @ w2) * up * f'(gate);  d_up = (dy @ w2) * f(gate);  d_pre holds both

A GEMM of linear1 (x @ w1.T, dx, dw1) is 2·M·H·W FLOPs, one of linear2 2·M·H·F/P; element-wise work is not
counted. 2 are forward, 4 backward, and with save="nothing" linear1 once more.

HBM traffic is the minimum of the fused form, one kernel per GEMM and one that sums dy's rows for db2: each
operand is read once and each output written once, in `dtype`. Backward writes `hidden` again because dw2 reads
it (with save="nothing" the recomputed linear1 does); b2 is read by rank 0, which these figures describe. Not
counted: operands read twice because a cache missed, the fp32 partial sums of db1 and db2, the collectives' own
traffic.

A ring all-reduce of N elements cuts them into P chunks, the first N mod P one element longer. Reduce-scatter
and all-gather take P-1 rounds each. Rank r sends every chunk but r+1 in the first and every chunk but r+2 in
the second (mod P): 2N - chunk[r+1] - chunk[r+2] elements; all ranks together send 2(P-1)·N.

Units: bytes, FLOPs and elements, as exact integers; `sent_*` count elements.
Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053) for the partitioning; Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations" (2009) for the ring.
"""

from __future__ import annotations

from math import prod

from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from tpffn_triton.plan_report import Collective, FFNPlan, Gemm, NoCommunication, Reduction, Tensor
from tpffn_triton.validation import SAVE_MODES, check_positive

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def ring_all_reduce(elements: int, world_size: int) -> tuple[int, int, int]:
    """Count a ring all-reduce: (most elements that any rank sends, elements sent by all, rounds)."""
    if world_size == 1:
        return 0, 0, 0
    chunk, longer = divmod(elements, world_size)
    # Only with a single shorter chunk is every pair of neighbouring chunks longer than 2·chunk.
    left_out = 2 * chunk + (longer == world_size - 1)
    return 2 * elements - left_out, 2 * (world_size - 1) * elements, 2 * (world_size - 1)


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
) -> FFNPlan:
    """Plan y = act(x @ w1.T + b1) @ w2.T + b2 over `tp` ranks, column-parallel then row-parallel.

    Raises: TypeError: a size is not an int.
            ValueError: a size below 1, ffn not divisible by tp, unknown dtype, activation or save
            (the message shows the values).
    """
    sizes = {"batch": batch, "seq": seq, "hidden": hidden, "ffn": ffn, "tp": tp}
    for name, size in sizes.items():
        check_positive(name, size)
    if ffn % tp:
        raise ValueError(f"ffn must be divisible by tp, got ffn={ffn}, tp={tp} (remainder {ffn % tp})")
    options = {
        "dtype": (dtype, (*DTYPE_BYTES,)),
        "activation": (activation, ACTIVATIONS),
        "save": (save, SAVE_MODES),
    }
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    gated = activation in GATED_ACTIVATIONS
    tensors = _tensors(batch, seq, hidden, ffn // tp, tp, bias, gated, DTYPE_BYTES[dtype])
    return FFNPlan(
        **sizes,
        dtype=dtype,
        activation=activation,
        bias=bias,
        save=save,
        partitioning="column->row",
        tensors=tuple(tensors.values()),
        gemms=_gemms(tensors, batch * seq, hidden, ffn // tp, save),
        reductions=(
            (Reduction("db2", "backward", "column_sum", ("dy",), ("db2",), tensors["dy"].bytes + tensors["db2"].bytes),)
            if bias
            else ()
        ),
        saved_for_backward=("x", "pre_act") if save == "pre_act" else ("x",),
        saved_by_eager=_saved_by_eager(activation),
        collectives=(_all_reduce("forward", tensors["y"], tp), _all_reduce("backward", tensors["dx"], tp))
        if tp > 1
        else (),
        no_communication=_no_communication(tp, gated),
    )


def _saved_by_eager(activation: str) -> tuple[str, ...]:
    if activation in GATED_ACTIVATIONS:
        # chunk's halves are views of pre_act: f keeps gate, the product keeps f(gate) and up, F.linear hidden.
        return ("x", "pre_act", "gate_act", "hidden")
    # F.relu's backward reads its output, which the second F.linear keeps anyway.
    return ("x", "hidden") if activation == "relu" else ("x", "pre_act", "hidden")


def _tensors(b: int, s: int, h: int, shard: int, tp: int, bias: bool, gated: bool, itemsize: int) -> dict[str, Tensor]:
    """Every tensor of the module docstring by name; `shard` is F/P, `width` W."""
    width = 2 * shard if gated else shard
    both = "this rank's gate, then up features"
    outputs, features = (both, both) if gated else ("this rank's output features", "this rank's features")
    summed = "all-reduced" if tp > 1 else "complete"
    rows: list[tuple[str, tuple[int, ...], str]] = [
        ("x", (b, s, h), "replicated"),
        ("w1", (width, h), f"{outputs}; paper layout {h} x {width}"),
        ("b1", (width,), outputs),
        ("pre_act", (b, s, width), features),
        ("gate_act", (b, s, shard), "stored by eager alone"),
        ("hidden", (b, s, shard), "this rank's features"),
        ("w2", (h, shard), f"this rank's input features; paper layout {shard} x {h}"),
        ("b2", (h,), "replicated, added once"),
        ("partial_y", (b, s, h), "this rank's term of y"),
        ("y", (b, s, h), summed),
        ("dy", (b, s, h), "replicated"),
        ("d_pre", (b, s, width), features),
        ("partial_dx", (b, s, h), "this rank's term of dx"),
        ("dx", (b, s, h), summed),
        ("dw1", (width, h), "as w1"),
        ("db1", (width,), "as b1"),
        ("dw2", (h, shard), "as w2"),
        ("db2", (h,), "same on every rank"),
    ]
    absent = (() if bias else ("b1", "b2", "db1", "db2")) + (() if gated else ("gate_act",))
    return {
        name: Tensor(name, shape, prod(shape), prod(shape) * itemsize, layout)
        for name, shape, layout in rows
        if name not in absent
    }


def _gemms(tensors: dict[str, Tensor], m: int, h: int, shard: int, save: str) -> tuple[Gemm, ...]:
    """The GEMMs in launch order, each with what its kernel reads and writes; `shard` is F/P."""

    def gemm(name: str, pass_: str, kernel: str, formula: str, mnk: tuple[int, int, int], io: str) -> Gemm:
        reads, writes = (tuple(t for t in side.split() if t in tensors) for side in io.split("->"))
        hbm_bytes = sum(tensors[t].bytes for t in reads + writes)
        return Gemm(name, pass_, kernel, formula, *mnk, 2 * prod(mnk), reads, writes, hbm_bytes)

    width, _ = tensors["w1"].shape
    to_width, to_shard = (m, width, h), (m, shard, h)
    kept = save == "pre_act"
    stored, recomputed = ("hidden pre_act", "hidden ") if kept else ("hidden", "")
    again = gemm("linear1_recompute", "backward", "linear_act", "x @ w1.T", to_width, "x w1 b1 -> pre_act hidden")
    return (
        gemm("linear1", "forward", "linear_act", "x @ w1.T", to_width, f"x w1 b1 -> {stored}"),
        gemm("linear2", "forward", "linear", "hidden @ w2.T", (m, h, shard), "hidden w2 b2 -> partial_y"),
        *([] if kept else [again]),
        gemm("d_hidden", "backward", "linear_dact", "dy @ w2", to_shard, f"dy w2 pre_act -> d_pre {recomputed}db1"),
        gemm("dx", "backward", "dgrad", "d_pre @ w1", (m, h, width), "d_pre w1 -> partial_dx"),
        gemm("dw2", "backward", "wgrad", "dy.T @ hidden", (h, shard, m), "dy hidden -> dw2"),
        gemm("dw1", "backward", "wgrad", "d_pre.T @ x", (width, h, m), "d_pre x -> dw1"),
    )


def _all_reduce(pass_: str, tensor: Tensor, tp: int) -> Collective:
    most, total, rounds = ring_all_reduce(tensor.elements, tp)
    itemsize = tensor.bytes // tensor.elements
    return Collective(
        pass_=pass_,
        kind="all_reduce",
        tensor=tensor.name,
        elements=tensor.elements,
        bytes=tensor.bytes,
        sent_per_rank=most,
        sent_total=total,
        sent_total_bytes=total * itemsize,
        rounds=rounds,
        amplification=total / tensor.elements,
    )


def _no_communication(tp: int, gated: bool) -> tuple[NoCommunication, ...]:
    if tp == 1:
        steps = ((p, step) for p in ("forward", "backward") for step in ("linear1", "linear2"))
        return tuple(NoCommunication(*step, "one rank holds every weight") for step in steps)
    made = "gate and up features make" if gated else "output features are"
    linear1 = f"x is replicated, and a rank's {made} the input features of its w2 shard"
    linear2 = "dy is replicated; a rank's d_hidden needs only its w2 shard, its dw2 only its hidden"
    return (NoCommunication("forward", "linear1", linear1), NoCommunication("backward", "linear2", linear2))
