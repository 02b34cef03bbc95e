"""Write report.py's pictures: one of each kind a section, where there are rows for it."""

import re
from collections.abc import Sequence
from pathlib import Path

import figures
import report_latency
import report_memory
import report_roofline
import report_speedup
from peer_styles import NothingToDraw, Styles
from report_rows import Section

KINDS = {
    "speedup": report_speedup.draw,
    "roofline": report_roofline.draw,
    "latency": report_latency.draw,
    "memory": report_memory.draw,
}


def write_all(sections: Sequence[Section], folder: Path, suffix: str) -> tuple[list[Path], list[str]]:
    """Write KIND.suffix, of several sections KIND_DEVICE_DTYPE_ACTIVATION.suffix.

    suffix    png, pdf or svg

    Returns what was written, and what was left out and why. Raises: ValueError: one point is in several files.
    """
    for section in sections:
        _check_once(section)
    plt = figures.pyplot()
    styles = Styles(sections)
    written, left_out = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        words = f"_{section.device}_{section.dtype}_{section.activation}" if len(sections) > 1 else ""
        of = re.sub(r"[^A-Za-z0-9_]+", "-", words)
        for kind, draw in KINDS.items():
            path = folder / f"{kind}{of}.{suffix}"
            try:
                figures.write(draw(plt, section, styles), path)
                written.append(path)
            except NothingToDraw as why:
                left_out.append(f"{path.name}: {why}")
    return written, left_out


def _check_once(section: Section) -> None:
    seen: dict[tuple, Path] = {}
    for point in section.points:
        file = seen.setdefault((point.shape, point.step, point.first["run"], point.first["l2"]), point.file)
        if file != point.file:
            raise ValueError(f"{point.words} is in {file} and in {point.file}: draw one of them at a time")
