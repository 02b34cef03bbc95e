"""Work out shapes, FLOPs, bytes and communication of one tensor-parallel FFN layer, without running it.

    B, S  batch, seq; M = B·S tokens    H  hidden_size (`hidden`)    F  ffn_hidden_size (`ffn`)
    P     tp, the world_size of the tensor-parallel group, which divides what is cut: F, in other partitionings H
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
    so it is column_row; what the other partitionings cut and exchange: partitionings.py, plan_schedule.py
    sequence-parallel: tokens lie as [S, B, ...], and dim 0 of x, y, dy and dx is this rank's S/P; full_x, full_dy,
              partial_y and partial_dx, and what is made from them, have all S
              forward   full_x = all_gather(x), in place of x;  y = reduce_scatter(hidden @ w2.T) + b2
              backward  full_dy = all_gather(dy), full_x = all_gather(x);  dx = reduce_scatter(d_pre @ w1)
              x is kept for backward as the slice; db2 is the sum over this rank's tokens
    gated     d_gate = (dy @ w2) * up * f'(gate);  d_up = (dy @ w2) * f(gate);  d_pre holds both

A GEMM of linear1 (x @ w1.T, dx, dw1) is 2·M·H·W FLOPs, one of linear2 2·M·H·F/P, in every partitioning; element-wise
work is not counted. 2 are forward, 4 backward, and with save="nothing" linear1 once more.

HBM traffic is the minimum of every GEMM and every pass over memory (the sums for db1 and db2; in some partitionings
bias, activation and copies by themselves): each operand is read once and each output written once, in `dtype`, but the
partial sums of db1 in fp32. Backward writes `hidden` again because dw2 reads it (with save="nothing" the recomputed
linear1 does); b2 is read by rank 0, which these figures describe. Not counted: operands read twice because a cache
missed, the fp32 partial sums of db2, the collectives' own traffic.

Peak memory: the most that is alive at once on a rank, parameters, gradients, x and dy included (plan_schedule.py).
Communication: plan_communication.py. Units: bytes, FLOPs and elements, as exact integers; `sent_*` count elements.
Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053) for the partitioning.
"""

from __future__ import annotations

from math import prod

from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS
from tpffn_triton.partitionings import KEEP, PARTITIONINGS, Partitioning
from tpffn_triton.plan_communication import collectives, no_communication, overlaps, reasons
from tpffn_triton.plan_communication import ring_all_reduce as ring_all_reduce
from tpffn_triton.plan_records import FFNPlan, Gemm, MemoryPass, Tensor
from tpffn_triton.plan_schedule import Operation, peak_bytes, schedule
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
    partitioning: str = "column_row",
) -> FFNPlan:
    """Plan y = act(x @ w1.T + b1) @ w2.T + b2 over `tp` ranks; save and sequence_parallel are for column_row.

    Raises: TypeError: a size is not an int.
            ValueError: a size below 1, one that is cut and not divisible by tp, with sequence_parallel seq not
            divisible by tp, unknown dtype, activation, save or partitioning, or one that save or sequence_parallel is
            not for (the message shows the values).
    """
    sizes = {"batch": batch, "seq": seq, "hidden": hidden, "ffn": ffn, "tp": tp}
    for name, size in sizes.items():
        check_positive(name, size)
    options = {
        "dtype": (dtype, (*DTYPE_BYTES,)),
        "activation": (activation, ACTIVATIONS),
        "save": (save, SAVE_MODES),
        "partitioning": (partitioning, (*PARTITIONINGS,)),
    }
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    _check_fit(PARTITIONINGS[partitioning], seq, hidden, ffn, tp, sequence_parallel, save)
    p = PARTITIONINGS[partitioning if tp > 1 else "column_row"]  # one rank has everything anyway
    gated = activation in GATED_ACTIVATIONS
    sequence_parallel = sequence_parallel and tp > 1
    absent = (() if bias else ("b1", "b2", "db1", "db1_partial", "db2")) + (() if gated else ("gate_act",))
    operations = schedule(p, tp, save=save, sequence_parallel=sequence_parallel, gated=gated, absent=absent)
    named = {"x", "y", "dy", "gate_act", *(name for op in operations for name in (*op.reads, *op.writes))}
    every = _tensors(p, batch, seq, hidden, ffn, tp, gated, DTYPE_BYTES[dtype], sequence_parallel)
    tensors = {t.name: t for t in every if t.name in named and t.name not in absent}
    input1 = "full_x" if sequence_parallel else "x" if p.linear1 == "column" else "own_x"
    kept = ("x" if sequence_parallel else input1,) + (("pre_act",) if save == "pre_act" else ())
    kept += ("full_hidden",) if "full_hidden" in tensors else ()
    nbytes = {name: t.bytes for name, t in tensors.items()}
    why = tuple(reasons(p, sequence_parallel))
    return FFNPlan(
        **sizes,
        dtype=dtype,
        activation=activation,
        bias=bias,
        save=save,
        partitioning=partitioning,
        sequence_parallel=sequence_parallel,
        tensors=tuple(tensors.values()),
        gemms=tuple(_gemm(op, tensors, batch * seq) for op in operations if op.formula),
        memory_passes=tuple(
            MemoryPass(op.name, op.pass_, op.kernel, op.reads, op.writes, _hbm_bytes(op, tensors))
            for op in operations
            if not op.formula and not op.is_collective
        ),
        saved_for_backward=kept,
        saved_by_eager=_saved_by_eager(input1, activation, "full_hidden" if "full_hidden" in tensors else "hidden"),
        collectives=tuple(collectives(operations, tensors, tp)),
        overlaps=tuple(overlaps(operations)),
        no_communication=tuple(no_communication(why, tp)),
        reasons=why if tp > 1 else (),
        peak_bytes_forward=peak_bytes(operations, nbytes, kept, "forward"),
        peak_bytes_backward=peak_bytes(operations, nbytes, kept, "backward"),
    )


