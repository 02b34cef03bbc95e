"""Search tile configurations for one GPU, and write the fastest of each case to the file that kernels read.

`python bench/tune.py --help` has the flags. What is tuned: tune_cases.py; candidates: tune_candidates.py; how they are
filtered and measured: tune_filter.py, tune_measure.py; what is chosen and written: tune_rows.py.

Exit status: 0; 1 a candidate was wrong, or the tables' own failed; 2 wrong arguments, or nothing to measure on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401
import environment
import ranks
import tables
import torch
import tune_report
import tune_rows
from budget import Budget
from command_line import OneLineErrorParser, check_writable, exit_with, names, say_written
from gate import matmul_precision
from ranks import Rank
from shards import Shard
from tables import Row
from tune_candidates import ARITHMETICS, MOST, SHARED_BYTES, candidates
from tune_cases import KERNELS_OF, REHEARSAL, all_cases, given_shard, shards_of
from tune_rows import State
from tune_search import Candidates, filter_all, search

from tpffn_triton import interpreter
from tpffn_triton.interpreter import interpreting
from tpffn_triton.kernels import _tuned
from tpffn_triton.kernels._configs import KERNELS, arch_of

DESCRIPTION = """\
Search tile configurations for this GPU. For each kernel and size: candidates around what the tables of
kernels/_configs.py choose are compiled ahead of time, in other processes; those that spill or lose their tensor cores
are dropped; the others are compared with fp64 and timed in CUDA graphs, interleaved with the tables' choice and, where
the kernel is a plain GEMM, with torch's own (cuBLAS). What is faster by more than noise is written to a file
that the kernels read on a GPU of this name. Without a GPU, TRITON_INTERPRET=1 rehearses it on tiny sizes.
"""
EPILOG = """\
examples:
  python bench/tune.py --dry-run                              what would be compiled and measured
  python bench/tune.py --json tune_state.json                 all of it, in eight minutes
  python bench/tune.py --json tune_state.json --resume        what was left out of that, and no more
  python bench/tune.py --kernel linear,dgrad --shape 8192,5120,3456 --out mine.json
  python bench/tune.py --filter-only --arch sm_90             without a GPU: what the compiler says of the candidates
