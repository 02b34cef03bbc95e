"""Compare ways to order and to add what ranks exchange: beside or after the GEMMs, by row chunks, in fp32.

`python bench/exchange_bench.py --help` has the flags. What is measured: exchange_measure.py.

Exit status: 0, 1 a rank failed, 2 wrong arguments.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import exchange_plot
import ranks
import tables
import torch
from command_line import OneLineErrorParser, check_plot, check_writable, exit_with, say_written
from exchange_measure import Settings, measure
from workloads import SHAPES

DESCRIPTION = """\
Time, interleaved in one run over P ranks:

  backward    dx's collective in flight behind the weight and bias gradients, against waiting for it at
              once; with an all-reduce, and with sequence parallelism's gathers and reduce-scatter
  forward     y's all-reduce by row chunks, each behind the next chunk's GEMM, against one after the GEMM
  reduction   bf16 partial sums added in fp32, against bf16: forward and backward, and y's error

and record a timeline of one backward in either order. P gloo ranks without GPUs, else NCCL, one GPU each.
"""
EPILOG = """\
figures:
  ms          the slowest rank's; quantiles over interleaved rounds
  exposed ms  computation stood still for a collective, on the rank that waits longest
  ×           the first line's time over this one's, by round: above 1 is faster

examples:
  python bench/exchange_bench.py                                     the analysed model at P=4
  python bench/exchange_bench.py --tp 2 --threads 1                  cores left over for gloo
  python bench/exchange_bench.py --json out.json --trace trace.json --plot timeline.png
  torchrun --nproc-per-node 8 bench/exchange_bench.py --tp 8 --shape large --dtype bf16
"""


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(
        prog="exchange_bench.py",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--shape", choices=[*SHAPES], default="analysed", help="(default: %(default)s)")
    parser.add_argument("--tp", type=int, metavar="P", help="ranks (default: the shape's)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of backward and forward (default: fp32; CUDA: bf16)"
    )
    parser.add_argument("--iters", type=int, metavar="N", help="timed rounds (default: what fits in 15 s, GPU 5 s)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of a rank (default: its part of the cores)"
    )
    parser.add_argument("--quick", action="store_true", help="three rounds; figures are rough")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write rows and timelines")
    parser.add_argument("--trace", type=Path, metavar="PATH", help="write rank 0's trace, for chrome://tracing")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the timelines (.png, .pdf or .svg)")
    return parser


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> Settings:
    """Return what to measure. Raises: ValueError: arguments that do not fit."""
    named = SHAPES[args.shape]
    shape = named if args.tp is None else replace(named, tp=args.tp)
    attached = ranks.attached_world_size()
    if shape.tp < 2:
        raise ValueError(f"--tp must be at least 2, got {shape.tp}: one rank exchanges nothing")
    if attached not in (None, shape.tp):
        raise ValueError(f"torchrun started {attached} ranks: --tp must be {attached}, got {shape.tp}")
    if device_type == "cuda" and attached is None and torch.cuda.device_count() < shape.tp:
        raise ValueError(f"P={shape.tp} needs {shape.tp} GPUs, found {torch.cuda.device_count()}")
    if shape.tokens % shape.tp:
        raise ValueError(f"sequence parallelism cuts B·S = {shape.tokens} tokens into {shape.tp} equal parts")
    for name, value in (("iters", args.iters), ("threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if missing := tables.missing_extras(["tabulate"] + ["matplotlib"] * (args.plot is not None)):
        raise ValueError(missing)
    check_writable(args.json, args.trace, args.plot)
    check_plot(args.plot)
    dtype = args.dtype or ("bf16" if device_type == "cuda" else "fp32")
    trace = None if args.trace is None else str(args.trace.absolute())
    return Settings(shape, dtype, args.iters, args.threads, args.quick, trace, command)


def table(rows: list[dict[str, Any]], timelines: dict[str, Any]) -> str:
    """Return one line a way, and one a timeline."""
    import tabulate

    first = rows[0]
    lines: list[Any] = []
    for number, row in enumerate(rows):
        if number and row["work"] != rows[number - 1]["work"]:
            lines.append(tabulate.SEPARATING_LINE)
        ms = "{ms_p50:.4g} [{ms_p20:.4g}–{ms_p80:.4g}]".format(**row)
        error = "" if row["y_rel_err"] is None else f"{row['y_rel_err']:.2e}"
        times = f"{row['ratio_p50']:.2f} [{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}]"
        lines.append((row["work"], row["way"], row["dtype"], ms, f"{row['comm_ms']:.4g}", times, error))
    body = tabulate.tabulate(
        lines,
        ("work", "way", "dtype", "ms p50 [p20–p80]", "exposed ms", "× first [p20–p80]", "y rel err"),
        disable_numparse=True,
        colalign=("left", "left", "left", *["right"] * 4),
    )
    notes = [
        f"rank 0's timeline, {name}: collectives {t['collective_ms']:.1f} ms, beside weight gradients "
        f"{t['beside_wgrad_ms']:.1f} ms"
        for name, t in timelines.items()
    ]
    if first["device_type"] == "cpu":
        notes.append("Where ranks and gloo's threads fill the cores, what runs beside a GEMM takes its time from it.")
    head = (
        f"{first['shape']}: B={first['batch']} S={first['seq']} H={first['hidden']} F={first['ffn']}, gelu, "
        f"P={first['ranks']} ({first['collectives']}), {first['iters']} rounds\n{first['device']}, "
        f"{first['threads']} of {first['cores']} cores a rank; torch {first['torch']}, commit {first['commit']}"
    )
    return "\n\n".join((head, body, "\n".join(notes)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    try:
        settings = settings_of(args, device_type, command)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would tell of each start and stop
    try:
        result = ranks.run(measure, settings, settings.shape.tp, device_type)
    except ranks.RankFailed as error:
        return parser.failed(error)
    if result is None:  # rank 0 of torchrun reports
        return 0
    print(table(result["rows"], result["timelines"]))
    if args.json:
        tables.write_text(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        exchange_plot.plot(result["timelines"], result["rows"][0], args.plot)
    say_written(args.json, args.trace, args.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
