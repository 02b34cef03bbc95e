"""Draw ratios as bars of characters, for a terminal."""

import textwrap
from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEAST_BAR = 8
_MOST = 4.0  # a bar that would be longer ends in an arrow: the others stay readable
# What to write where the terminal's encoding lacks a character.
_IN_ASCII = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "÷": "/", "≥": ">=", "≤": "<=", "≈": "~", "µ": "u", "½": "1/2", "←": "<-"}
)


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], width: int, blocks: bool = True) -> str:
    """Return a title and a bar a label for each group of (title, (label, ratio above 0)s), with a mark at 1.0.

    width     columns of the terminal; lines stay within it from 30 on
    blocks    whether it shows block characters; else ASCII
    """
    every = [pair for _, pairs in groups for pair in pairs]
    most = min(_MOST, max(1.0, *(ratio for _, ratio in every)))
    room = min(max(len(label) for label, _ in every), max(8, width // 2 - 8))
    length = max(_LEAST_BAR, width - room - 11)
    lines = []
    for title, pairs in groups:
        lines += ["", *textwrap.wrap(title, max(width, 20))]
        lines += [
            f"  {_short(label, room, blocks):{room}} {ratio:6.2f} {_bar(ratio, most, length, blocks)}".rstrip()
            for label, ratio in pairs
        ]
    return "\n".join(lines[1:])


def _short(label: str, room: int, blocks: bool) -> str:
    return label if len(label) <= room else label[: room - 1] + ("…" if blocks else "~")


def _bar(ratio: float, most: float, length: int, blocks: bool) -> str:
    """Return `length` characters of which ratio / most are filled; the one at 1.0 is the mark."""
    eighths = round(8 * length * min(ratio, most) / most)
    whole, rest = divmod(eighths, 8)
    if blocks:
        bar = "█" * whole + (_EIGHTHS[rest] if rest else "")
    else:
        bar = "#" * (whole + (rest >= 4))
    cells = [*bar.ljust(length)]
    cells[min(length - 1, int(length / most))] = "│" if blocks else "|"
    if ratio > most:
        cells[-1] = "▶" if blocks else ">"
    return "".join(cells[:length])


def fits(text: str, encoding: str | None) -> bool:
    """Return whether an encoding (None: unknown) has all of a text's characters."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def shows_blocks(encoding: str | None) -> bool:
    """Return whether an encoding has what `bars` draws with."""
    return fits(_EIGHTHS + "█│▶…", encoding)


def printable(text: str, encoding: str | None) -> str:
    """Return the text, where the encoding lacks some of it in ASCII."""
    return text if fits(text, encoding) else text.translate(_IN_ASCII).encode("ascii", "replace").decode("ascii")
