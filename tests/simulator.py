"""Run Triton kernels in Triton's interpreter with their programs interleaved, and find what no single run shows.

    with Simulation(seed=0, resident=2) as simulation:
        y = launcher(x)                # any launches: kernel[grid](...), or functions that make some
        with simulation.concurrent():
            launcher(x1)               # two streams: these run together at the end of the block
            launcher(x2)

The kernel's own source runs. A seeded scheduler hands the turn from program to program at every access of memory, with
at most `resident` programs started and not finished; each access is checked by `shadow_memory`, and the first fault is
raised out of the block: Race, Uninitialised, OutOfBounds or Deadlock, naming the argument, the element, the programs
and the lines. The same seed gives the same schedule.

Memory is found, not declared: what a launch may touch are its tensor and descriptor arguments, as far as their shapes
and strides reach. Tensors that `torch.empty`, `empty_like` or `Tensor.new_empty` make inside of the block are undefined
until they are written; they are filled with a pattern, and what the host changes in them counts as written.

Not seen: what happens between the threads of one program (barriers, proxy fences); what a kernel computes wrong;
atomics that read old values (the latest is always read). Inline assembly orders nothing. Loads that are `volatile`, and
triton 3.9's `atomic_load`, `atomic_store` and `atomic_poll`, count as plain accesses.
"""

import ctypes
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton
from shadow_memory import READS, UPDATES, UPDATES_IN_CTA, WRITES, Fault, ShadowMemory
from simulated_programs import Launch, Program, kernel_lines, unwrapped
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tpffn_triton.interpreter import patched_once


class Deadlock(Fault):
    """Every program that runs polls memory that none of them will change."""


