"""What the benchmarks' command lines share."""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

SIZES = {"batch": "batch B", "seq": "sequence length S", "hidden": "hidden_size H", "ffn": "full F"}
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


class OneLineErrorParser(argparse.ArgumentParser):
    """Wrong arguments end in one line and exit status 2; description and epilog are printed as they are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def parsed(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, str, str]:
        """Return the arguments (None: this process's), the command that they make, and the type of device here."""
        arguments = sys.argv[1:] if argv is None else argv
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        return self.parse_args(arguments), shlex.join([f"bench/{self.prog}", *arguments]), device_type

    def failed(self, error: Exception) -> int:
        """Say why the measurement failed; returns the exit status."""
        print(f"{self.prog}: {error}", file=sys.stderr)
        return 1

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's ranks one speaks
        self.exit(2, f"{self.prog}: error: {message}\n" if first else None)


def names(given: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the comma-separated names. Raises: ValueError: one that is not known."""
    found = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in found:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: one of {', '.join(known)}")
    return found


def add_sizes(to: Any, defaults: Mapping[str, object]) -> None:
    """Add a flag for each of a layer's sizes to a parser or a group; defaults: for the help alone."""
    for name, meaning in SIZES.items():
        to.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: {defaults[name]})")


def given_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that were given, by name."""
    return {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}


def numbers(given: str, flag: str, symbol: str, least: int) -> tuple[int, ...]:
    """Return every number of "1,2,4", ascending. Raises: ValueError: another form, or one below the least."""
    try:
        found = tuple(sorted({int(number) for number in given.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < least:
        raise ValueError(f"{flag} takes {symbol},{symbol},... with every {symbol} at least {least}, got {given!r}")
    return found


def check_writable(*paths: Path | None) -> None:
    """Make the paths' folders now: better to fail before the measurement than after it. Raises: ValueError."""
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}: {'a directory' if path.is_dir() else 'no permission'}")


def check_alone(parser: argparse.ArgumentParser, args: argparse.Namespace, outputs: Sequence[str]) -> None:
    """Check that nothing goes with --from but where to write, `outputs`. Raises: ValueError: it does."""
    for name, value in vars(args).items():
        if name not in ("results", *outputs) and value != parser.get_default(name):
            raise ValueError(f"--from measures nothing: it cannot go with --{name.replace('_', '-')}")


def check_plot(path: Path | None) -> None:
    """Raises: ValueError: a suffix that matplotlib is not asked for here."""
    if path is not None and path.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot writes {', '.join(PLOT_SUFFIXES[:-1])} or {PLOT_SUFFIXES[-1]}, got {path}")


def say_written(*paths: Path | None) -> None:
    """Name on stderr what was written."""
    for path in paths:
        if path is not None and path.exists():
            print(f"wrote {path}", file=sys.stderr)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Exit with main's status, or as a shell does after an interrupt."""
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
