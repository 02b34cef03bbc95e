"""Compare the fused tensor-parallel FFN with three separate torch operations, sharded over P ranks.

`python bench/ffn_bench.py --help` has the flags. What every figure means stands where it is made: measure.py
(rows), timing.py (clocks), memory.py, environment.py (ceilings), workloads.py (data), implementations.py.

Exit status: 0, 1 an implementation was wrong or a rank failed, 2 wrong arguments.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import checkout  # noqa: F401
import ranks
import tables
import torch
from command_line import (
    OneLineErrorParser,
    add_sizes,
    check_plot,
    check_writable,
    exit_with,
    given_sizes,
    names,
    say_written,
)
from implementations import IMPLEMENTATIONS, chosen
from measure import Settings, measure
from plot import plot
from workloads import DTYPES, MODES, SHAPES, Shape

from tpffn_triton.kernels.activations import ACTIVATIONS

DESCRIPTION = """\
Time the tensor-parallel FFN, forward and forward+backward, against three separate torch operations.

  GPUs              ranks
  none              P gloo processes on the CPU, started here; each gets its part of the cores
  P or more         P NCCL processes, one GPU each, started here
  fewer than P      one process times one rank's shard; communication is not in the figures
  under torchrun    the processes it started; WORLD_SIZE must be P

Every implementation is first compared with fp64; a wrong one is not timed. Rounds interleave them.
"""
_NAMED = "\n".join(
    f"  {s.name:16}M={s.tokens} (B={s.batch} S={s.seq}) H={s.hidden} F={s.ffn} P={s.tp}" for s in SHAPES.values()
)
_IMPLS = "\n".join(f"  {i.name:16}{i.summary}" for i in IMPLEMENTATIONS.values())
EPILOG = f"""\
shapes:
{_NAMED}

implementations:
{_IMPLS}

figures:
  ms              one step, the slowest rank's; quantiles over interleaved rounds
                  CUDA: L2 is cold, the host's launches count (with --graph they do not)
  comm ms         part of ms in which computation stood still for a collective, on the rank that waits
                  longest (least); compute ms: the rest of p50
  TFLOP/s         one rank's GEMM FLOPs over ms; roofline: least possible time on this GPU over ms
  peak MiB        what a step needs beyond its inputs: CUDA allocator, or the process's resident set
  × Megatron      Megatron-Core's time over this one's
  rel err         ‖out − ref‖ / ‖ref‖ against fp64, the worst of y and the gradients on any rank

examples:
  python bench/ffn_bench.py                                  the analysed model, on 4 cores in about a minute
  python bench/ffn_bench.py --quick                          the same in seconds, with three rounds
  python bench/ffn_bench.py --mode fwd_bwd --json out.json --csv out.csv --plot out.png
  python bench/ffn_bench.py --shapes analysed,decode,medium,large --dtype bf16 --graph      on a GPU
  python bench/ffn_bench.py --batch 4 --seq 512 --hidden 2048 --ffn 8192 --tp 2 --activation swiglu
  python bench/ffn_bench.py --sequence-parallel --mode fwd_bwd
  python bench/ffn_bench.py --activation gelu_tanh --impl megatron,megatron-fused,fused    needs megatron-core
  CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc-per-node 4 bench/ffn_bench.py --tp 4     as Megatron-Core asks for
  torchrun --nproc-per-node 4 bench/ffn_bench.py --tp 4
