"""Show points as tables, for a terminal and for Markdown.

A line a point: our time, each peer's time over ours, our error and what we keep for backward over eager's. A ratio
below 1 looks like one above it: the peer was faster.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import tables
from peer import FUSED, TWO_GEMMS
from report_rows import Point, Section

BEGIN, END = "<!-- bench/report.py: peers -->", "<!-- end -->"
_NONE = "–"
# Peers that get a column in Markdown, where a page has room for nine columns in all.
_MOST_PEERS = 4
_OTHERS = "others"

Columns = dict[str, Callable[[Point], str]]


def terminal(section: Section) -> str:
    """Return a table, below what ran where and above the notes that it needs."""
    import tabulate

    tabulate.MIN_PADDING = 0
    columns = {"shape M×H×F/P": _shape, **_columns(section, section.peers)}
    files = _files(section)
    if len(files) > 1:
        columns["file"] = lambda point: str(point.file)
    headers = [name.replace("-", "-\n").replace(" ÷ ", "\n÷ ").replace(" [", "\n[") for name in columns]
    lines = [[show(point) for show in columns.values()] for point in section.points]
    align = ["left" if name.startswith(("shape", "step", "file")) else "right" for name in columns]
    body = tabulate.tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=align)
    ran = "\n".join(dict.fromkeys(tables.surroundings(row) for row in section.rows))
    return f"{_heading(section)}; {', '.join(map(str, files))}\n{ran}\n\n{body}\n\n" + "\n".join(_notes(section))


def charted(section: Section) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return what terminal_chart.bars draws: each point's title and its peers' ratios, where ours was timed too."""
    found = []
    for point in section.points:
        if ratios := point.ratios():
            found.append((point.words, [(peer, ratios[peer]) for peer in section.peers if peer in ratios]))
    return found


def markdown(sections: Sequence[Section], page: Path) -> str:
    """Return every section's table for a page of Markdown, with links from there to the files."""

    def link(name: str, file: Path) -> str:
        return f"[{name}]({quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())})"

    def linked(point: Point) -> str:
        name, _, sizes = _shape(point).partition(" ")
        return f"{link(name, point.file)} {sizes}"

    parts = []
    for section in sections:
        files = _files(section)
        sources = ", ".join(link(file.name, file) for file in files)
        alone = section.peers[: len(section.peers) if len(section.peers) <= _MOST_PEERS else _MOST_PEERS - 1]
        columns = {"shape M×H×F/P": linked if len(files) > 1 else _shape, **_columns(section, alone)}
        headers = [name if number < 2 else f">{name}" for number, name in enumerate(columns)]
        body = tables.markdown(headers, [[show(point) for show in columns.values()] for point in section.points])
        notes = " ".join([*_notes(section, labels=False), "Who is who: `bench/peers.py --list-peers`."])
        parts.append(f"**{_heading(section)}; {section.commits}**, {sources}\n\n{body}\n\n{notes}")
    return "\n\n".join(parts)


def replaced(text: str, block: str, page: Path) -> str:
    """Return a page's text with the block between its marks. Raises: ValueError: it has no such marks, or several."""
    begin, rest = text.partition(BEGIN)[::2]
    end = rest.find(END)
    if text.count(BEGIN) != 1 or end < 0:
        raise ValueError(f"{page} needs a line '{BEGIN}' once and, after it, a line '{END}'")
    return f"{begin}{BEGIN}\n\n{block}\n\n{rest[end:]}"


def _files(section: Section) -> list[Path]:
    return [*dict.fromkeys(point.file for point in section.points)]


def _heading(section: Section) -> str:
    how = f"; {section.hows[0]}" if len(section.hows) == 1 and section.hows[0] else ""
    return f"{section.words}{how}"


def _columns(section: Section, alone: Sequence[str]) -> Columns:
    """Return header → cell: the peers in `alone` have a column each, others share one."""
    several = len(section.hows) > 1
    columns: Columns = {
        "step": lambda point: f"{point.step}, {point.how}" if several else point.step,
        "ours [p20–p80]": _ours,
    }
    columns |= {peer: lambda point, peer=peer: _ratio(point, peer) or _NONE for peer in alone}  # type: ignore[misc]
    others = [peer for peer in section.peers if peer not in alone]
    if others:
        columns[_OTHERS] = lambda point: _each(point, others)
    return columns | {
        "error ÷ eager's": lambda point: _figure(point.figure(FUSED, "error_vs_eager")),
        "kept ÷ eager's": lambda point: _figure(point.saved_vs_eager()),
    }


def _shape(point: Point) -> str:
    name, *sizes = point.shape
    return f"{name} {'×'.join(map(str, sizes))}"


def _ours(point: Point) -> str:
    if FUSED not in point.rows:
        return _NONE
    quantiles = [point.rows[FUSED][f"ms_p{p}"] for p in (50, 20, 80)]
    unit, scale = ("ms", 1.0) if quantiles[0] >= 1 else ("µs", 1e3)
    p50, p20, p80 = (tables.ms(scale * ms) for ms in quantiles)
    return f"{p50} {unit} [{p20}–{p80}]"


def _ratio(point: Point, peer: str) -> str:
    ratio = point.ratios().get(peer)
    if ratio is None:
        return ""
    in_doubt = point.ratios(20)[peer] <= 1 <= point.ratios(80)[peer]
    digits = 3 if 0 < abs(ratio - 1) < 0.005 else 2  # what is not 1 does not read as 1
    return f"{'≈' if in_doubt else ''}{ratio:.{digits}f}"


def _each(point: Point, peers: Sequence[str]) -> str:
    return ", ".join(f"{peer} {ratio}" for peer in peers if (ratio := _ratio(point, peer))) or _NONE


def _figure(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _notes(section: Section, labels: bool = True) -> list[str]:
    """Return what there is to know of the figures; labels: also what each peer is."""
    rows = section.rows
    count = tables.rounds_of(rows, "iters")
    notes = [
        f"{count} interleaved rounds. By peer: its time over ours, median of rounds; above 1, ours is faster.",
        "≈: p20 to p80 of that ratio hold 1, no difference is seen.",
        "error: against fp64, the worst tensor over eager's. kept: bytes for backward beside x and parameters.",
    ]
    known = {row["impl"]: row["label"] for row in rows}
    if labels:
        notes += [f"{impl}: {known[impl].rstrip('.')}." for impl in (*section.peers, FUSED) if impl in known]
    if TWO_GEMMS in known:
        notes.append(f"{TWO_GEMMS} computes less than the layer: a bound, no peer.")
    if any(row["triton_interpret"] for row in rows):
        notes.append("The kernels ran in Triton's interpreter: THESE TIMES MEAN NOTHING.")
    return notes + tables.machine_notes(rows)
