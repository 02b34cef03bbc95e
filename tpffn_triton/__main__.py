"""Command line of the package: `python -m tpffn_triton <command>`; exit code 2 and one line on bad input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.plan import DTYPE_BYTES, plan_ffn
from tpffn_triton.plan_report import render_text
from tpffn_triton.validation import SAVE_MODES

EXAMPLES = """\
examples:
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4
  python -m tpffn_triton plan --batch 1 --seq 4096 --hidden 8192 --ffn 28672 --tp 8 --activation swiglu --no-bias
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --save nothing --json
"""


class _OneLineErrorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineErrorParser(
        prog="python -m tpffn_triton",
        description="Tensor-parallel transformer FFN with fused Triton kernels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    plan = commands.add_parser(
        "plan",
        help="print shapes, FLOPs, bytes and communication of one FFN layer",
        description="Print shapes, FLOPs, bytes and communication of one FFN layer split over --tp ranks\n"
        "(Linear1 column-parallel, Linear2 row-parallel). Nothing runs, so no GPU is needed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument("--batch", type=int, required=True, metavar="B", help="batch size")
    plan.add_argument("--seq", type=int, required=True, metavar="S", help="sequence length")
    plan.add_argument("--hidden", type=int, required=True, metavar="H", help="hidden_size of the model")
    plan.add_argument("--ffn", type=int, required=True, metavar="F", help="ffn_hidden_size, divisible by P")
    plan.add_argument("--tp", type=int, required=True, metavar="P", help="ranks of the tensor-parallel group")
    plan.add_argument("--dtype", choices=[*DTYPE_BYTES], default="fp32", help="of every tensor (default: %(default)s)")
    plan.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="gelu",
        help="default: %(default)s; gelu and geglu are the erf forms; with a gated one w1 has 2F rows",
    )
    plan.add_argument("--no-bias", dest="bias", action="store_false", help="plan without b1 and b2")
    plan.add_argument(
        "--save",
        choices=SAVE_MODES,
        default="pre_act",
        help="what backward keeps beside x; nothing: linear1 is computed again (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SystemExit (code 2, or 0 for --help) comes from argparse."""
    args = build_parser().parse_args(argv)
    try:
        plan = plan_ffn(
            args.batch,
            args.seq,
            args.hidden,
            args.ffn,
            args.tp,
            dtype=args.dtype,
            activation=args.activation,
            bias=args.bias,
            save=args.save,
        )
    except ValueError as error:
        print(f"python -m tpffn_triton plan: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.to_dict(), indent=2) if args.json else render_text(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
