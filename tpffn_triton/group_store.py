"""What the ranks of a group tell each other beside the data: texts in the group's store, outside of its collectives.

    exchange    every rank's facts, on every rank          key tpffn/{number of the exchange}/{rank}
    post        facts that nobody may be waiting for       the same key
    note        what this rank first failed at             key tpffn/note/{rank}

A collective would do too, but on the data's own channel: a rank that compares while another already reduces would take
the one message for the other. Over the store both wait, each in its own place, until the group's timeout, and raise. No
GPU stream is touched, and no mode of torch sees anything.

The store's server lives in one rank's process or in the launcher's; where that is stopped rather than dead, a request
never returns. So requests run in a thread of their own, and the caller waits for it only so long.
"""

import json
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
Facts = dict[str, str]  # name → a phrase
FIRST_PAUSE, LONGEST_PAUSE = 5e-5, 1e-2  # seconds between two looks into the store
SECONDS_TO_ANSWER = 2.0
LONGEST_NOTE = 200
COMPARING = "comparing arguments over the group's store failed"
GAVE_UP = "gave up"
SILENT = "the store's host does not answer: its process or machine was stopped"


class CollectiveError(RuntimeError):
    """A collective of the tensor-parallel group failed, or a rank did not come to compare arguments; the message says
    which, where, after how long, and what other ranks reported."""


class _StoreError(Exception):
    """The store could not be asked."""


