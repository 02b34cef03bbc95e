"""Compare the cost model's prediction with the package's own ffn(), forward and backward, over P ranks.

`python bench/predict_bench.py --help` has the flags. Predicted: tpffn_triton/predict.py, on the machine that
comm_bench.py measured. Measured on every rank of a group, host clock, the slowest rank's of each round:

    ms        one forward that keeps what backward needs, and one backward with gradients of x, w1, b1, w2 and b2
    exposed   the part of it in which computation stood still for a collective; on the rank that waits longest, and on
              the one that waits least: between the two lies the wait for slower ranks, which the model does not have
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import comm_bench
import comm_fit
import comm_measure
import environment
import ranks
import tables
import workloads
from command_line import OneLineErrorParser, check_writable, exit_with, names, say_written
from implementations import IMPLEMENTATIONS
from ranks import Rank
from steps import passes_of
from timing import time_rounds
from workloads import SHAPES, Shape

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.machines import Machine
from tpffn_triton.plan import plan_ffn
from tpffn_triton.predict import PASSES, predict

DESCRIPTION = """\
Predict forward and backward of ffn(), measure them over gloo on this machine's CPU, and print both beside
each other, with what is exposed of the communication. Without --machine the machine is measured first.
"""
EPILOG = """\
examples:
  python bench/predict_bench.py                                    P = 2 and 4, about three minutes on 4 cores
  python bench/predict_bench.py --quick --tp 2 --shapes tiny       seconds; figures are rough
  python bench/comm_bench.py --tp 2,4 --json here.json && \\
      python bench/predict_bench.py --tp 2,4 --machine here.json --json predicted.json
"""
DEFAULT_SHAPES = "small,analysed,wide"


@dataclass(frozen=True)
class Settings:
    """What to run; every shape's tp is the number of ranks."""

    shapes: tuple[Shape, ...]
    dtype: str
    activation: str
    rounds: int


def measure(rank: Rank, settings: Settings) -> list[dict[str, Any]]:
    """Return one row a shape and pass, without predictions."""
    rows = []
    for shape in settings.shapes:
        rank.say(f"{shape.name}, P={shape.tp}: {settings.rounds} rounds")
        full = workloads.draw(shape, settings.dtype, settings.activation, rank.device)
        own = workloads.shard(full, rank.rank, rank.world_size, settings.activation)
        steps = passes_of(IMPLEMENTATIONS["fused"].build(settings.activation, False), own, rank.group)
        times, _ = time_rounds(steps, rank, graph=False, quick=False, rounds=settings.rounds, together=2)
        for pass_ in PASSES:
            rows.append(
                {
                    "shape": shape.name,
                    **{name: getattr(shape, name) for name in ("batch", "seq", "hidden", "ffn", "tp")},
                    "dtype": settings.dtype,
                    "activation": settings.activation,
                    "pass": pass_,
                    "rounds": settings.rounds,
                    **times[pass_].figures(),
                }
                | environment.describe(rank)
            )
    return rows


def add_predictions(rows: list[dict[str, Any]], machine: Machine) -> None:
    """Add predicted_ms, predicted_exposed_ms and the ratios predicted over measured to the rows."""
    for row in rows:
        sizes = (row[name] for name in ("batch", "seq", "hidden", "ffn", "tp"))
        prediction = predict(plan_ffn(*sizes, dtype=row["dtype"], activation=row["activation"]), machine)
        row["predicted_ms"] = prediction.pass_us(row["pass"]) / 1e3
        row["predicted_exposed_ms"] = prediction.exposed_us(row["pass"]) / 1e3
        row["ratio"] = row["predicted_ms"] / row["ms_p50"]
        row["exposed_ratio"] = row["predicted_exposed_ms"] / row["exposed_ms"] if row["exposed_ms"] else None


def table(rows: list[dict[str, Any]]) -> str:
    """Return predicted beside measured, one line a shape, P and pass."""
    import tabulate

    first = rows[0]
    lines = [
        (
            f"{row['shape']} (B={row['batch']} S={row['seq']} H={row['hidden']} F={row['ffn']})",
            row["tp"],
            row["pass"],
            f"{row['ms_p50']:.2f} [{row['ms_p20']:.2f}–{row['ms_p80']:.2f}]",
            f"{row['predicted_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['exposed_ms']:.2f} ({row['exposed_ms_least']:.2f})",
            f"{row['predicted_exposed_ms']:.2f}",
            "" if row["exposed_ratio"] is None else f"{row['exposed_ratio']:.2f}",
        )
        for row in rows
    ]
    headers = ("shape", "P", "pass", "measured ms p50 [p20–p80]", "predicted", "ratio")
    exposed = ("exposed ms (least)", "predicted", "ratio")
    body = tabulate.tabulate(
        lines, (*headers, *exposed), disable_numparse=True, colalign=("left", "right", "left", *["right"] * 6)
    )
    where = (
        f"{first['device']}, {first['cores']} cores, {first['collectives']}, {first['dtype']}, {first['activation']}"
    )
    load = "" if first["load_average"] is None else f" Load average at the start: {first['load_average']:.1f}."
    return f"{where}\n\n{body}\n\nratio: predicted over measured.{load}"


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(
        prog="predict_bench.py",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--tp", default="2,4", metavar="P,...", help="ranks (default: %(default)s)")
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, metavar="NAME,...", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="default: %(default)s")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="by comm_bench.py (default: measure it first)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and a quick measurement of the machine")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows and the machine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    try:
        if device_type == "cuda" or ranks.attached_world_size() is not None:
            raise ValueError("measured on CPU ranks that are started here: no CUDA device, no torchrun")
        world_sizes = comm_bench.world_sizes_of(args.tp, "cpu")
        if world_sizes[0] == 1:
            raise ValueError(f"--tp takes P above 1, got {args.tp}")
        shapes = [SHAPES[name] for name in names(args.shapes, [*SHAPES], "shape")]
        wanted = {p: tuple(replace(shape, tp=p) for shape in shapes) for p in world_sizes}
        if args.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
        if missing := tables.missing_extras(["tabulate"]):
            raise ValueError(missing)
        check_writable(args.json)
        machine = None if args.machine is None else Machine.load(args.machine)
        options = ["--dtype", args.dtype, *(["--quick"] if args.quick else [])]
        how = comm_bench.settings_of(comm_bench.build_parser().parse_args(options), "cpu", command)
    except ValueError as error:
        parser.error(str(error))
    try:
        results, rows = [], []
        for p in world_sizes:
            if machine is None:  # right before what it is to predict, since other programs come and go
                results.append(ranks.run(comm_measure.measure, how, p, "cpu"))
            settings = Settings(wanted[p], args.dtype, args.activation, 3 if args.quick else args.rounds)
            rows += ranks.run(measure, settings, p, "cpu")
        machine = machine or comm_fit.fit_machine(results)
        add_predictions(rows, machine)
    except (ranks.RankFailed, ValueError) as error:
        return parser.failed(error)
    print(table(rows))
    if args.json:
        written = {**machine.to_dict(), "command": command, "rows": rows}
        tables.write_text(args.json, json.dumps(written, indent=1, allow_nan=False) + "\n")
        say_written(args.json)
    return 0


if __name__ == "__main__":
    exit_with(main)
