"""A test of the tests: make one mistake at a time in a copy of the sources; the tests must notice each.

    python tests/mutants.py                           # all of them
    python tests/mutants.py --only linear_dact        # those whose file or name matches a regular expression
    python tests/mutants.py --list --only 'gate|up'   # only name them
    python tests/mutants.py --jobs 2 --json found.json --markdown docs/mutants.md

Each mutant (mutants_of_*.py) names the tests that must notice it. They run unbroken first,
then once per mutant, without a GPU:

    caught     tests ran, and one of them failed
    SURVIVED   all passed: a test is missing
    broken     the tests fail without the mutant as well; or it is no mistake but a typo, which anything would notice

Exit status: 0 when every mutant is caught, 1 when not, 2 when a text does not stand exactly once in its file.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import mutants_of_communication
import mutants_of_costs
import mutants_of_kernels
import mutants_of_megatron
import mutants_of_package
import mutants_of_partitionings
import mutants_of_ranks
import mutants_of_regimes
import mutants_of_replacement
import mutants_of_single_launch
import mutants_of_weight_grads

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("kernels", "tpffn_triton", "tests", "bench", "examples")  # the last two: imported by tests
TEST_SECONDS, RUN_SECONDS = 120, 600
TYPO = re.compile(r"\b(?:Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Compilation)Error\b")
HEADER = """\
# Mistakes that the tests notice

Each is made by itself in a copy of the sources; the tests beside it must then fail. caught {caught} / total {total}.
Written by

    make mutants MUTANTS_FLAGS="--markdown docs/mutants.md"

| mistake | file | verdict | tests |
|---|---|---|---|
"""
PROBE = """\
import pathlib, tpffn_triton
def test_the_copy_is_imported():
    assert pathlib.Path(tpffn_triton.__file__).is_relative_to(pathlib.Path.cwd())
"""


class Mutant(NamedTuple):
    """Replace `text`, which stands once in `file`, and one of `tests` (a file of tests/, and options) must fail."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str


class Outcome(NamedTuple):
    """A run of tests: "passed", "failed" or "broken", and which test failed and why, or what went wrong."""

    verdict: str
    detail: str
    seconds: float


SOURCES = (
    mutants_of_kernels,
    mutants_of_single_launch,
    mutants_of_package,
    mutants_of_megatron,
    mutants_of_replacement,
    mutants_of_partitionings,
    mutants_of_communication,
    mutants_of_costs,
    mutants_of_ranks,
    mutants_of_weight_grads,
    mutants_of_regimes,
)
MUTANTS = [
    Mutant(name, file, *rest)
    for files in (source.MUTANTS for source in SOURCES)
    for file, entries in files.items()
    for name, *rest in entries
]


def misplaced(mutants: Iterable[Mutant]) -> list[str]:
    """Return a message for each mutant whose text does not stand exactly once in its file."""
    counts = ((m, (ROOT / m.file).read_text().count(m.text)) for m in mutants)
    return [f"{m.name}: stands {count} times in {m.file}: {m.text!r}" for m, count in counts if count != 1]


def judge(status: int, output: str) -> tuple[str, str]:
    """Return the verdict and detail of pytest's exit status and verbose output."""
    if status == 0 and re.search(r"\b[1-9]\d* passed", output):
        return "passed", "all tests passed"
    if status < 0:
        started = [line for line in output.splitlines() if re.match(r"tests/\S+::", line)]
        # A crash is a failure of the test that ran; SIGKILL comes from outside.
        failed = started and status != -signal.SIGKILL
        test = started[-1].partition("Fatal")[0].strip() if started else "before any test"
        return "failed" if failed else "broken", f"{test}: {signal.Signals(-status).name}"
    failure = re.search(r"^FAILED (\S+::.*?)(?: - (.*))?$", output, re.MULTILINE)
    if status != 1 or not failure:
        last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
        return "broken", f"pytest exits with {status}: {last}"
    # What a rank raised stands inside of the message.
    errors = re.findall(r"^E +([\w.]*(?:Error|Failed|Exception)\b.*)$", output, re.MULTILINE)
    reason = errors[-1] if errors else failure[2] or ""
    return "broken" if TYPO.search(reason) else "failed", f"{failure[1]}: {reason}"


