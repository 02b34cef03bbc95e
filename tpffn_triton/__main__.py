"""Command line of the package: `python -m tpffn_triton <command>`; exit code 2 and one line on bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from tpffn_triton import plan_command


class _OneLineErrorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineErrorParser(
        prog="python -m tpffn_triton",
        description="Tensor-parallel transformer FFN with fused Triton kernels.",
        epilog=plan_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    plan = commands.add_parser(
        "plan",
        help="print shapes, FLOPs, bytes, communication and predicted time of one FFN layer",
        description=plan_command.DESCRIPTION,
        epilog=plan_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan_command.add_arguments(plan)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SystemExit (code 2, or 0 for --help) comes from argparse."""
    args = build_parser().parse_args(argv)
    try:
        print(plan_command.run(args))
    except ValueError as error:
        print(f"python -m tpffn_triton plan: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
