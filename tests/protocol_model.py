"""Explore every interleaving of the counter protocol with which one launch computes both GEMMs of an FFN.

    outcome = check([(2, 2, 2), (1, 2, 2)], order, resident=3)
    assert outcome.verdict == "right", "\\n".join(outcome.trace)

A launch of (row_blocks, hidden_tiles, out_tiles) has a program for each tile of hidden, [row_blocks, hidden_tiles], and
of y, [row_blocks, out_tiles]. A program

    takes a ticket, which says by `order` which tile is its own; the last ticket sets the ticket counter to 0
    stage 1   writes its tile of hidden, publishes it: adds 1 to its row block's counter (release)
    stage 2   waits until that counter is hidden_tiles (acquire), reads the row block of hidden, and adds 1 as well;
              whoever then finds all tiles of hidden and of y counted sets the counter to 0

Launches of a stream follow each other, on the same hidden and the same counters; streams run at once. Programs start as
soon as one of the `resident` places is free, wait in their place, and give it back at their end.

Memory: a tile lies in its writer's store buffer until a release of that program, or the end of the launch; a launch's
end makes everything visible. Counters are atomic and in one order for all. Left out, because no verdict depends on it:

    buffers that drain earlier    that makes reads right which were wrong, and nobody waits for it (early_drains=True
                                  explores these as well)
    programs without a ticket     they have touched nothing and are all alike, so a program starts with its ticket
    acquires that order nothing   reads may go before the wait; the earliest read, which sees least, stands for all
    fairness                      whoever may go on does so at last: a program that waits forever is a deadlock

Verdicts, of the shortest way to one:

    right       no way leads to any of the following
    invisible   a program reads a tile of hidden that nobody has made visible yet
    stale       ... that an earlier launch left there
    twice       two programs have the same tile
    unwritten   a launch ends without some tile of y
    counters    ... and a counter is not 0
    deadlock    nobody can go on

A program is one thread here: barriers and fences inside of it are ptx_lint.py's.

Source: explicit-state search as in Holzmann, The Spin Model Checker; store buffers as in Sewell et al., x86-TSO, but
without an order among the stores of a buffer.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Launch = tuple[int, int, int]  # row_blocks, hidden_tiles, out_tiles
Tile = tuple[int, int, int]  # stage 1 (hidden) or 2 (y), row block, column
Order = Callable[[int, int, int], list[Tile]]


@dataclass(frozen=True)
class Protocol:
    """What programs do; the defaults are right.

    release, acquire   ordered, or relaxed; without `waits` stage 2 does not look at the counter
    target             what stage 2 waits for beyond hidden_tiles
    counts_first       stage 2 adds its 1 before it waits
    clears             who sets a row block's counter to 0. "epoch": nobody; stage 2 does not count, and waits for as
                       many times hidden_tiles as the host says there have been launches
    frozen_epoch       the host says 1 every time, as a captured graph does
    tickets            else the tile follows from the program's number, and programs start in any order
    clears_ticket      which ticket sets the ticket counter to 0. "modulo": none, tickets go on and wrap at the number
                       of tiles
    streams            launch i is on stream i % streams, whose hidden is its own; and so are its counters, unless
    shares_counters    all streams have the same
    """

    release: bool = True
    acquire: bool = True
    waits: bool = True
    target: int = 0
    counts_first: bool = False
    clears: Literal["last consumer", "first consumer", "never", "epoch"] = "last consumer"
    frozen_epoch: bool = False
    tickets: bool = True
    clears_ticket: Literal["last", "first", "never", "modulo"] = "last"
    streams: int = 1
    shares_counters: bool = False


RIGHT = Protocol()


@dataclass(frozen=True)
class Outcome:
    """The verdict, what happened, the steps that lead there (of "right": none), and how many states were explored."""

    verdict: str
    detail: str
    trace: list[str]
    states: int


class Program(NamedTuple):
    """A running program: its stream, its tile, and what it still has to do."""

    stream: int
    tile: Tile
    todo: tuple[str, ...]


class State(NamedTuple):
    """One moment. Per stream unless said otherwise.

    launched        launches begun before the present one
    started, taken  programs of the present launch that have started, as a bit mask; tiles that are taken
    hidden          per tile: which launch's data others see, -1 before the first
    running         programs, sorted; buffered: tiles (stream, place in hidden) in store buffers
    ticket, ready   per set of counters: the ticket counter, and the counter of each row block
    """

    launched: tuple[int, ...]
    started: tuple[int, ...]
    taken: tuple[frozenset[Tile], ...]
    hidden: tuple[tuple[int, ...], ...]
    running: tuple[Program, ...]
    buffered: frozenset[tuple[int, int]]
    ticket: tuple[int, ...]
    ready: tuple[tuple[int, ...], ...]


class Violation(NamedTuple):
    """A step that must not happen."""

    verdict: str
    detail: str


Step = tuple[str, State | Violation]


def check(
    launches: Sequence[Launch],
    order: Order,
    resident: int,
    protocol: Protocol = RIGHT,
    early_drains: bool = False,
) -> Outcome:
    """Explore all interleavings, breadth first, until one is wrong.

    order(row_blocks, hidden_tiles, out_tiles) lists the tiles by ticket.
    """
    model = _Model(launches, order, resident, protocol, early_drains)
    first = model.first()
    came_from: dict[State, tuple[str, State | None]] = {first: ("", None)}
    pending = deque([first])

    def outcome(verdict: str, detail: str, state: State | None = None, *last: str) -> Outcome:
        trace = list(last)
        while state is not None:
            label, state = came_from[state]
            trace.insert(0, label)
        return Outcome(verdict, detail, trace[1:], len(came_from))

    while pending:
        state = pending.popleft()
        stuck = not model.finished(state)
        for label, following in model.steps(state):
            stuck = False
            if isinstance(following, Violation):
                return outcome(*following, state, label)
            if following not in came_from:
                came_from[following] = label, state
                pending.append(following)
        if stuck:
            waiting = sorted({_name(program) for program in state.running})
            return outcome("deadlock", f"{', '.join(waiting)} wait at counters {state.ready}", state)
    return outcome("right", "")


def _name(program: Program) -> str:
    stage, row, col = program.tile
    return f"stream {program.stream} {('hidden', 'y')[stage - 1]}[{row}, {col}]"


def _put(values: tuple, index: int, value) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


class _Model:
    def __init__(self, launches: Sequence[Launch], order: Order, resident: int, protocol: Protocol, early_drains: bool):
        self.protocol, self.resident, self.early_drains = protocol, resident, early_drains
        self.launches = [launches[stream :: protocol.streams] for stream in range(protocol.streams)]
        self.orders = {launch: order(*launch) for launch in launches}
        self.row_blocks = max(launch[0] for launch in launches)
        self.columns = max(launch[1] for launch in launches)

    def first(self) -> State:
        each, sets = self.protocol.streams, 1 if self.protocol.shares_counters else self.protocol.streams
        return State(
            launched=(0,) * each,
            started=(0,) * each,
            taken=(frozenset(),) * each,
            hidden=((-1,) * self.row_blocks * self.columns,) * each,
            running=(),
            buffered=frozenset(),
            ticket=(0,) * sets,
            ready=((0,) * self.row_blocks,) * sets,
        )

    def finished(self, state: State) -> bool:
        return all(done == len(of) for done, of in zip(state.launched, self.launches, strict=True))

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every step that somebody may take: what it is, and the state behind it."""
        for stream, launched in enumerate(state.launched):
            if launched == len(self.launches[stream]):
                continue
            launch = self.launches[stream][launched]
            waiting = (1 << len(self.orders[launch])) - 1 & ~state.started[stream]
            if waiting and len(state.running) < self.resident:
                yield from self._start(state, stream, launch, waiting)
            elif not waiting and all(program.stream != stream for program in state.running):
                yield self._end(state, stream, launch)
        for program in dict.fromkeys(state.running):
            yield from self._go_on(state, program)
        for stream, place in state.buffered if self.early_drains else ():
            yield f"stream {stream}: hidden place {place} drains", self._drain(state, stream, {(stream, place)})

    def _start(self, state: State, stream: int, launch: Launch, waiting: int) -> Iterator[Step]:
        """Start a program: with tickets any, they are alike; else each of those that wait."""
        order, protocol = self.orders[launch], self.protocol
        counters = 0 if protocol.shares_counters else stream
        for number in range(len(order)):
            if not waiting >> number & 1:
                continue
            after = state._replace(started=_put(state.started, stream, state.started[stream] | 1 << number))
            place = number
            if protocol.tickets:
                place = state.ticket[counters]
                after = after._replace(ticket=_put(state.ticket, counters, place + 1))
            if protocol.clears_ticket == "modulo":
                place %= len(order)
            yield self._take(after, stream, launch, place)
            if protocol.tickets:
                return

    def _take(self, state: State, stream: int, launch: Launch, place: int) -> Step:
        order, protocol = self.orders[launch], self.protocol
        if place >= len(order):
            return f"stream {stream}: no tile has number {place}", state
        tile = order[place]
        if tile[0] == 1:
            todo: tuple[str, ...] = ("publish",)
            own = (stream, tile[1] * self.columns + tile[2])
            state = state._replace(buffered=state.buffered | {own})
        else:
            todo = ("wait", "read") if protocol.acquire else ("read", "wait")
            todo = ("count", *todo) if protocol.counts_first else (*todo, "count")
            left_out = (not protocol.waits, "wait"), (protocol.clears == "epoch", "count")
            todo = tuple(step for step in todo if (True, step) not in left_out)
        if protocol.tickets and place == {"last": len(order) - 1, "first": 0}.get(protocol.clears_ticket):
            todo = ("clear ticket", *todo)
        program = Program(stream, tile, todo)
        label = f"{_name(program)} starts, number {place}"
        if tile in state.taken[stream]:
            return label, Violation("twice", f"{_name(program)} has been taken before")
        taken = _put(state.taken, stream, state.taken[stream] | {tile})
        return label, state._replace(taken=taken, running=tuple(sorted((*state.running, program))))

    def _go_on(self, state: State, program: Program) -> Iterator[Step]:
        """Let a program take its next step, if it can."""
        stream, (_, row, _), (step, *todo) = program.stream, program.tile, program.todo
        counters = 0 if self.protocol.shares_counters else stream
        launch = self.launches[stream][state.launched[stream]]
        ready = state.ready[counters]

        def counter(value: int) -> tuple[tuple[int, ...], ...]:
            return _put(state.ready, counters, _put(ready, row, value))

        after: State | Violation = state
        if step == "publish":
            own = (stream, row * self.columns + program.tile[2])
            after = self._drain(state, stream, {own}) if self.protocol.release else state
            after = after._replace(ready=counter(ready[row] + 1))
        elif step == "wait":
            if ready[row] < self._target(launch, state.launched[stream]):
                return
        elif step == "read":
            after = self._read(state, program, launch)
        elif step == "count":
            _, hidden_tiles, out_tiles = launch
            clears = {"last consumer": hidden_tiles + out_tiles - 1, "first consumer": hidden_tiles}
            if ready[row] == clears.get(self.protocol.clears):
                todo = ["clear counter", *todo]
            after = state._replace(ready=counter(ready[row] + 1))
        elif step == "clear counter":
            after = state._replace(ready=counter(0))
        else:
            after = state._replace(ticket=_put(state.ticket, counters, 0))
        if isinstance(after, State):
            others = list(state.running)
            others.remove(program)
            again = [program._replace(todo=tuple(todo))] if todo else []
            after = after._replace(running=tuple(sorted(others + again)))
        yield f"{_name(program)}: {step}", after

    def _target(self, launch: Launch, launched: int) -> int:
        epoch = 1 if self.protocol.clears != "epoch" or self.protocol.frozen_epoch else launched + 1
        return epoch * launch[1] + self.protocol.target

    def _read(self, state: State, program: Program, launch: Launch) -> State | Violation:
        stream, (_, row, _), _ = program
        for col in range(launch[1]):
            of = state.hidden[stream][row * self.columns + col]
            if of != state.launched[stream]:
                verdict, whose = ("invisible", "no launch") if of < 0 else ("stale", f"launch {of}")
                detail = f"reads hidden[{row}, {col}] of {whose} in launch {state.launched[stream]}"
                return Violation(verdict, f"{_name(program)} {detail}")
        return state

    def _drain(self, state: State, stream: int, tiles: set[tuple[int, int]]) -> State:
        """Make tiles of a stream's present launch visible, those of them that are still in a buffer."""
        hidden = list(state.hidden[stream])
        for _, place in state.buffered & tiles:
            hidden[place] = state.launched[stream]
        return state._replace(hidden=_put(state.hidden, stream, tuple(hidden)), buffered=state.buffered - tiles)

    def _end(self, state: State, stream: int, launch: Launch) -> Step:
        """End a stream's launch, whose programs have all ended."""
        label = f"stream {stream}: launch {state.launched[stream]} ends"
        y = {(2, row, col) for row in range(launch[0]) for col in range(launch[2])}
        if missing := sorted(y - state.taken[stream]):
            return label, Violation("unwritten", f"no program had {missing}")
        counters = 0 if self.protocol.shares_counters else stream
        left = state.ready[counters] if self.protocol.clears != "epoch" else ()
        left += (state.ticket[counters],) if self.protocol.clears_ticket != "modulo" else ()
        alone = not self.protocol.shares_counters or not any(_put(state.started, stream, 0))
        if alone and any(left):
            return label, Violation("counters", f"ticket {state.ticket[counters]}, {state.ready[counters]}")
        after = self._drain(state, stream, {tile for tile in state.buffered if tile[0] == stream})
        return label, after._replace(
            launched=_put(state.launched, stream, state.launched[stream] + 1),
            started=_put(state.started, stream, 0),
            taken=_put(state.taken, stream, frozenset()),
        )