def run(tests: str, mutant: Mutant | None = None) -> Outcome:
    """Run tests in a copy of the sources, broken by the mutant; the copy shadows the installed package."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "tests" / "test_probe.py").write_text(PROBE)
        if mutant is not None:
            path = copy / mutant.file
            path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
        file, *options = shlex.split(tests)
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += [f"--timeout={TEST_SECONDS}", "--hypothesis-seed=0", f"tests/{file}", *options]
        settings = {
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "300",
        }
        try:
            result = subprocess.run(
                command,
                cwd=copy,
                env=os.environ | settings,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Outcome("broken", f"no end after {RUN_SECONDS} s", time.monotonic() - start)
    return Outcome(*judge(result.returncode, result.stdout), time.monotonic() - start)


def run_all(runs: dict[str, tuple], pool: ThreadPoolExecutor, title: str, words: dict) -> dict[str, Outcome]:
    """Return key → outcome of key → arguments of `run`, verdicts in other words; prints a line on stderr for each that
    has finished."""
    futures = {pool.submit(run, *arguments): key for key, arguments in runs.items()}
    outcomes = {}
    for number, future in enumerate(as_completed(futures), 1):
        key, outcome = futures[future], future.result()
        outcomes[key] = outcome = outcome._replace(verdict=words.get(outcome.verdict, outcome.verdict))
        print(f"{title} {number}/{len(runs)}  {outcome.seconds:4.0f} s  {outcome.verdict}  {key}", file=sys.stderr)
    return outcomes


def examine(mutants: list[Mutant], jobs: int) -> dict[Mutant, Outcome]:
    """Return every mutant's outcome, with the verdicts of the module docstring."""
    words = {"passed": "SURVIVED", "failed": "caught"}
    pool = ThreadPoolExecutor(jobs)
    try:
        selections = dict.fromkeys(["test_probe.py", *(m.tests for m in mutants)])
        unbroken = run_all({tests: (tests,) for tests in selections}, pool, "unbroken", {})
        if unbroken["test_probe.py"].verdict != "passed":
            raise SystemExit(f"the copy is not what the tests import: {unbroken['test_probe.py'].detail}")
        sound = [m for m in mutants if unbroken[m.tests].verdict == "passed"]
        found = run_all({m.name: (m.tests, m) for m in sound}, pool, "mutant", words)
    finally:
        pool.shutdown(cancel_futures=True)
    for m in mutants:
        without = unbroken[m.tests]
        found.setdefault(m.name, Outcome("broken", f"without the mutant: {without.detail}", without.seconds))
    return {m: found[m.name] for m in mutants}


def markdown(outcomes: dict[Mutant, Outcome]) -> str:
    """Return docs/mutants.md."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes.values())
    rows = [f"| {m.name} | `{m.file}` | {o.verdict} | `{m.tests}` |" for m, o in outcomes.items()]
    return HEADER.format(caught=caught, total=len(outcomes)) + "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, examine the selected mutants, print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=os.cpu_count(), help="runs at a time; default: one a core"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcomes there as well")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write a table of them there")
    args = parser.parse_args(arguments)
    if args.only and args.markdown:
        parser.error("--markdown is for all mutants, not for those of --only")
    mutants = [m for m in MUTANTS if re.search(args.only, f"{m.file} {m.name}", re.IGNORECASE)]
    if not mutants:
        parser.error(f"no mutant matches {args.only!r}; --list shows them")
    if problems := misplaced(mutants):
        print("\n".join(problems), file=sys.stderr)
        return 2
    names, files = (max(map(len, column)) for column in ([m.name for m in mutants], [m.file for m in mutants]))
    if args.list:
        for m in mutants:
            print(f"{m.name:<{names}}  {m.file:<{files}}  {m.tests}")
        return 0
    outcomes = examine(mutants, args.jobs)
    for m, outcome in outcomes.items():
        verdict = f"{outcome.verdict:<8}  {outcome.seconds:3.0f} s"
        print(f"{verdict}  {m.name:<{names}}  {m.file:<{files}}  {outcome.detail[:150]}")
    caught = sum(outcome.verdict == "caught" for outcome in outcomes.values())
    print(f"caught {caught} / total {len(outcomes)}")
    if args.json:
        args.json.write_text(json.dumps([m._asdict() | o._asdict() for m, o in outcomes.items()], indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(outcomes))
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
