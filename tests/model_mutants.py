"""Mistakes in the counter protocol, each with what the model (protocol_model.py) must find.

python tests/model_mutants.py        # what it finds, and in how many states
"""

from collections.abc import Sequence
from typing import NamedTuple

from protocol_model import Launch, Order, Protocol, Tile, check


def grouped(group: int) -> Order:
    """Return the order in which stage 2 of a group of row blocks follows stage 1 of the next group."""

    def order(row_blocks: int, hidden_tiles: int, out_tiles: int) -> list[Tile]:
        groups = [range(first, min(first + group, row_blocks)) for first in range(0, row_blocks, group)]
        stage1 = [[(1, row, col) for col in range(hidden_tiles) for row in rows] for rows in groups]
        stage2 = [[(2, row, col) for col in range(out_tiles) for row in rows] for rows in groups]
        return [tile for one, two in zip([*stage1, []], [[], *stage2], strict=True) for tile in one + two]

    return order


def row_major(row_blocks: int, hidden_tiles: int, out_tiles: int) -> list[Tile]:
    """All of stage 1, then all of stage 2."""
    return grouped(row_blocks)(row_blocks, hidden_tiles, out_tiles)


def consumers_first(row_blocks: int, hidden_tiles: int, out_tiles: int) -> list[Tile]:
    """All of stage 2, then all of stage 1."""
    return sorted(row_major(row_blocks, hidden_tiles, out_tiles), reverse=True)


def one_too_early(row_blocks: int, hidden_tiles: int, out_tiles: int) -> list[Tile]:
    """The first tile of stage 2 has changed places with the last of stage 1."""
    order = row_major(row_blocks, hidden_tiles, out_tiles)
    last = row_blocks * hidden_tiles - 1
    return [*order[:last], order[last + 1], order[last], *order[last + 2 :]]


def one_column_short(row_blocks: int, hidden_tiles: int, out_tiles: int) -> list[Tile]:
    """A grid without the last column of y."""
    return row_major(row_blocks, hidden_tiles, out_tiles - 1)


class Mutant(NamedTuple):
    """A protocol with one mistake, the launches that show it with `resident` programs at once, and the verdict."""

    name: str
    protocol: Protocol
    verdict: str
    launches: Sequence[Launch] = ((1, 2, 2), (1, 2, 2))
    resident: int = 4
    order: Order = row_major


GROWS = ((1, 2, 2), (2, 2, 2))
SHRINKS = ((2, 2, 2), (1, 2, 2), (2, 2, 2))
MUTANTS = [
    Mutant("relaxed flag", Protocol(release=False), "invisible"),
    Mutant("relaxed poll", Protocol(acquire=False), "invisible"),
    Mutant("no wait", Protocol(waits=False), "invisible"),
    Mutant("target too low", Protocol(target=-1), "invisible"),
    Mutant("target too high", Protocol(target=1), "deadlock"),
    Mutant("counted before waiting", Protocol(counts_first=True), "invisible"),
    Mutant("consumers first", Protocol(), "deadlock", resident=2, order=consumers_first),
    Mutant("a consumer before its last producer", Protocol(), "deadlock", resident=1, order=one_too_early),
    Mutant("grid one column short", Protocol(), "unwritten", order=one_column_short),
    Mutant("program numbers for tickets", Protocol(tickets=False), "deadlock", resident=2),
    Mutant("counter never cleared", Protocol(clears="never"), "counters"),
    Mutant("counter cleared by the first consumer", Protocol(clears="first consumer"), "deadlock"),
    Mutant("ticket never cleared", Protocol(clears_ticket="never"), "counters"),
    Mutant("ticket cleared by the first", Protocol(clears_ticket="first"), "twice"),
    Mutant("ticket that wraps, M changed", Protocol(clears_ticket="modulo"), "deadlock", GROWS, resident=1),
    Mutant("epoch, M changed", Protocol(clears="epoch"), "deadlock", SHRINKS),
    Mutant("epoch in a captured graph", Protocol(clears="epoch", frozen_epoch=True), "stale"),
    Mutant("counters of two streams", Protocol(streams=2, shares_counters=True), "twice"),
]

if __name__ == "__main__":
    for mutant in MUTANTS:
        found = check(mutant.launches, mutant.order, mutant.resident, mutant.protocol)
        print(f"{mutant.name:<40}{found.verdict:<10} {found.states:>6} states: {found.detail}")
        print("\n".join(f"    {step}" for step in found.trace))
