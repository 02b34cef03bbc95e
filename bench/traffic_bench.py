"""Count the bytes that collectives and layers send over gloo, and compare them with the plan.

`python bench/traffic_bench.py --help` has the flags. What is counted: traffic_measure.py; how: network.py; the textbook
ring: ring.py.

Exit status: 0, 1 a rank failed, 2 wrong arguments, or no network namespace.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import network
import ranks
import tables
import traffic_plot
from command_line import (
    SIZES,
    OneLineErrorParser,
    add_sizes,
    check_alone,
    check_plot,
    check_writable,
    exit_with,
    given_sizes,
    numbers,
    say_written,
)
from traffic_measure import Settings, measure, plans
from workloads import SHAPES, Shape

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.plan import DTYPE_BYTES

DESCRIPTION = """\
Count what P gloo ranks send on a network of their own, one call at a time, beside what the plan says:

  collectives   every kind and size that the plans of the layers below have
  ring          the textbook ring all-reduce of y, over sends and receives, which counts its own elements too
  layers        forward and backward, separately

It runs in a new network namespace, so that the loopback interface carries nothing else: Linux 4.19 or
later, `unshare` of util-linux, and root or user namespaces.
"""
EPILOG = """\
figures (MiB are of all ranks together, one call):
  planned      tensor bytes by the plan's ring accounting: what the plan's `sent_total_bytes` add up to
  TCP          payload of the ranks' sockets, without retransmissions; ×: over planned
  a rank       the same, of the rank that sends least and most
  messages     TCP beyond the tensors that gloo's own algorithm sends: the headers of its messages
  wire         IP packets on the loopback interface: TCP and, in percent of it,
  packets      their headers, and acknowledgements. Loopback's MTU is 64 KiB: Ethernet's packets add more
  again        what TCP has sent a second time

examples:
  python bench/traffic_bench.py                                    the analysed model, P = 2 and 4
  python bench/traffic_bench.py --quick --tp 2                     a small shape, in seconds
  python bench/traffic_bench.py --batch 2 --seq 64 --hidden 512 --ffn 2048 --tp 8 --dtype bf16
  python bench/traffic_bench.py --json out.json --plot out.png
  python bench/traffic_bench.py --from out.json --plot out.png     the table and the plot again