"""
BUDGET_S = 480


class Settings(NamedTuple):
    """What was asked for. out: None where nothing is measured."""

    arch: str
    arithmetic: str
    budget_s: float
    out: Path | None
    state: Path | None
    resume: bool
    command: str


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(prog="tune.py", description=DESCRIPTION, epilog=EPILOG)
    what = parser.add_argument_group("what to tune")
    what.add_argument("--regime", metavar="NAME,...", help=f"of {', '.join(KERNELS_OF)} (default: all)")
    what.add_argument("--shape", metavar="M,H,F/P", action="append", help="a rank's shard instead; may be repeated")
    what.add_argument("--kernel", metavar="NAME,...", help=f"of {', '.join(KERNELS)} (default: all)")
    what.add_argument("--arithmetic", choices=ARITHMETICS, default="16bit", help="default: %(default)s, as bf16")
    what.add_argument(
        "--candidates", type=int, default=MOST, metavar="N", help="at most of a case (default: %(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="S", help="seconds in all (default: %(default)s)"
    )
    how.add_argument("--resume", action="store_true", help="go on from the file of --json, where it lacks candidates")
    how.add_argument("--list", action="store_true", help="print the cases, and stop")
    how.add_argument("--dry-run", action="store_true", help="print what would be compiled and measured, and stop")
    how.add_argument("--filter-only", action="store_true", help="compile the candidates and print the verdicts alone")
    how.add_argument(
        "--arch", choices=SHARED_BYTES, help="for --dry-run and --filter-only (default: this GPU's, or sm_90)"
    )
    out = parser.add_argument_group("where to (besides the table on stdout; progress is on stderr)")
    out.add_argument("--out", type=Path, metavar="PATH", help="default: kernels/tuned/<the GPU's name>.json")
    out.add_argument("--json", type=Path, metavar="PATH", help="every verdict and measurement, as they come")
    return parser


def _shard(given: str) -> Shard:
    try:
        tokens, hidden, ffn = map(int, given.split(","))
    except ValueError:
        raise ValueError(f"--shape takes M,H,F/P, three integers, got {given!r}") from None
    if tokens < 1 or hidden < 16 or ffn < 16 or hidden % 16 or ffn % 16:
        raise ValueError(f"--shape: M must be at least 1, H and F/P multiples of 16, which tiles need; got {given!r}")
    return given_shard(tokens, hidden, ffn)


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> Settings:
    """Return what was asked for. Raises: ValueError: arguments that do not fit, or nothing to run kernels on."""
    apart = args.list or args.dry_run or args.filter_only
    cuda = device_type == "cuda"
    if args.list + args.dry_run + args.filter_only > 1:
        raise ValueError("one of --list, --dry-run and --filter-only at a time")
    if not apart and not cuda and not interpreting():
        raise ValueError(
            "needs a CUDA device; without one --filter-only compiles candidates, and TRITON_INTERPRET=1 rehearses the "
            "search, where times mean nothing"
        )
    if cuda and interpreting():
        raise ValueError("TRITON_INTERPRET=1 is set: unset it to measure this GPU")
    if ranks.attached_world_size() is not None:
        raise ValueError("one GPU is tuned, in this process: not under torchrun")
    for flag, given in (("--arch", args.arch), ("--out", args.out)):
        if given is not None and (flag == "--arch") != bool(apart):
            raise ValueError(f"{flag} goes {'' if flag == '--arch' else 'not '}with --list, --dry-run or --filter-only")
    if args.shape and args.regime:
        raise ValueError("--shape stands in place of --regime: give one of them")
    for flag, number in (("--budget", args.budget), ("--candidates", args.candidates)):
        if not 0 < number < float("inf"):
            raise ValueError(f"{flag} must be positive, got {number}")
    if args.resume and args.json is None:
        raise ValueError("--resume goes on from the file of --json: give it")
    if not apart and not cuda and args.out is None:
        raise ValueError("a rehearsal's file is no GPU's: say with --out where to")
    if missing := tables.missing_extras(["tabulate"]):
        raise ValueError(missing)
    device = torch.device(device_type)
    out = args.out if args.out or apart else _tuned.file_of(environment.device_name(device))
    check_writable(args.json, out)
    arch = args.arch or arch_of(device)
    return Settings(arch, args.arithmetic, args.budget, out, args.json, args.resume, command)


def surroundings(rank: Rank, settings: Settings, measured: bool) -> Row:
    """Return the fields of every row that say where and with what; verdicts alone are of no device and no torch."""
    row = environment.describe(rank) | {"command": settings.command, "arch": settings.arch}
    row["kernels"] = environment.kernels_digest()
    if not measured:
        return row | {"device": None, "torch": None}
    return row | ({} if rank.device.type == "cuda" else {"device": "interpreter"})


def planned(args: argparse.Namespace, settings: Settings, device_type: str) -> Candidates:
    """Return what is to be searched. Raises: ValueError: an unknown name, or nothing."""
    kernels = names(args.kernel, KERNELS, "kernel") if args.kernel else KERNELS
    regimes = names(args.regime, tuple(KERNELS_OF), "regime") if args.regime else tuple(KERNELS_OF)
    shards = [_shard(given) for given in args.shape or ()]
    rehearsed = interpreting() and device_type == "cpu" and not (args.list or args.dry_run or args.filter_only)
    if rehearsed and not shards and args.regime is None:
        shards = [REHEARSAL]
    cases = all_cases(shards or shards_of(regimes), kernels, settings.arithmetic)
    if not cases:
        raise ValueError(f"nothing to tune: no case of {', '.join(kernels)} in {', '.join(regimes)}")
    found = {case: candidates(case, settings.arch, args.candidates) for case in cases}
    return {case: configs for case, configs in found.items() if configs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    with matmul_precision(ARITHMETICS[args.arithmetic]):
        try:
            settings = settings_of(args, device_type, command)
            candidates = planned(args, settings, device_type)
            if args.list or args.dry_run:
                print(tune_report.cases(candidates) if args.list else tune_report.plan(candidates, settings.budget_s))
                return 0
            device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
            rank = Rank(0, 1, device, ranks.cores(), None)
            state = State(settings.state, surroundings(rank, settings, measured=not args.filter_only), settings.resume)
        except ValueError as error:
            parser.error(str(error))
        budget = Budget(settings.budget_s)
        if args.filter_only:
            found = filter_all(candidates, state, settings.arch, settings.arithmetic, budget)
            print(tune_report.verdicts(candidates, state, found))
            say_written(args.json)
            return int(bool(found.failed))
        interpreter.install()  # nothing where kernels are compiled
        found = search(rank, candidates, state, settings.arch, settings.arithmetic, budget)
    content = tune_rows.file_of(state)
    print(tune_report.results(content, state.surroundings, found))
    written = settings.out if content["rows"] else None
    if written is not None:
        tune_rows.write(tune_rows.merged(content, written), written)
    say_written(args.json, written)
    return int(bool(found.failed))


if __name__ == "__main__":
    exit_with(main)
