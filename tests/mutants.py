"""A test of the tests: make one mistake at a time in a copy of the sources; the tests must notice each.

    python tests/mutants.py                           # all of them
    python tests/mutants.py --only linear_dact        # those whose file or name matches a regular expression
    python tests/mutants.py --list --only 'gate|up'   # name them only
    python tests/mutants.py --jobs 4 --json found.json

Each mutant (mutants_of_kernels.py, mutants_of_package.py) names the tests that must notice it. They run unbroken first,
then once per mutant:

    caught     tests ran, and one of them failed
    SURVIVED   all passed: a test is missing
    broken     the tests do not pass unbroken, or the mutant is no mistake but a typo: nothing could be imported

Exit status 1 unless every mutant is caught, 2 when a mutant's text does not stand exactly once in its file.
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

import mutants_of_kernels
import mutants_of_package

ROOT = Path(__file__).resolve().parents[1]
# bench holds what tests/jit_launches.py imports.
COPIED = ("kernels", "tpffn_triton", "tests", "bench")
TEST_SECONDS, RUN_SECONDS = 120, 600
# What Python and Triton say of a text that makes no sense, which is no test's merit.
TYPO = re.compile(r"\b(?:Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Compilation)Error\b")
PROBE = """\
import tpffn_triton, pathlib
def test_the_copy_is_imported():
    assert pathlib.Path(tpffn_triton.__file__).is_relative_to(pathlib.Path.cwd())
"""


class Mutant(NamedTuple):
    """Replace `text`, which stands once in `file`, and the `tests` (arguments of pytest) must fail."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str


class Outcome(NamedTuple):
    """What a run of tests came to; `detail` is the test that failed and why, or what went wrong."""

    verdict: str
    detail: str
    seconds: float


MUTANTS = [
    Mutant(name, file, *rest)
    for files in (mutants_of_kernels.MUTANTS, mutants_of_package.MUTANTS)
    for file, entries in files.items()
    for name, *rest in entries
]


def misplaced(mutants: Iterable[Mutant]) -> list[str]:
    """Say of each mutant whose text does not stand exactly once in its file how often it does."""
    counts = ((m, (ROOT / m.file).read_text().count(m.text)) for m in mutants)
    return [f"{m.name}: stands {count} times in {m.file}: {m.text!r}" for m, count in counts if count != 1]


def judge(status: int, output: str) -> tuple[str, str]:
    """Return (verdict, detail) of pytest's exit status and verbose output."""
    failed = re.search(r"^FAILED (\S+::.*?)(?: - (.*))?$", output, re.MULTILINE)
    if status == 0 and re.search(r"\b[1-9]\d* passed", output):
        return "SURVIVED", "all tests passed"
    if status < 0:
        started = [line for line in output.splitlines() if re.match(r"tests/\S+::", line)]
        # SIGKILL comes from outside: memory, or a time limit.
        caught = started and status != -signal.SIGKILL
        test = started[-1].partition("Fatal")[0].strip() if started else "before any test"
        return "caught" if caught else "broken", f"{test}: {signal.Signals(-status).name}"
    if status != 1 or not failed:
        last = (output.strip().splitlines() or ["no output"])[-1]
        return "broken", f"pytest exits with {status}: {last.strip('= ')}"
    test, reason = failed[1], failed[2] or ""
    if TYPO.search(reason):
        return "broken", f"{test}: {reason}"
    return "caught", f"{test}: {reason}"


def run(tests: str, mutant: Mutant | None = None) -> Outcome:
    """Run tests in a copy of the sources, broken by the mutant; the copy shadows the installed package."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is None:
            (copy / "tests" / "test_probe.py").write_text(PROBE)
        else:
            path = copy / mutant.file
            path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
        file, *options = shlex.split(tests)
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += [f"--timeout={TEST_SECONDS}", "--hypothesis-seed=0", f"tests/{file}", *options]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500"}
        try:
            result = subprocess.run(
                command,
                cwd=copy,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Outcome("broken", f"no end after {RUN_SECONDS} s", time.monotonic() - start)
    return Outcome(*judge(result.returncode, result.stdout), time.monotonic() - start)


def run_all(jobs: dict, pool: ThreadPoolExecutor, title: str) -> dict:
    """Run (tests, mutant) of each key; return key → outcome. One line on stderr for each that has finished."""
    futures = {pool.submit(run, *job): key for key, job in jobs.items()}
    outcomes = {}
    for number, future in enumerate(as_completed(futures), 1):
        key, outcome = futures[future], future.result()
        outcomes[key] = outcome
        print(f"{title} {number}/{len(jobs)}  {outcome.seconds:4.0f} s  {outcome.verdict:<8}  {key}", file=sys.stderr)
    return outcomes


def examine(mutants: list[Mutant], jobs: int) -> dict[Mutant, Outcome]:
    """Return every mutant's outcome: broken where its tests fail without it."""
    pool = ThreadPoolExecutor(jobs)
    try:
        selections = dict.fromkeys(["test_probe.py", *(m.tests for m in mutants)])
        unbroken = run_all({tests: (tests,) for tests in selections}, pool, "unbroken")
        if unbroken["test_probe.py"].verdict != "SURVIVED":
            raise SystemExit(f"the copy is not what the tests import: {unbroken['test_probe.py'].detail}")
        sound = [m for m in mutants if unbroken[m.tests].verdict == "SURVIVED"]
        found = run_all({m.name: (m.tests, m) for m in sound}, pool, "mutant")
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        m: found.get(m.name)
        or unbroken[m.tests]._replace(verdict="broken", detail=f"without it: {unbroken[m.tests].detail}")
        for m in mutants
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, examine the selected mutants, print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one a core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there as well")
    args = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if re.search(args.only, f"{m.file} {m.name}", re.IGNORECASE)]
    if not mutants:
        parser.error(f"no mutant matches {args.only!r}; --list shows them")
    if problems := misplaced(mutants):
        print("\n".join(problems), file=sys.stderr)
        return 2
    width = max(len(m.name) for m in mutants)
    if args.list:
        for m in mutants:
            print(f"{m.name:<{width}}  {m.file:<26}  {m.tests}")
        return 0
    outcomes = examine(mutants, args.jobs)
    for m, outcome in outcomes.items():
        print(
            f"{outcome.verdict:<8}  {outcome.seconds:4.0f} s  {m.name:<{width}}  {m.file:<26}  {outcome.detail[:160]}"
        )
    caught = sum(outcome.verdict == "caught" for outcome in outcomes.values())
    print(f"caught {caught} / total {len(outcomes)}")
    if args.json:
        args.json.write_text(json.dumps([m._asdict() | o._asdict() for m, o in outcomes.items()], indent=1))
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
