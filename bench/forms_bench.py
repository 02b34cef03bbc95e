"""Compare the forms of one shard's launches, one launch, dependent launches and two, with each other and with unfused.

`python bench/forms_bench.py --help` has the flags. What is measured: forms_measure.py; plot: forms_plot.py.

Exit status: 0, 1 a form was wrong or failed, 2 wrong arguments or neither a GPU nor the interpreter.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import checkout  # noqa: F401
import forms_plot
import ranks
import tables
from command_line import OneLineErrorParser, check_plot, check_writable, exit_with, numbers, say_written
from forms_measure import UNFUSED, Settings, measure
from tables import Row
from workloads import DTYPES, MODES, Shape

from tpffn_triton.interpreter import interpreting
from tpffn_triton.kernels.activations import ACTIVATIONS

DESCRIPTION = """\
Time one rank's shard in every form of its launches, and as three separate torch operations, on one GPU:

  forward     few tokens | single launch | dependent launches (where the GPU has them) | two launches
  gradients   of weights and biases, in one launch | a launch each

Every form is first compared with fp64; a wrong one is not timed. Rounds interleave them. Nothing is
communicated. Without a GPU, TRITON_INTERPRET=1 rehearses it on tiny sizes: those times mean nothing.
"""
EPILOG = """\
figures:
  µs          one step; quantiles over interleaved rounds. With --graph GPU time alone
  × unfused   unfused's time over this one's, by round: above 1 is faster
  ←           what the tables choose, and so what tpffn_triton.ffn launches

examples:
  python bench/forms_bench.py --graph                                the analysed shard, M from 64 to 8192
  python bench/forms_bench.py --graph --warm-l2 --mode fwd --json out.json --plot out.png
  python bench/forms_bench.py --hidden 4096 --ffn 2048 --tokens 1,16,64,256,1024,4096 --graph
  TRITON_INTERPRET=1 python bench/forms_bench.py --quick             a rehearsal without a GPU