"""


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(prog="traffic_bench.py", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--shape", choices=[*SHAPES], help="(default: analysed; with --quick small)")
    add_sizes(parser, dict.fromkeys(SIZES, "the shape's"))
    parser.add_argument("--tp", default="2,4", metavar="P,...", help="ranks (default: %(default)s)")
    parser.add_argument("--dtype", choices=[*DTYPE_BYTES], default="fp32", help="(default: %(default)s)")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, metavar="N", help="calls of each case (default: 10; with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="a small shape, few repeats")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="results", help="count nothing: what --json wrote")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw planned beside sent (.png, .pdf or .svg)")
    return parser


def settings_of(args: argparse.Namespace, command: str) -> list[Settings]:
    """Return what to count, for each P. Raises: ValueError: arguments that do not fit."""
    if ranks.attached_world_size() is not None:
        raise ValueError("it starts its ranks itself, in a network namespace of their own: run it without torchrun")
    every_p = numbers(args.tp, "--tp", "P", least=2)  # one rank sends nothing
    repeats = (2 if args.quick else 10) if args.repeats is None else args.repeats
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if missing := tables.missing_extras(["tabulate"] + ["matplotlib"] * (args.plot is not None)):
        raise ValueError(missing)
    check_writable(args.json, args.plot)
    check_plot(args.plot)
    wanted = [Settings(_shape(args, p), args.dtype, args.activation, repeats, command) for p in every_p]
    for settings in wanted:
        plans(settings)
    return wanted


def _shape(args: argparse.Namespace, world_size: int) -> Shape:
    named = SHAPES[args.shape or ("small" if args.quick else "analysed")]
    sizes = given_sizes(args)
    shape = replace(named, **sizes, tp=world_size)
    return replace(shape, name="x".join(str(getattr(shape, name)) for name in SIZES)) if sizes else shape


def load(path: Path) -> list[dict[str, Any]]:
    """Return the rows that --json wrote. Raises: ValueError: something else is in the file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        table(rows)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} was not written by traffic_bench.py --json: {error!r}") from None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line a case and P, and what stands out."""
    import tabulate

    lines: list[Any] = []
    for number, row in enumerate(rows):
        if number and (row["kind"] == "layer") != (rows[number - 1]["kind"] == "layer"):
            lines.append(tabulate.SEPARATING_LINE)
        lines.append(
            (
                title(row),
                row["tp"],
                _mib(row["planned_bytes"]),
                _mib(row["tcp_bytes"]),
                "" if row["ratio"] is None else f"{row['ratio']:.4f}",
                "–".join(dict.fromkeys(_mib(least_or_most(row["tcp_bytes_per_rank"])) for least_or_most in (min, max))),
                _percent(row["tcp_bytes"], row["algorithm_bytes"]),
                _mib(row["wire_bytes"]),
                _percent(row["wire_bytes"] - row["retransmitted_bytes"], row["tcp_bytes"]),
                _percent(row["tcp_bytes"] + row["retransmitted_bytes"], row["tcp_bytes"]),
            )
        )
    body = tabulate.tabulate(
        lines,
        ("case", "P", "planned MiB", "TCP MiB", "×", "a rank MiB", "messages", "wire MiB", "packets", "again"),
        disable_numparse=True,
        colalign=("left", *["right"] * 9),
    )
    first = rows[0]
    head = (
        f"{first['shape']}: B={first['batch']} S={first['seq']} H={first['hidden']} F={first['ffn']}, "
        f"{first['activation']}, {first['dtype']}, over {first['collectives']}, {first['repeats']} calls of each case\n"
        f"torch {first['torch']}, {first['os']}, commit {first['commit']}"
    )
    return "\n\n".join((head, body, "\n".join(_notes(rows))))


def title(row: dict[str, Any]) -> str:
    """Return what a row counts, in a few words."""
    if row["kind"] in ("collective", "ring"):
        return f"{row['case']} of {row['planned'][0]['elements']:,}"
    return row["case"] if row["pass"] is None else f"{row['case']} {row['pass']}"


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["kind"] == "ring":
            elements = row["ring_elements_per_rank"]
            of_a_rank = "–".join(dict.fromkeys(f"{n:,}" for n in (min(elements), max(elements))))
            yield (
                f"textbook ring, P={row['tp']}: {row['ring_rounds']} rounds (planned {row['planned_rounds']}), "
                f"{of_a_rank} elements sent by a rank, {sum(elements):,} in all (planned {row['planned_elements']:,}), "
                f"{sum(elements) / row['planned'][0]['elements']:g}× the tensor"
            )
    if any(row["kind"] == "collective" and row["algorithm_bytes"] > row["planned_bytes"] for row in rows):
        yield "gloo's reduce_scatter is an all-reduce of which each rank keeps its part: twice the ring's bytes."


def _mib(count: float) -> str:
    return f"{count / 2**20:.4f}" if count else "0"


def _percent(more: float, base: float) -> str:
    return f"{100 * (more / base - 1):.2f} %" if base else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Count; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    outside, arguments = network.outside(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, command, _ = parser.parsed(arguments)
    try:
        if args.results is not None:
            check_alone(parser, args, ("json", "plot"))
        wanted = settings_of(args, command)
        rows = [] if args.results is None else load(args.results)
        if args.results is not None:
            wanted = []
        elif outside is None:
            network.run_alone(Path(__file__).resolve(), arguments)
        else:
            network.start_loopback(outside)
    except ValueError as error:
        parser.error(str(error))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # there is no other; the machine's own setting may name one
    try:
        for settings in wanted:
            rows += ranks.run(measure, settings, settings.shape.tp, "cpu")
    except ranks.RankFailed as error:
        return parser.failed(error)
    print(table(rows))
    if args.json:
        tables.write_text(args.json, json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n")
    if args.plot:
        traffic_plot.plot(rows, title, args.plot)
    say_written(args.json, args.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