def _check_fit(p: Partitioning, seq: int, hidden: int, ffn: int, tp: int, sequence_parallel: bool, save: str) -> None:
    for name in p.cut_sizes:
        size = {"hidden_size": hidden, "ffn_hidden_size": ffn}[name]
        short = name.split("_")[0]
        if size % tp:
            which = "" if p.name == "column_row" else f"; {p.name} cuts it"
            raise ValueError(
                f"{short} must be divisible by tp, got {short}={size}, tp={tp} (remainder {size % tp}){which}"
            )
    if sequence_parallel and seq % tp:
        raise ValueError(
            f"sequence_parallel: seq must be divisible by tp, got seq={seq}, tp={tp} (remainder {seq % tp})"
        )
    if p.name != "column_row" and (sequence_parallel or save != "pre_act"):
        raise ValueError(
            f"sequence_parallel and save are for column_row: got partitioning={p.name!r}, "
            f"sequence_parallel={sequence_parallel}, save={save!r}"
        )


def _saved_by_eager(x: str, activation: str, input2: str) -> tuple[str, ...]:
    if activation in GATED_ACTIVATIONS:
        # chunk's halves are views of pre_act: f keeps gate, the product keeps f(gate) and up, F.linear its input.
        return (x, "pre_act", "gate_act", input2)
    # F.relu's backward reads its output, which the second F.linear may keep anyway.
    return tuple(dict.fromkeys((x, "hidden" if activation == "relu" else "pre_act", input2)))


def _hbm_bytes(op: Operation, tensors: dict[str, Tensor]) -> int:
    # A copy of a rank's own features reads no more than it writes.
    read = op.writes if op.kernel == "copy" else op.reads
    return sum(tensors[name].bytes for name in (*read, *op.writes) if name != "gate_act")


def _gemm(op: Operation, tensors: dict[str, Tensor], m: int) -> Gemm:
    weight = tensors["w1" if "w1" in op.reads or "dw1" in op.writes else "w2"]
    out_features, in_features = weight.shape
    mnk = {
        "linear_act": (m, out_features, in_features),
        "linear": (m, out_features, in_features),
        "linear_dact": (m, in_features, out_features),
        "dgrad": (m, in_features, out_features),
        "wgrad": (out_features, in_features, m),
    }[op.kernel]
    hbm_bytes = _hbm_bytes(op, tensors)
    return Gemm(op.name, op.pass_, op.kernel, op.formula, *mnk, 2 * prod(mnk), op.reads, op.writes, hbm_bytes)