"""
# Tokens, H and F/P.
DEFAULTS = {"cuda": ("64,256,1024,4096,8192", 1024, 1024), "cpu": ("16,72", 64, 64)}
DTYPE_NAMES = tuple(name for name in DTYPES if name != "tf32")


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(prog="forms_bench.py", description=DESCRIPTION, epilog=EPILOG)
    tokens, hidden, ffn = DEFAULTS["cuda"]
    what = parser.add_argument_group("what to measure")
    what.add_argument("--tokens", metavar="M,...", help=f"default: {tokens}")
    what.add_argument("--hidden", type=int, metavar="N", help=f"hidden_size H (default: {hidden})")
    what.add_argument("--ffn", type=int, metavar="N", help=f"this rank's F/P (default: {ffn})")
    what.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="default: %(default)s (erf)")
    what.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="default: %(default)s")
    what.add_argument("--mode", choices=MODES, help="forward alone, or forward and backward (default: both)")
    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=int, metavar="N", help="timed rounds (default: what fits in 5 s, at most 200)")
    how.add_argument("--graph", action="store_true", help="replay CUDA graphs: GPU time without the host's launches")
    how.add_argument("--warm-l2", action="store_true", help="run each step once just before (default: overwrite L2)")
    how.add_argument("--quick", action="store_true", help="few rounds and little warm-up; figures are rough")
    out = parser.add_argument_group("where to (besides the table on stdout; progress is on stderr)")
    out.add_argument("--json", type=Path, metavar="PATH", help="write a list of objects, one a row")
    out.add_argument("--plot", type=Path, metavar="PATH", help="draw time by tokens (.png, .pdf or .svg)")
    return parser


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> Settings:
    """Return what to measure. Raises: ValueError: arguments that do not fit, or nothing to run kernels on."""
    cuda = device_type == "cuda"
    if not cuda and not interpreting():
        raise ValueError("needs a CUDA device; TRITON_INTERPRET=1 rehearses it without one, where times mean nothing")
    if cuda and interpreting():
        raise ValueError("TRITON_INTERPRET=1 is set: unset it to measure this GPU")
    if ranks.attached_world_size() is not None:
        raise ValueError("one rank's shard is timed, in this process: not under torchrun")
    for flag, given in (("--graph", args.graph), ("--warm-l2", args.warm_l2)):
        if given and not cuda:
            raise ValueError(f"{flag} needs a CUDA device")
    if args.iters is not None and args.iters < 1:
        raise ValueError(f"--iters must be at least 1, got {args.iters}")
    tokens, hidden, ffn = DEFAULTS[device_type]
    hidden = hidden if args.hidden is None else args.hidden
    ffn = ffn if args.ffn is None else args.ffn
    every_m = numbers(args.tokens or tokens, "--tokens", "M", least=1)
    shapes = tuple(Shape(f"M={M}", 1, M, hidden, ffn, tp=1) for M in every_m)
    if missing := tables.missing_extras(["tabulate"] + ["matplotlib"] * (args.plot is not None)):
        raise ValueError(missing)
    check_writable(args.json, args.plot)
    check_plot(args.plot)
    modes = (args.mode,) if args.mode else MODES
    how = {"graph": args.graph, "warm_l2": args.warm_l2, "quick": args.quick}
    return Settings(shapes, args.dtype, args.activation, modes, args.iters, command=command, **how)


def table(rows: list[Row], refused: list[str]) -> str:
    """Return one table a mode, between what ran where and what there is to know about the times."""
    parts = [_header(rows[0])] if rows else []
    for mode in MODES:
        of_mode = [row for row in rows if row["mode"] == mode]
        parts += [_body(of_mode)] if of_mode else []
    if rows:
        parts.append("\n".join(_notes(rows)))
    return "\n\n".join(parts + [f"NOT TIMED: {line}" for line in refused])


def _header(row: Row) -> str:
    shard = f"one rank's shard: H={row['hidden']} F/P={row['ffn_per_rank']}, {row['activation']}, {row['dtype']}"
    how = "in CUDA graphs, " if row["graph"] else ""
    l2 = f", {how}L2 {'warm' if row['warm_l2'] else 'cold'}" if row["device_type"] == "cuda" else ""
    return f"{shard}, with biases, WITHOUT COMMUNICATION{l2}\n{tables.surroundings(row)}"


def _body(rows: list[Row]) -> str:
    import tabulate

    both = rows[0]["mode"] == "fwd_bwd"
    lines: list = []
    for number, row in enumerate(rows):
        if number and row["tokens"] != rows[number - 1]["tokens"]:
            lines.append(tabulate.SEPARATING_LINE)
        us = [tables.ms(1e3 * row[f"ms_p{p}"]) for p in (50, 20, 80)]
        ratio = "" if row["ratio_p50"] is None else "{ratio_p50:.2f} [{ratio_p20:.2f}–{ratio_p80:.2f}]".format(**row)
        lines.append(
            (
                row["tokens"],
                row["form"],
                *([row["gradients"] or ""] if both else []),
                "←" if row["chosen"] else "",
                f"{us[0]} [{us[1]}–{us[2]}]",
                f"{row['tflops']:.3g}",
                "" if row["roofline_pct"] is None else f"{row['roofline_pct']:.0f} %",
                "" if row["form"] == UNFUSED else ratio,
                f"{row['max_rel_err']:.1e}",
            )
        )
    names = ("tokens", "forward + backward" if both else "forward", *["gradients"] * both, "")
    figures = ("µs p50 [p20–p80]", "TFLOP/s", "roofline", "× unfused [p20–p80]", "rel err")
    align = ("right", *["left"] * (len(names) - 1), *["right"] * len(figures))
    return tabulate.tabulate(lines, (*names, *figures), disable_numparse=True, colalign=align)


def _notes(rows: list[Row]) -> list[str]:
    notes = [f"{rows[0]['iters']} interleaved rounds or more; ← is what the tables choose:"]
    for tokens, group in groupby(rows, key=lambda row: row["tokens"]):
        notes.append(f"  M={tokens}: {[*group][-1]['why_chosen']}")
    if rows[0]["triton_interpret"]:
        return [*notes, "The kernels ran in Triton's interpreter: THESE TIMES MEAN NOTHING."]
    notes.append("Graph replays: GPU time alone." if rows[0]["graph"] else "The host's launches are included.")
    return notes + tables.machine_notes(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    try:
        settings = settings_of(args, device_type, command)
    except ValueError as error:
        parser.error(str(error))
    result = ranks.run(measure, settings, 1, device_type)
    rows, refused = result["rows"], result["refused"]
    print(table(rows, refused))
    if args.json:
        tables.write_json(rows, args.json)
    if args.plot and rows:
        forms_plot.plot(rows, args.plot)
    say_written(args.json, args.plot)
    return 1 if refused else 0


if __name__ == "__main__":
    exit_with(main)
