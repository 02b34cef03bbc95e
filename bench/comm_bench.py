"""Measure collectives, GEMMs and memory on the machine at hand, and fit the machine that the cost model predicts with.

`python bench/comm_bench.py --help` has the flags. What is measured: comm_measure.py; how it is fitted: comm_fit.py.

Exit status: 0, 1 a rank failed or the times cannot be fitted, 2 wrong arguments.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import comm_plot
import ranks
import tables
import torch
from comm_fit import fit_machine
from comm_measure import Settings, measure
from command_line import OneLineErrorParser, check_plot, check_writable, exit_with, names, numbers, say_written
from workloads import DTYPES

from tpffn_triton.machines import Machine

DESCRIPTION = """\
Measure all-reduce, all-gather and reduce-scatter over message sizes, the rate of the package's GEMMs and
the bandwidth of memory, with every rank busy; fit α (µs a round) and β (GB/s) for each collective and P.

Without a GPU the ranks are gloo processes started here; with GPUs NCCL processes, one GPU each; under
torchrun the processes it started. P=1 measures what a rank computes alone.
"""
EPILOG = """\
examples:
  python bench/comm_bench.py                                       P = 1, 2 and 4, about two minutes on 4 cores
  python bench/comm_bench.py --quick --tp 2                        seconds; figures are rough
  python bench/comm_bench.py --tp 1,2,4 --json here.json --plot here.png
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --machine here.json
  torchrun --nproc-per-node 8 bench/comm_bench.py --tp 8 --json nccl.json
