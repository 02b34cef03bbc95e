"""Say what a run of bench/peers.py is to measure, and what of that has no results yet."""

from collections.abc import Iterator
from dataclasses import dataclass

from peer import Peer, Place
from peer_implementations import chosen
from peer_results import SAME, Key, Results
from ranks import Rank
from shards import Shard
from tables import Row


@dataclass(frozen=True)
class Settings:
    """What to measure; peers None: all that are here, rounds None: as many as fit, budget_s None: no limit."""

    shards: tuple[Shard, ...]
    peers: tuple[str, ...] | None
    place: Place
    modes: tuple[str, ...]
    runs: tuple[str, ...]
    l2s: tuple[str, ...]
    rounds: int | None
    quick: bool
    budget_s: float | None
    command: str

    def timed_at(self, shape: str, mode: str) -> list[Peer]:
        """Return the peers that are timed at the shape of this name, in this mode."""
        return [peer for peer in chosen(self.peers, self.place) if peer.is_timed(shape, mode)]


def lacking(rank: Rank, settings: Settings, surroundings: Row, results: Results) -> dict[Shard, list[Key]]:
    """Return what has no rows of each shape, in order. What has some is kept: only what was interleaved with them could
    join them."""
    found: dict[Shard, list[Key]] = {}
    for shard in settings.shards:
        for key in _keys(settings, shard, surroundings):
            kept = results.peers(key)
            if not kept:
                found.setdefault(shard, []).append(key)
                continue
            absent = [peer.name for peer in settings.timed_at(key.shape, key.mode) if peer.name not in kept]
            without = f"; for {', '.join(absent)} beside them start a new file" if absent else ""
            rank.say(f"{key}: kept as measured before: {', '.join(kept)}{without}")
    return found


def _keys(settings: Settings, shard: Shard, surroundings: Row) -> Iterator[Key]:
    """Yield what is timed at this shape, in order."""
    s, place = shard.shape, settings.place
    for mode in settings.modes:
        for run in settings.runs:
            for l2 in settings.l2s:
                how = (place.activation, place.dtype, mode, run, l2)
                same = (surroundings[name] for name in SAME)
                yield Key(s.name, s.tokens, s.hidden, s.ffn, *how, *same)
