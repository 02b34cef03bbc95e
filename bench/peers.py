"""Compare one rank's shard of the FFN with every other implementation that is installed here.

`python bench/peers.py --help` has the flags. Peers: peer_implementations.py; shapes: shards.py; what of them is
to be measured: peer_settings.py; figures: peers_measure.py.

Exit status: 0, 1 something of ours was wrong or failed, 2 wrong arguments. A peer of others that fails is named only.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401
import peer_implementations
import ranks
import tables
import torch
from command_line import OneLineErrorParser, check_writable, exit_with, names, numbers, say_written
from peer import Place
from peer_implementations import PEERS
from peer_results import Results
from peer_settings import Settings
from peer_table import table
from peers_measure import measure
from shards import GRIDS, REGIMES, SHARDS, Shard, shard
from workloads import DTYPES, MODES

from tpffn_triton.interpreter import interpreting
from tpffn_triton.kernels.activations import ACTIVATIONS

DESCRIPTION = """\
Time one rank's shard of the FFN, P=1 and nothing communicated, by every peer that is installed, ours among them.

Each is first compared with fp64: one that is wrong, or raises, is named and not timed; the others go on. Rounds
interleave them, in one process, on the same random tensors, with biases.
"""
_NAMED = "\n".join(
    f"  {name:18}{s.regime:10}M={s.shape.tokens} H={s.shape.hidden} F/P={s.shape.ffn}" for name, s in SHARDS.items()
)
_ON_CPU = ", ".join(s.shape.name for s in GRIDS["cpu"])
EPILOG = f"""\
shapes:
{_NAMED}

  default on a CPU: {_ON_CPU},
  in fp32, about a minute on two idle cores. On CUDA, in bf16: all that are not small

figures:
  ÷ fused     a peer's time over fused's, by round: above 1 fused is faster
  saved MiB   kept for backward beside x and the parameters; peak MiB: what a step needs beyond its inputs
  roofline    least possible time on this GPU over the time; GB/s: least bytes over the time
  rel err     ‖out − ref‖ / ‖ref‖ against fp64, the worst of y and the gradients

examples:
  python bench/peers.py --list-peers --activation gelu_tanh          who is here, and how to install the others
  python bench/peers.py                                              the default shapes of this machine
  python bench/peers.py --activation gelu_tanh --budget 300 --json peers.json --csv peers.csv
  python bench/peers.py --regime decode --run graph --l2 cold,warm --peers eager,compile,fused
  python bench/peers.py --regime wide --mode fwd --peers two-gemms,eager,fused
  python bench/peers.py --tokens 64,256 --hidden 2048 --ffn 2048 --quick
  python bench/peers.py --json peers.json --resume                   go on after a run that was stopped