def _tensors(
    p: Partitioning, b: int, s: int, h: int, f: int, tp: int, gated: bool, itemsize: int, sequence_parallel: bool
) -> list[Tensor]:
    """Every tensor of any layer with this partitioning."""
    halves = 2 if gated else 1
    shards = p.shard_shapes(h, f, tp, halves)
    tokens: tuple[int, ...] = (s, b) if sequence_parallel else (b, s)
    slices = (s // tp, b, h) if sequence_parallel else (b, s, h)
    # Features of a rank between the linears.
    part = 1 if p.cuts["b1"] is None else tp
    given = summed = "this rank's slice of dim 0"
    if not sequence_parallel:
        given, summed = "replicated", "complete" if tp == 1 else "all-reduced"
    gathered = "all-gathered" if tp > 1 else "complete"
    columns, rows = "this rank's output features", "this rank's input features"
    both = "this rank's gate, then up features"
    own_pre = "every feature" if part < tp else both if gated else "this rank's features"
    own_hidden = "every feature" if part < tp else "this rank's features"
    term, by_rank = "this rank's term of {}", "features by rank, as a collective takes them"
    paper = f"paper layout {shards['w1'][1]} x {shards['w1'][0]}", f"paper layout {shards['w2'][1]} x {shards['w2'][0]}"
    layout = {
        "w1": f"{rows if p.linear1 == 'row' else both if gated else columns}; {paper[0]}",
        "w2": f"{rows if p.linear2 == 'row' else columns}; {paper[1]}",
    }
    db2 = "as b2" if p.cuts["b2"] == 0 else "sum over this rank's tokens" if sequence_parallel else "same on every rank"
    m = b * s
    named: list[tuple[str, tuple[int, ...], str]] = [
        ("x", slices, given),
        ("full_x", (*tokens, h), "all-gathered"),
        ("own_x", (*tokens, h // tp), "this rank's features of x"),
        ("w1", shards["w1"], layout["w1"]),
        ("b1", shards["b1"], own_pre.replace("every feature", "replicated")),
        ("partial_pre_act", (*tokens, halves * f), term.format("every feature")),
        ("pre_act_by_rank", (tp, m, halves * f // tp), by_rank),
        ("pre_act", (*tokens, halves * f // part), own_pre),
        ("gate_act", (*tokens, f // part), "scratch of dact" if p.hidden != KEEP else "stored by eager alone"),
        ("hidden", (*tokens, f // part), own_hidden),
        ("full_hidden_by_rank", (tp, m, f // tp), by_rank),
        ("full_hidden", (*tokens, f), "all-gathered"),
        ("w2", shards["w2"], layout["w2"]),
        ("b2", shards["b2"], columns if p.cuts["b2"] == 0 else "replicated, added once"),
        ("partial_y", (*tokens, h), term.format("y")),
        ("own_y", (*tokens, h // tp), "this rank's features of y"),
        ("y_by_rank", (tp, m, h // tp), by_rank),
        ("y", slices, summed if p.linear2 == "row" else gathered),
        ("dy", slices, given),
        ("full_dy", (*tokens, h), "all-gathered"),
        ("own_dy", (*tokens, h // tp), "this rank's features of dy"),
        ("partial_d_hidden", (*tokens, f), term.format("every feature")),
        ("d_hidden_by_rank", (tp, m, f // tp), by_rank),
        ("d_hidden", (*tokens, f // part), own_hidden),
        ("d_pre", (*tokens, halves * f // part), own_pre),
        ("db1_partial", (-(-m // PARTIAL_ROWS), halves * f // part), f"fp32 sums of d_pre over {PARTIAL_ROWS} tokens"),
        ("full_d_pre_by_rank", (tp, m, halves * f // tp), by_rank),
        ("full_d_pre", (*tokens, halves * f), "all-gathered"),
        ("partial_dx", (*tokens, h), term.format("dx")),
        ("own_dx", (*tokens, h // tp), "this rank's features of dx"),
        ("dx_by_rank", (tp, m, h // tp), by_rank),
        ("dx", slices, summed if p.linear1 == "column" else gathered),
        ("dw1", shards["w1"], "as w1"),
        ("db1", shards["b1"], "as b1" if p.cuts["b1"] == 0 else "same on every rank"),
        ("dw2", shards["w2"], "as w2"),
        ("db2", shards["b2"], db2),
    ]
    sizes = {"db1_partial": DTYPE_BYTES["fp32"]}
    return [Tensor(name, shape, prod(shape), prod(shape) * sizes.get(name, itemsize), at) for name, shape, at in named]