class Simulation:
    """See the module's docstring; one at a time.

    seed        of the schedule
    resident    programs that are started and not finished, at most; None: all
    order       "ascending": programs start in order of their ids; "random": in any, which is all that CUDA promises
    most_polls  accesses in a row with which each running program changes and learns nothing before that is a deadlock
    steps, switches   accesses of memory so far; how often the turn went to another program

    Raises: RuntimeError: the interpreter is off, or a simulation is active already.
    """

    _active = threading.Lock()

    def __init__(
        self, seed: int = 0, resident: int | None = None, order: str = "ascending", most_polls: int = 1000
    ) -> None:
        if order not in ("ascending", "random") or (resident is not None and resident < 1):
            raise ValueError(f"order is ascending or random, resident at least 1; got {order!r}, {resident}")
        self._random = random.Random(seed)
        self._resident, self._order, self._most_polls = resident, order, most_polls
        self._memory = ShadowMemory()
        self._together: list[Launch] | None = None
        self._live: list[Program] = []
        self._running: Program | None = None
        self._launches = self.steps = self.switches = 0

    def __enter__(self) -> "Simulation":
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("a Simulation needs TRITON_INTERPRET=1, set before the kernels are imported")
        if not self._active.acquire(blocking=False):
            raise RuntimeError("a Simulation is active already")
        self._hooks = ExitStack()
        self._hooks.callback(self._active.release)
        for owner, name, hook in (
            (GridExecutor, "__call__", self._launch),
            (InterpreterBuilder, "create_masked_load", self._load),
            (InterpreterBuilder, "create_masked_store", self._store),
            (InterpreterBuilder, "create_atomic_rmw", self._atomic_rmw),
            (InterpreterBuilder, "create_atomic_cas", self._atomic_cas),
            (torch.Tensor, "new_empty", self._allocate),
            (torch, "empty", self._allocate),
            (torch, "empty_like", self._allocate),
        ):
            self._hooks.enter_context(mock.patch.object(owner, name, _calling(hook, getattr(owner, name))))
        return self

    def __exit__(self, *error) -> None:
        self._hooks.close()

    @contextmanager
    def concurrent(self) -> Iterator[None]:
        """Collect the launches made inside, and run them together at the end, each as a stream of its own: they share
        what may be resident, and nothing orders one before the other."""
        if self._together is not None:
            raise RuntimeError("concurrent() inside of concurrent()")
        self._together = []
        try:
            yield
            launches = self._together
        finally:
            self._together = None
        self._run(launches)

    # Scheduling

    def _launch(self, original, executor, *args, **kwargs) -> None:
        self._launches += 1
        launch = Launch(executor, args, kwargs, self._launches, self._memory)
        if self._together is None:
            self._run([launch])
        else:
            self._together.append(launch)

    def _run(self, launches: list[Launch]) -> None:
        waiting = [deque(self._in_order(launch.programs)) for launch in launches]
        programs = [program for stream in waiting for program in stream]
        for number, program in enumerate(programs):
            program.number, program.pace = number, 10 ** -self._random.random()
        self._memory.begin(len(programs))
        self._running = None
        with patched_once() as patch:
            scopes = [patch(launch.function) for launch in launches]
            try:
                while self._start(waiting):
                    self._turn(waiting)
            finally:
                for program in self._live:
                    program.end()
                self._live.clear()
                for scope in reversed(scopes):
                    scope.restore()

    def _in_order(self, programs: list[Program]) -> list[Program]:
        return self._random.sample(programs, len(programs)) if self._order == "random" else programs

    def _start(self, waiting: list[deque[Program]]) -> bool:
        """Start programs while there is room; return whether any program runs."""
        while any(waiting) and (self._resident is None or len(self._live) < self._resident):
            self._live.append(self._random.choice([stream for stream in waiting if stream]).popleft())
        return bool(self._live)

    def _turn(self, waiting: list[deque[Program]]) -> None:
        # Who polls gets fewer turns the longer it does.
        weights = [program.pace * 0.5 ** min(program.polls, 1000) for program in self._live]
        (program,) = self._random.choices(self._live, weights)
        self.switches += program is not self._running
        self._running = program
        program.resume()
        if program.finished:
            program.end()
            self._live.remove(program)
        if program.error is not None:
            raise unwrapped(program.error)
        if self._live and all(program.polls >= self._most_polls for program in self._live):
            raise Deadlock(
                f"running, and polling what none of them changes: {len(self._live)} programs; not started: "
                f"{', '.join(program.name for stream in waiting for program in stream) or 'none'}\n"
                + "\n".join(program.describe() for program in self._live)
            )

    # Accesses

    def _access(self, kind: str, pointers, mask: np.ndarray | None, acquires: bool = False) -> np.ndarray:
        """Give other programs a turn, then check the access; return its addresses."""
        program = self._running
        program.pause()
        self.steps += 1
        addresses = pointers.data.astype(np.int64)
        addresses = addresses.ravel() if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]
        if acquires:
            self._memory.acquire(program, addresses)
        program.at = kind, addresses, kernel_lines()
        self._memory.access(program, kind, addresses, _width(pointers), program.at[2])
        return addresses

    def _changed(self) -> None:
        for program in self._live:
            program.polls = 0
            program.seen.clear()

    def _unchanged(self, kind: str, addresses: np.ndarray, found: np.ndarray) -> None:
        program, access = self._running, (kind, addresses.tobytes())
        program.found = found
        program.polls = program.polls + 1 if access in program.seen else 0
        program.seen.add(access)

    def _load(self, original, builder, pointers, mask, *args, **kwargs):
        addresses = self._access(READS, pointers, mask.data)
        result = original(builder, pointers, mask, *args, **kwargs)
        self._unchanged(READS, addresses, result.data)
        return result

    def _store(self, original, builder, pointers, value, mask, *args, **kwargs):
        self._access(WRITES, pointers, mask.data)
        self._changed()
        return original(builder, pointers, value, mask, *args, **kwargs)

    def _atomic_rmw(self, original, builder, op, pointers, value, mask, sem, scope):
        def update():
            return original(builder, op, pointers, value, mask, sem, scope)

        return self._atomic(update, pointers, mask.data, sem, scope)

    def _atomic_cas(self, original, builder, pointers, expected, value, sem, scope):
        def update():
            return original(builder, pointers, expected, value, sem, scope)

        return self._atomic(update, pointers, None, sem, scope, expected)

    def _atomic(self, update, pointers, mask, sem, scope, expected=None):
        reaches = scope.name != "CTA"
        kind = UPDATES if reaches else UPDATES_IN_CTA
        addresses = self._access(kind, pointers, mask, reaches and "ACQUIRE" in sem.name)
        before = _contents(addresses, _width(pointers))
        result = update()
        if _contents(addresses, _width(pointers)) == before:
            self._unchanged(kind, addresses, result.data)
        else:
            self._changed()
        if reaches and "RELEASE" in sem.name:
            # A compare-and-swap that fails stores nothing.
            stored = slice(None) if expected is None else (result.data == expected.data).ravel()
            self._memory.release(self._running, addresses[stored])
        return result

    def _allocate(self, original, *args, **kwargs) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
            self._memory.allocate(tensor)
        return tensor


def _calling(hook, original):
    """Return a function for a class: it calls hook(original, …) with the arguments that it gets, self included."""
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


def _width(pointers) -> int:
    """Return the bytes of an element."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _contents(addresses: np.ndarray, width: int) -> bytes:
    return b"".join(ctypes.string_at(address, width) for address in addresses.tolist())