"""
RUNS, L2S = ("eager", "graph"), ("cold", "warm")
_SIZES = {"hidden": 1024, "ffn": 1024}


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(prog="peers.py", description=DESCRIPTION, epilog=EPILOG)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--peers", metavar="NAME,...", help="default: all that are here")
    what.add_argument("--list-peers", action="store_true", help="say which are here, and why not the others; then stop")
    what.add_argument("--shapes", metavar="NAME,...", help="named shapes, below")
    what.add_argument("--regime", metavar="NAME,...", help=f"of the default shapes, those of {', '.join(REGIMES)}")
    what.add_argument("--tokens", metavar="M,...", help="other sizes, in the place of named ones: tokens M")
    for name, meaning in (("hidden", "H"), ("ffn", "F/P")):
        default = f"with --tokens: {meaning} (default: {_SIZES[name]})"
        what.add_argument(f"--{name}", type=int, metavar="N", help=default)
    what.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="default: %(default)s (erf)")
    what.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on CUDA")
    what.add_argument("--mode", choices=MODES, help="forward alone, or forward and backward (default: both)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--run", metavar="NAME,...", help="eager: launches count; graph: replays (default: both, CPU: eager)"
    )
    how.add_argument("--l2", metavar="NAME,...", help="cold: overwritten; warm: as the step leaves it (default: cold)")
    how.add_argument(
        "--iters", type=int, metavar="N", help="timed rounds (default: what fits in 15 s, GPU 5 s, or the --budget)"
    )
    how.add_argument("--quick", action="store_true", help="few rounds and little warm-up; figures are rough")
    how.add_argument("--budget", type=float, metavar="SECONDS", help="divided over the shapes; says what it leaves out")
    out = parser.add_argument_group("where to (besides the table on stdout; progress is on stderr)")
    out.add_argument("--json", type=Path, metavar="PATH", help="write a list of objects, one a row, after every shape")
    out.add_argument("--csv", type=Path, metavar="PATH", help="write the same as CSV")
    out.add_argument("--resume", action="store_true", help="measure what has no row in the --json of this commit, here")
    return parser


def _shards(args: argparse.Namespace, device_type: str) -> tuple[Shard, ...]:
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    given = [flag for flag in ("shapes", "regime", "tokens") if getattr(args, flag) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both say which shapes: give one")
    if sizes and "tokens" not in given:
        raise ValueError(f"--{next(iter(sizes))} needs --tokens: without it named shapes are measured")
    if args.tokens is not None:
        every_m = numbers(args.tokens, "--tokens", "M", least=1)
        widths = _SIZES | sizes
        return tuple(shard("other", f"{m}x{widths['hidden']}x{widths['ffn']}", m, **widths) for m in every_m)
    if args.shapes is not None:
        return tuple(SHARDS[name] for name in names(args.shapes, list(SHARDS), "shape"))
    here = tuple(dict.fromkeys(s.regime for s in GRIDS[device_type]))
    regimes = here if args.regime is None else names(args.regime, here, "regime here")
    return tuple(s for s in GRIDS[device_type] if s.regime in regimes)


def _place(args: argparse.Namespace, device_type: str) -> Place:
    cuda = device_type == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    return Place(device_type, args.dtype or ("bf16" if cuda else "fp32"), args.activation, capability)


def settings_of(args: argparse.Namespace, device_type: str, command: str) -> Settings:
    """Return what to measure. Raises: ValueError: arguments that do not fit."""
    cuda, place = device_type == "cuda", _place(args, device_type)
    peers = None if args.peers is None else names(args.peers, list(PEERS), "peer")
    shards = _shards(args, device_type)
    modes = (args.mode,) if args.mode else MODES
    if cuda and interpreting():
        raise ValueError("TRITON_INTERPRET=1 is set: unset it to measure this GPU")
    if ranks.attached_world_size() is not None:
        raise ValueError("one rank's shard is timed, in this process: not under torchrun")
    runs = names(args.run, RUNS, "run") if args.run else RUNS if cuda else RUNS[:1]
    l2s = names(args.l2, L2S, "state of L2") if args.l2 else L2S[:1] if cuda else ("as left",)
    for flag, given in (("--run graph", "graph" in runs), ("--l2", args.l2), ("--dtype tf32", args.dtype == "tf32")):
        if given and not cuda:
            raise ValueError(f"{flag} needs a CUDA device")
    if args.iters is not None and args.iters < 1:
        raise ValueError(f"--iters must be at least 1, got {args.iters}")
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget must be above 0 seconds, got {args.budget}")
    if args.resume and args.json is None:
        raise ValueError("--resume needs --json, the file that a run before has written")
    for peer in peer_implementations.chosen(peers, place) if peers else ():
        if not any(peer.is_timed(s.shape.name, mode) for s in shards for mode in modes):
            raise ValueError(f"peer {peer.name} is not timed at these shapes in {' or '.join(modes)}: {peer.label}")
    if missing := tables.missing_extras(["tabulate"]):
        raise ValueError(missing)
    check_writable(args.json, args.csv)
    how = {"rounds": args.iters, "quick": args.quick, "budget_s": args.budget}
    return Settings(shards, peers, place, modes, runs, l2s, command=command, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args, command, device_type = parser.parsed(argv)
    if args.list_peers:
        print(peer_implementations.listing(_place(args, device_type)))
        return 0
    results = Results(args.json, args.csv)
    try:
        settings = settings_of(args, device_type, command)
        if args.resume:
            results.resume()
    except ValueError as error:
        parser.error(str(error))
    untimed = ranks.run(lambda rank, given: measure(rank, given, results), settings, 1, device_type)
    results.write()
    print(table(results.rows(), untimed))
    say_written(args.json, args.csv)
    return 1 if untimed.ours_refused else 0


if __name__ == "__main__":
    exit_with(main)
