"""Measure what docs/analysis.md shows, and write its tables and plots again.

    python bench/write_analysis.py --measure --results DIR    what `make analysis` does: some five minutes on 4 cores
    python bench/write_analysis.py                            tables and plots again, from the files it names
    python bench/write_analysis.py --check                    only say whether its tables are up to date

--measure runs bench/traffic_bench.py, then bench/strategy_bench.py, on a tree without uncommitted changes: results
name their commit. Tables stand in the document between

    <!-- table: NAME --> and <!-- end -->

and come from the plan and from the results' JSON (analysis_tables.py). Links to the results follow --results.

Exit status: 0, 1 something failed or, with --check, is not up to date, 2 wrong arguments.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import analysis_tables
import environment
from command_line import OneLineErrorParser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "analysis.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LINK = re.compile(r"\]\(\.\./(bench/results/[^/)]+)/")
TRAFFIC, STRATEGY = "traffic.json", "strategy.json"
OUT = "bench/out/analysis"


def written(text: str, folder: Path) -> str:
    """Return the document with its tables made anew from the results in folder, and its links leading there.

    Raises: ValueError: a table that nothing makes. OSError: a file of results is missing.
    """
    results = analysis_tables.load(folder / TRAFFIC, folder / STRATEGY)

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in analysis_tables.TABLES:
            raise ValueError(f"no table {name!r}: one of {', '.join(analysis_tables.TABLES)}")
        return f"{begin}\n{analysis_tables.TABLES[name](results)}\n\n{end}"

    where = folder.resolve().relative_to(ROOT).as_posix()
    return LINK.sub(lambda _: f"](../{where}/", BLOCK.sub(block, text))


def linked(text: str) -> Path:
    """Return the folder of results that the document names. Raises: ValueError: none, or several."""
    folders = {*LINK.findall(text)}
    if len(folders) != 1:
        raise ValueError(f"{DOCUMENT.relative_to(ROOT)} names {len(folders)} folders of results, one is expected")
    return ROOT / folders.pop()


def _run(*command: str) -> None:
    print(f"running {' '.join(command)}", file=sys.stderr)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineErrorParser(prog="write_analysis.py", description=__doc__)
    parser.add_argument("--results", type=Path, metavar="DIR", help="below bench/results (default: the document's)")
    parser.add_argument("--measure", action="store_true", help="measure into --results first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    text = DOCUMENT.read_text(encoding="utf-8")
    try:
        folder = linked(text) if args.results is None else args.results.resolve()
        if not folder.is_relative_to(ROOT / "bench" / "results"):
            raise ValueError(f"--results must lie below bench/results, so that the document can link to it: {folder}")
        if args.measure and (args.results is None or args.check):
            raise ValueError("--measure needs --results, and cannot go with --check")
        if args.measure and (changed := environment.uncommitted_changes()):
            raise ValueError(f"--measure needs a tree without uncommitted changes, has {len(changed)}: {changed[0]}")
    except ValueError as error:
        parser.error(str(error))
    here = folder.relative_to(ROOT).as_posix()
    try:
        if args.measure:
            # Into a folder that git ignores: the second benchmark's tree is as clean as the first one's.
            _run("bench/traffic_bench.py", "--json", f"{OUT}/{TRAFFIC}")
            _run("bench/strategy_bench.py", "--json", f"{OUT}/{STRATEGY}")
            folder.mkdir(parents=True, exist_ok=True)
            for name in (TRAFFIC, STRATEGY):
                shutil.move(ROOT / OUT / name, folder / name)
        if not args.check:
            _run("bench/traffic_bench.py", "--from", f"{here}/{TRAFFIC}", "--plot", f"{here}/traffic.png")
            _run("bench/strategy_bench.py", "--from", f"{here}/{STRATEGY}", "--plots", here)
        anew = written(text, folder)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"write_analysis.py: {error}", file=sys.stderr)
        return 1
    if args.check:
        print("up to date" if anew == text else "docs/analysis.md is not up to date: make analysis", file=sys.stderr)
        return int(anew != text)
    DOCUMENT.write_text(anew, encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and the plots in {here}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