class GroupStore:
    """This rank's side of a group's store.

    name       of this rank, for messages
    seconds    the group's timeout
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store = group.get_group_store()
        self.rank, self.size = group.rank(), group.size()
        everywhere = "" if dist.get_rank() == self.rank else f" (global rank {dist.get_rank()})"
        self.name = f"rank {self.rank} of {self.size}{everywhere}"
        self.seconds = _timeout_of(group, self._store)
        self._number = 0
        self._undeleted: list[str] = []
        self._noted = False

    def exchange(self, facts: Facts) -> list[Facts]:
        """Return every rank's facts, by rank. Every rank must call this, or `post`, equally often.

        Raises: CollectiveError: ranks that did not come within the group's timeout, or came after it; or the store is
        gone.
        """
        start = time.monotonic()
        try:
            # Longer than it takes by itself, so that it can say who is absent.
            ranks = self._ask(self.seconds + SECONDS_TO_ANSWER, self._set_and_wait, self._next_keys(), facts, start)
        except _StoreError as error:
            raise self.failure(COMPARING, start, str(error)) from error
        late = [f"rank {rank} {facts[GAVE_UP]}" for rank, facts in enumerate(ranks) if GAVE_UP in facts]
        if late:
            raise self.failure(COMPARING, start, "; ".join(late))
        return ranks

    def post(self, facts: Facts) -> None:
        """Leave facts for an exchange that other ranks may be in, without waiting for theirs."""
        self._try(self._store.set, self._next_keys()[self.rank], json.dumps(facts))

    def note(self, text: str) -> None:
        """Leave word of what this rank failed at, for other ranks' `failure`: the first such, as others follow from it.
        The next exchange takes it back."""
        self._try(self._leave_note, text)

    def failure(self, what: str, since: float, why: str) -> CollectiveError:
        """Return the error for `what`, begun at `since` of time.monotonic(): with what other ranks have noted, or which
        exchange they are in, and noted for them."""
        own = f"after {time.monotonic() - since:.1f} s: {why}"
        notes = []
        if why != SILENT:
            try:
                notes = self._ask(SECONDS_TO_ANSWER, self._read_notes, f"reported: {what} {own}".splitlines()[0])
            except _StoreError as error:
                notes = [f"nothing, {error}"]
        return CollectiveError("\n  ".join([f"{what} on {self.name} {own}", *notes]))

    @staticmethod
    def _note_of(rank: int) -> str:
        return f"tpffn/note/{rank}"

    def _next_keys(self) -> list[str]:
        keys = [f"tpffn/{self._number}/{rank}" for rank in range(self.size)]
        self._number += 1
        self._undeleted.append(keys[self.rank])
        return keys

    def _set_and_wait(self, keys: list[str], facts: Facts, start: float) -> list[Facts]:
        """Return all ranks' facts; says in this rank's that it gave up where one is absent for too long. Polls:
        `Store.wait` would keep every other request waiting."""
        own = keys[self.rank]
        self._store.set(own, json.dumps(facts))
        pause = FIRST_PAUSE
        while not self._store.check(keys):
            if time.monotonic() - start > self.seconds:
                absent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                if not absent:  # the last came just now
                    break
                why = f"rank {', '.join(absent)} of {self.size} did not come"
                self._store.set(own, json.dumps({GAVE_UP: f"{GAVE_UP} after {self.seconds:.1f} s: {why}"}))
                raise _StoreError(why)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        ranks = [json.loads(self._store.get(key)) for key in keys]
        # Whoever has come to this exchange has read all earlier ones.
        for key in self._undeleted[:-1]:
            self._store.delete_key(key)
        del self._undeleted[:-1]
        if self._noted:
            self._store.delete_key(self._note_of(self.rank))
            self._noted = False
        return ranks

    def _leave_note(self, text: str) -> None:
        if not self._noted:
            self._noted = True
            self._store.set(self._note_of(self.rank), text[:LONGEST_NOTE])

    def _read_notes(self, text: str) -> list[str]:
        """Return other ranks' notes, and leave this one's."""
        self._leave_note(text)
        found = []
        for rank in range(self.size):
            note, waiting = self._note_of(rank), f"tpffn/{self._number}/{rank}"
            if rank == self.rank:
                continue
            if self._store.check([note]):
                found.append(f"rank {rank} {self._store.get(note).decode()}")
            elif self._store.check([waiting]):
                facts = json.loads(self._store.get(waiting))
                doing = facts.get(GAVE_UP) or f"is waiting to compare {next(iter(facts.values()), 'nothing')}"
                found.append(f"rank {rank} {doing}")
        return found

    def _ask(self, seconds: float, function: Callable[..., T], *args: Any) -> T:
        """Return function(*args), run in another thread.

        Raises: _StoreError: it has not returned in time, or the store is gone.
        """
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((True, function(*args)))
            except Exception as error:
                outcome.extend((False, error))

        thread = threading.Thread(target=run, daemon=True, name="tpffn-store")
        thread.start()
        thread.join(seconds)
        if not outcome:
            raise _StoreError(SILENT)
        returned, value = outcome
        if returned:
            return value
        if isinstance(value, _StoreError):
            raise value
        raise _StoreError(f"the store's host is gone: {str(value).splitlines()[0]}") from value

    def _try(self, function: Callable[..., Any], *args: Any) -> None:
        """Call function(*args) if the store answers: a message about an error must not hide the error."""
        try:
            self._ask(SECONDS_TO_ANSWER, function, *args)
        except _StoreError:
            return


_stores: "weakref.WeakKeyDictionary[dist.ProcessGroup, GroupStore | None]" = weakref.WeakKeyDictionary()


def store_of(group: dist.ProcessGroup) -> GroupStore | None:
    """Return this rank's side of the group's store; None for fake ranks, which never answer, and, with a warning, for a
    group that has no store."""
    if group not in _stores:
        fake = dist.get_backend(group) == "fake"
        if not fake and group.get_group_store() is None:
            warnings.warn(f"arguments are not compared: this group of {group.size()} ranks has no store", stacklevel=2)
            fake = True
        _stores[group] = None if fake else GroupStore(group)
    return _stores[group]


def _timeout_of(group: dist.ProcessGroup, store: Any) -> float:
    """Return the group's timeout in seconds: torch keeps it where only the group's backends know it; else the store's,
    which is the default group's."""
    for device in getattr(group, "_device_types", ()):
        try:
            return group._get_backend(device).options._timeout.total_seconds()
        except (RuntimeError, AttributeError):
            continue
    return store.timeout.total_seconds()
