"""Time the ways to split the two layers over P ranks, forward and backward, beside what the cost model predicts.

`python bench/strategy_bench.py --help` has the flags. What is measured: strategy_measure.py; plots: strategy_plot.py.

Planned for each row (tpffn_triton/plan.py), on the machine measured in the same run or given (predict.py):

    predicted_ms, predicted_exposed_ms   of the pass; ratio: predicted_ms over ms_p50
    sent_bytes                           by all ranks in this pass
    saved_bytes, peak_bytes              on each rank: kept for backward; the most alive in this pass

Exit status: 0, 1 a strategy was wrong or a rank failed, 2 wrong arguments.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import comm_bench
import comm_fit
import ranks
import strategy_plot
import strategy_report
import tables
import torch
from command_line import OneLineErrorParser, check_alone, check_writable, exit_with, names, say_written
from strategy_measure import TIMED, Settings, measure, timed_on
from workloads import DTYPES, SHAPES, Shape

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.machines import Machine
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_comparison import Strategy
from tpffn_triton.predict import predict

DESCRIPTION = """\
Time the four partitionings of the two layers, and column→row with sequence parallelism, forward and
backward, over several sizes and P, with what is exposed of the communication and what was predicted.

Without a GPU the ranks are gloo processes started here, each with the same number of threads at every P;
with GPUs NCCL processes, one GPU each: it needs as many as the largest P. P=1 is the base of scaling.
Every strategy is first compared with fp64; a wrong one is not timed. Rounds interleave them.
"""
EPILOG = """\
figures:
  ms            the slowest rank's; quantiles over interleaved rounds
  × col→row     over column→row's time of the same pass, by round: above 1 is slower
  exposed ms    computation stood still for a collective, on the rank that waits longest (least)
  predicted     by tpffn_triton/predict.py on the machine measured in the same run; ratio: over measured
  MiB sent      by all ranks in this pass, as planned

examples:
  python bench/strategy_bench.py                                   P = 1, 2 and 4, under four minutes on 4 cores
  python bench/strategy_bench.py --quick --tp 1,2 --shapes tiny    seconds; figures are rough
  python bench/strategy_bench.py --json out.json --plots out
  python bench/strategy_bench.py --from out.json --plots out       the table and the plots again
