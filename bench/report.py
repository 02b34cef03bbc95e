"""Report what bench/peers.py measured: as tables, a chart, pictures, in README files, against the project's goals.

`python bench/report.py --help` has the flags. Rows: report_rows.py; tables: report_table.py; goals: report_goals.py;
pictures: report_plots.py.

Exit status: 0, 1 a page is not up to date (--check), 2 wrong arguments or files.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import report_goals
import report_plots
import report_rows
import report_table
import tables
import terminal_chart
from command_line import PLOT_SUFFIXES, OneLineErrorParser, check_writable, exit_with, say_written
from report_rows import Section

DESCRIPTION = """\
Report result files of bench/peers.py: a table and a chart of each peer's time over ours in the terminal or, with
one of the flags, pictures, a table in Markdown files, or how far the project's goals are met.

Every device, dtype and activation is reported by itself. A ratio above 1: ours is faster.
"""
EPILOG = f"""\
pictures (only those for which there are rows):
  speedup     each peer's time over ours, p50 and p20 to p80
  roofline    TFLOP/s by FLOPs per byte, below what the device reaches at best
  latency     time by tokens M, where one H and F/P were measured at several
  memory      bytes kept for backward, and half of eager's

examples:
  python bench/report.py out.json                                     table and chart
  python bench/report.py h100.json h200.json --goals                  a goals table for each device
  python bench/report.py out.json --plots bench/out/plots --format svg
  python bench/report.py out.json --markdown bench/results/README.md
  python bench/report.py out.json --regime analysed --markdown README.md
  python bench/report.py out.json --markdown README.md --check        exit status 1: README.md is not up to date

--markdown replaces what stands between two lines of the page:
  {report_table.BEGIN}
  {report_table.END}
"""


def build_parser() -> OneLineErrorParser:
    """Return the command line's parser."""
    parser = OneLineErrorParser(prog="report.py", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="what peers.py --json wrote")
    parser.add_argument("--regime", metavar="NAME,...", help="rows of these regimes alone (analysed, decode, wide ...)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--plots", type=Path, metavar="FOLDER", help="draw into this folder")
    how.add_argument("--markdown", type=Path, nargs="+", metavar="PAGE.md", help="write the table into these files")
    how.add_argument("--goals", action="store_true", help="print the goals: met, missed by how much, not yet measured")
    formats = [suffix[1:] for suffix in PLOT_SUFFIXES]
    parser.add_argument("--format", choices=formats, help="of --plots (default: png)")
    parser.add_argument(
        "--check", action="store_true", help="with --markdown: only say whether the files are up to date"
    )
    return parser


def _checked(args: argparse.Namespace) -> list[Section]:
    """Return the files' sections. Raises: ValueError: arguments, files or packages that do not do."""
    if args.check and not args.markdown:
        raise ValueError("--check needs --markdown")
    if args.format and not args.plots:
        raise ValueError("--format needs --plots")
    package = "matplotlib" if args.plots else None if args.markdown else "tabulate"
    if package and (missing := tables.missing_extras([package])):
        raise ValueError(missing)
    if args.plots:
        check_writable(args.plots / "speedup.png")
    return report_rows.load(args.files, None if args.regime is None else args.regime.split(","))


def _pages(sections: list[Section], pages: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Return page → (text, text with the table made anew). Raises: ValueError: a page that has no place for it."""
    found = {}
    for page in pages:
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {page}: {error}") from None
        found[page] = text, report_table.replaced(text, report_table.markdown(sections, page), page)
    return found


def _write_pages(pages: dict[Path, tuple[str, str]], check: bool) -> int:
    stale = [page for page, (text, anew) in pages.items() if text != anew]
    if check:
        for page in pages:
            print(f"{page}: {'not up to date' if page in stale else 'up to date'}", file=sys.stderr)
        return int(bool(stale))
    for page, (_, anew) in pages.items():
        tables.write_text(page, anew)
    say_written(*pages)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. SystemExit (2, or 0 for --help) comes from argparse."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        sections = _checked(args)
        pages = _pages(sections, args.markdown or ())
        check_writable(*(pages if not args.check else ()))
        if args.plots:
            written, left_out = report_plots.write_all(sections, args.plots, args.format or "png")
    except ValueError as error:
        parser.error(str(error))
    if args.markdown:
        return _write_pages(pages, args.check)
    if args.plots:
        say_written(*written)
        for line in left_out:
            print(f"left out {line}", file=sys.stderr)
        return 0
    if args.goals:
        _say(report_goals.table(sections))
        return 0
    _say("\n\n\n".join(map(_table_and_chart, sections)))
    return 0


def _table_and_chart(section: Section) -> str:
    table, charted = report_table.terminal(section), report_table.charted(section)
    if not charted:
        return table
    blocks = terminal_chart.shows_blocks(sys.stdout.encoding)
    bars = terminal_chart.bars(charted, shutil.get_terminal_size().columns, blocks)
    return f"{table}\n\nEach peer's time over ours; past the mark (1.0) ours is faster.\n\n{bars}"


def _say(text: str) -> None:
    print(terminal_chart.printable(text, sys.stdout.encoding))


if __name__ == "__main__":
    exit_with(main)