"""


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    analysed = SHAPES["analysed"]
    parser = OneLineErrorParser(
        prog="ffn_bench.py",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    what = parser.add_argument_group("what to measure")
    add_sizes(what, vars(analysed))
    what.add_argument("--tp", type=int, metavar="P", help=f"ranks (default: {analysed.tp}, or the named shape's)")
    what.add_argument("--shapes", metavar="NAME,...", help="named shapes, below, in place of sizes")
    what.add_argument(
        "--dtype",
        metavar="NAME,...",
        help=f"of {', '.join(DTYPES)} (default: fp32 on CPU, bf16 on CUDA); tf32: fp32 tensors, TF32 GEMMs, CUDA only",
    )
    what.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="default: %(default)s (erf)")
    what.add_argument("--sequence-parallel", action="store_true", help="x and y are each rank's part of the tokens")
    what.add_argument("--mode", choices=MODES, help="forward alone, or forward and backward (default: both)")
    what.add_argument("--impl", default="all", metavar="NAME,...", help="default: all that exist here")
    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=int, metavar="N", help="timed rounds (default: what fits in 15 s, GPU 5 s)")
    how.add_argument("--graph", action="store_true", help="replay CUDA graphs: GPU time without the host's launches")
    how.add_argument("--quick", action="store_true", help="few rounds and little warm-up; figures are rough")
    out = parser.add_argument_group("where to (besides the table on stdout; progress is on stderr)")
    out.add_argument("--json", type=Path, metavar="PATH", help="write a list of objects, one a row")
    out.add_argument("--csv", type=Path, metavar="PATH", help="write the same as CSV")
    out.add_argument("--plot", type=Path, metavar="PATH", help="write a bar chart (.png, .pdf or .svg)")
    return parser


def _shapes(args: argparse.Namespace) -> tuple[Shape, ...]:
    sizes = given_sizes(args)
    tp = {} if args.tp is None else {"tp": args.tp}
    if args.shapes is None:
        shape = replace(SHAPES["analysed"], **sizes, **tp)
        named = [s for s in SHAPES.values() if replace(s, name=shape.name) == shape]
        name = named[0].name if named else f"{shape.batch}x{shape.seq}x{shape.hidden}x{shape.ffn}"
        return (replace(shape, name=name),)
    if sizes:
        raise ValueError(f"--shapes names the sizes: it cannot go with --{next(iter(sizes))}")
    return tuple(replace(SHAPES[name], **tp) for name in names(args.shapes, list(SHAPES), "shape"))


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> list[Settings]:
    """Return what to measure, one Settings for each P. Raises: ValueError: arguments that do not fit."""
    shapes = _shapes(args)
    default_dtype = "bf16" if device_type == "cuda" else "fp32"
    dtypes = names(args.dtype or default_dtype, list(DTYPES), "dtype")
    impls = None if args.impl == "all" else names(args.impl, list(IMPLEMENTATIONS), "implementation")
    if args.iters is not None and args.iters < 1:
        raise ValueError(f"--iters must be at least 1, got {args.iters}")
    if device_type != "cuda" and args.graph:
        raise ValueError("--graph needs a CUDA device")
    if device_type != "cuda" and "tf32" in dtypes:
        raise ValueError("dtype tf32 needs a CUDA device")
    for dtype in dtypes if impls else ():
        chosen(impls, device_type, dtype)
    attached = ranks.attached_world_size()
    for shape in shapes:
        if attached not in (None, shape.tp):
            raise ValueError(
                f"torchrun started {attached} ranks, but {shape.name} has tp {shape.tp}: give --tp {attached}"
            )
    one_shard = [s for s in shapes if device_type == "cuda" and attached is None and torch.cuda.device_count() < s.tp]
    for shape in shapes if args.sequence_parallel else ():
        if shape.tokens % shape.tp:
            raise ValueError(f"--sequence-parallel cuts B·S = {shape.tokens} tokens into {shape.tp} equal parts")
        if shape in one_shard:
            raise ValueError(f"--sequence-parallel needs {shape.tp} ranks: one rank's shard alone exchanges nothing")
    if missing := tables.missing_extras(["tabulate"] + ["matplotlib"] * (args.plot is not None)):
        raise ValueError(missing)
    check_writable(args.json, args.csv, args.plot)
    check_plot(args.plot)
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    if device_type == "cuda" and attached is not None and gpus < ranks.local_world_size():
        raise ValueError(
            f"torchrun started {ranks.local_world_size()} ranks on a host with {gpus} GPUs, and NCCL refuses "
            "two ranks on one GPU; without torchrun one rank's shard is timed"
        )
    return [
        Settings(
            shapes=tuple(shape for shape in shapes if shape.tp == tp),
            dtypes=dtypes,
            modes=(args.mode,) if args.mode else MODES,
            impls=impls,
            activation=args.activation,
            sequence_parallel=args.sequence_parallel,
            rounds=args.iters,
            graph=args.graph,
            quick=args.quick,
            one_shard=any(shape.tp == tp for shape in one_shard),
            command=command,
        )
        for tp in dict.fromkeys(shape.tp for shape in shapes)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    try:
        wanted = settings_of(args, device_type, command)
    except ValueError as error:
        parser.error(str(error))
    rows, refused = [], []
    try:
        for settings in wanted:
            world_size = 1 if settings.one_shard else settings.shapes[0].tp
            result = ranks.run(measure, settings, world_size, device_type)
            if result is None:  # rank 0 of torchrun reports
                return 0
            rows += result["rows"]
            refused += result["refused"]
    except ranks.RankFailed as error:
        return parser.failed(error)
    print(tables.table(rows, refused))
    if args.json:
        tables.write_json(rows, args.json)
    if args.csv:
        tables.write_csv(rows, args.csv)
    if args.plot and rows:
        plot(rows, args.plot)
    say_written(args.json, args.csv, args.plot)
    return 1 if refused else 0


if __name__ == "__main__":
    exit_with(main)