"""
DEFAULT_SHAPES = "small,analysed,wide"
DTYPE_NAMES = tuple(name for name in DTYPES if name != "tf32")
Row = dict[str, Any]


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(
        prog="strategy_bench.py",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--tp", metavar="P,...", help="default: 1,2,4, or powers of two up to the number of GPUs")
    what.add_argument(
        "--shapes", default=DEFAULT_SHAPES, metavar="NAME,...", help=f"of {', '.join(SHAPES)} (default: %(default)s)"
    )
    what.add_argument("--dtype", choices=DTYPE_NAMES, help="default: fp32; CUDA: bf16")
    what.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="default: %(default)s (erf)")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: what fits in 15 s, GPU 5 s)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank (default: cores / largest P)")
    how.add_argument("--machine", type=Path, metavar="FILE", help="by comm_bench.py (default: measure it first)")
    how.add_argument("--quick", action="store_true", help="three rounds, and a quick measurement of the machine")
    how.add_argument("--from", type=Path, metavar="FILE", dest="results", help="measure nothing: what --json wrote")
    out = parser.add_argument_group("where to (besides the table on stdout; progress is on stderr)")
    out.add_argument("--json", type=Path, metavar="PATH", help="write the rows and the machine")
    out.add_argument("--csv", type=Path, metavar="PATH", help="write the rows as CSV")
    out.add_argument("--plots", type=Path, metavar="DIR", help=f"draw {', '.join(strategy_plot.PLOTS)}")
    return parser


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> dict[int, Settings]:
    """Return what to measure, by P. Raises: ValueError: arguments that do not fit."""
    cuda = device_type == "cuda"
    if ranks.attached_world_size() is not None:
        raise ValueError("ranks are started here, as many as each P asks for: not under torchrun")
    if cuda and torch.cuda.device_count() < 2:
        raise ValueError("one GPU has nobody to communicate with: needs two, or none (CUDA_VISIBLE_DEVICES=)")
    world_sizes = comm_bench.world_sizes_of(args.tp, device_type)
    shapes = [SHAPES[name] for name in names(args.shapes, [*SHAPES], "shape")]
    by_p = {p: tuple(_cut(shape, p) for shape in shapes) for p in world_sizes}
    for name, value in (("rounds", args.rounds), ("threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    dtype = args.dtype or ("bf16" if cuda else "fp32")
    how = None
    if args.machine is None:
        options = ["--dtype", dtype, *(["--quick"] if args.quick else ["--rounds", "5"])]
        how = comm_bench.settings_of(comm_bench.build_parser().parse_args(options), device_type, command)
    threads = args.threads or max(1, ranks.cores() // world_sizes[-1])
    return {
        p: Settings(by_p[p], dtype, args.activation, args.rounds, args.quick, threads, how, command)
        for p in world_sizes
    }


def _cut(shape: Shape, p: int) -> Shape:
    """Return the shape over p ranks. Raises: ValueError: a strategy cannot cut it so."""
    for partitioning in PARTITIONINGS.values():
        partitioning.check_divisible(shape.hidden, shape.ffn, p)
    if shape.seq % p:
        raise ValueError(f"{shape.name}: sequence parallelism cuts S = {shape.seq} into {p} equal parts")
    return replace(shape, tp=p)


def planned(row: Row, strategy: Strategy, machine: Machine) -> Row:
    """Return what is planned and predicted for a pass. Raises: ValueError: the machine does not say."""
    sizes = (row[name] for name in ("batch", "seq", "hidden", "ffn", "tp"))
    plan = plan_ffn(*sizes, dtype=row["dtype"], activation=row["activation"], **strategy.options)
    prediction, pass_ = predict(plan, machine), row["pass"]
    return {
        "predicted_ms": prediction.pass_us(pass_) / 1e3,
        "predicted_exposed_ms": prediction.exposed_us(pass_) / 1e3,
        "sent_bytes": sum(c.sent_total_bytes for c in plan.collectives if c.pass_ == pass_),
        "saved_bytes": plan.totals["saved_bytes"],
        "peak_bytes": plan.totals[f"peak_bytes_{pass_}"],
    }


def check_machine(machine: Machine, wanted: dict[int, Settings]) -> None:
    """Raises: ValueError: the machine does not say what a prediction needs."""
    for p, settings in wanted.items():
        for shape in settings.shapes:
            row = {**vars(shape), "dtype": settings.dtype, "activation": settings.activation, "pass": "forward"}
            for strategy in timed_on(p).values():
                planned(row, strategy, machine)


def measured(wanted: dict[int, Settings], machine: Machine | None, device_type: str, command: str) -> dict[str, Any]:
    """Start the ranks of each P; return what --json writes. Raises: RankFailed, ValueError: times that do not fit."""
    found = [ranks.run(measure, settings, p, device_type) for p, settings in wanted.items()]
    machine = machine or comm_fit.fit_machine([result["machine"] for result in found])
    rows = [row for result in found for row in result["rows"]]
    for row in rows:
        row |= planned(row, TIMED[row["strategy"]], machine)
        row["ratio"] = row["predicted_ms"] / row["ms_p50"]
    shapes = [shape.name for settings in wanted.values() for shape in settings.shapes]
    rows.sort(key=lambda row: shapes.index(row["shape"]))
    refused = [line for result in found for line in result["refused"]]
    return {**machine.to_dict(), "command": command, "rows": rows, "refused": refused}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    drawn = [] if args.plots is None else [args.plots / name for name in strategy_plot.PLOTS]
    machine = None
    try:
        if missing := tables.missing_extras(["tabulate"] + ["matplotlib"] * bool(drawn)):
            raise ValueError(missing)
        check_writable(args.json, args.csv, *drawn)
        if args.results is not None:
            check_alone(parser, args, ("json", "csv", "plots"))
            results = strategy_report.load(args.results)
        else:
            wanted = settings_of(args, device_type, command)
            if args.machine is not None:
                machine = Machine.load(args.machine)
                check_machine(machine, wanted)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.results is None:
            results = measured(wanted, machine, device_type, command)
    except (ranks.RankFailed, ValueError) as error:
        return parser.failed(error)
    print(strategy_report.table(results))
    if args.json:
        tables.write_text(args.json, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if args.csv:
        tables.write_csv(results["rows"], args.csv)
    if not results["rows"]:
        drawn = []
    strategy_plot.plot(results["rows"], drawn)
    say_written(args.json, args.csv, *drawn)
    return 1 if results["refused"] else 0


if __name__ == "__main__":
    exit_with(main)