"""


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(
        prog="comm_bench.py",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--tp", metavar="P,...", help="default: 1,2,4, or powers of two up to the number of GPUs")
    parser.add_argument(
        "--dtype", metavar="NAME,...", help=f"of the GEMMs, of {', '.join(DTYPES)} (default: fp32,bf16; CUDA: all)"
    )
    parser.add_argument("--min-bytes", type=int, default=1 << 12, metavar="N", help="least message (%(default)s)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="largest message (16 MiB; CUDA: 256 MiB)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 15; CUDA: 30)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, few and small sizes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the machine and the rows it was fitted to")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw points and fit (.png, .pdf or .svg)")
    return parser


def world_sizes_of(given: str | None, device_type: str) -> tuple[int, ...]:
    """Return every P of "1,2,4", ascending. Raises: ValueError: another form, or more than there is room for."""
    attached = ranks.attached_world_size()
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    if given is None:
        given = str(attached) if attached else "1,2,4" if not gpus else ",".join(
            str(1 << power) for power in range(gpus.bit_length())
        )  # fmt: skip
    found = numbers(given, "--tp", "P", least=1)
    if found[-1] == 1:
        raise ValueError("--tp needs a P above 1: one rank has nobody to communicate with")
    if attached is not None and found != (attached,):
        raise ValueError(f"torchrun started {attached} ranks: --tp must be {attached}, got {given}")
    if attached is not None and ranks.local_world_size() != attached:
        raise ValueError(
            f"one host is measured, but torchrun started {ranks.local_world_size()} of {attached} ranks here"
        )
    if gpus and found[-1] > gpus:
        raise ValueError(f"--tp {found[-1]} needs {found[-1]} GPUs, found {gpus}: NCCL refuses two ranks on one")
    return found


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> Settings:
    """Return what to measure. Raises: ValueError: arguments that do not fit."""
    cuda = device_type == "cuda"
    most = args.max_bytes or (1 << 23 if args.quick else 1 << 28 if cuda else 1 << 24)
    if not 4 <= args.min_bytes < most:
        raise ValueError(f"--min-bytes must be at least 4 and below --max-bytes, got {args.min_bytes} and {most}")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    dtypes = names(args.dtype or (",".join(DTYPES) if cuda else "fp32,bf16"), [*DTYPES], "dtype")
    if "tf32" in dtypes and not cuda:
        raise ValueError("dtype tf32 needs a CUDA device")
    missing = tables.missing_extras(["tabulate"] + ["matplotlib"] * (args.plot is not None))
    if missing:
        raise ValueError(missing)
    check_writable(args.json, args.plot)
    check_plot(args.plot)
    step = 8 if args.quick else 4 if cuda else 2
    sizes = [args.min_bytes]
    while sizes[-1] * step < most:
        sizes.append(sizes[-1] * step)
    cubes = (128, 512) if args.quick else (512, 1024, 2048, 4096, 8192) if cuda else (64, 256, 512, 1024)
    return Settings(
        sizes=(*sizes, most),
        cubes=cubes,
        dtypes=dtypes,
        # A GPU's GEMMs that matter are those of the tensor cores; a CPU's are fp32.
        overlapped_dtype=next((name for name in dtypes if cuda and DTYPES[name].itemsize == 2), dtypes[0]),
        copied=1 << (23 if args.quick else 30 if cuda else 26),
        rounds=args.rounds or (3 if args.quick else 30 if cuda else 15),
        command=command,
    )


def table(results: list[dict[str, Any]], machine: Machine) -> str:
    """Return the collectives' rows, then what was fitted."""
    import tabulate

    rows = [row for result in results for row in result["rows"]]
    shown = [
        (
            _shown(row["kind"]),
            row["world_size"],
            row["bytes"],
            f"{row['us_p50']:.1f} [{row['us_p20']:.1f}–{row['us_p80']:.1f}]",
            f"{row['us_fitted']:.1f}",
            f"{100 * row['fit_error']:+.0f} %",
        )
        for row in rows
    ]
    measured = tabulate.tabulate(
        shown,
        ("collective", "P", "bytes", "µs p50 [p20–p80]", "fitted", "off by"),
        disable_numparse=True,
        colalign=("left", *["right"] * 5),
    )
    fits = tabulate.tabulate(
        [
            (_shown(t.kind), t.world_size, f"{t.alpha_us:.1f}", f"{t.gb_per_s:.3g}", _error(rows, t.kind, t.world_size))
            for t in machine.link.terms
        ],
        ("collective", "P", "α, µs a round", "β, GB/s a rank", "mean |error|"),
        disable_numparse=True,
        colalign=("left", *["right"] * 4),
    )
    ranks_compute = tabulate.tabulate(
        [
            (
                c.world_size,
                ", ".join(f"{dtype} {1e3 * rate:.4g}" for dtype, rate in c.tflops),
                f"{1e3 * c.tb_per_s:.3g}",
                f"{c.launch_us:.1f}",
                "" if c.world_size == 1 else "{p50:.2f} [{p20:.2f}–{p80:.2f}]".format(**result["overlap"]),
            )
            for c, result in zip(machine.computes, results, strict=True)
        ],
        ("P", "GFLOP/s a rank", "GB/s of memory", "launch, µs", "overlap p50 [p20–p80]"),
        disable_numparse=True,
        colalign=("right", "left", "right", "right", "right"),
    )
    note = "A round is a ring's: 2(P-1) an all-reduce, P-1 the others. All ranks busy at the same time."
    return "\n\n".join((machine.name, measured, fits, ranks_compute, note))


def _shown(kind: str) -> str:
    return kind.replace("_", "-")


def _error(rows: list[dict[str, Any]], kind: str, world_size: int) -> str:
    errors = [abs(row["fit_error"]) for row in rows if (row["kind"], row["world_size"]) == (kind, world_size)]
    return f"{100 * sum(errors) / len(errors):.0f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    try:
        world_sizes = world_sizes_of(args.tp, device_type)
        settings = settings_of(args, device_type, command)
    except ValueError as error:
        parser.error(str(error))
    try:
        results = [ranks.run(measure, settings, p, device_type) for p in world_sizes]
        if results[0] is None:  # rank 0 of torchrun reports
            return 0
        machine = fit_machine(results)
    except (ranks.RankFailed, ValueError) as error:
        return parser.failed(error)
    rows = [row for result in results for row in result["rows"]]
    print(table(results, machine))
    if args.json:
        details = {name: [result[name] for result in results] for name in ("gemms", "overlap", "environment")}
        written = {**machine.to_dict(), "rows": rows, **details}
        tables.write_text(args.json, json.dumps(written, indent=1, allow_nan=False) + "\n")
    if args.plot:
        commit = results[-1]["environment"]["commit"]
        comm_plot.plot(rows, f"{machine.name}, commit {commit}", args.plot)
    say_written(args.json, args.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
