"""Launches of Triton's interpreter taken apart: each program is a coroutine that stops at its accesses of memory."""

import inspect
import sys
import threading

import numpy as np
from shadow_memory import ShadowMemory, source
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, interpreter_builder


class _Cancelled(BaseException):
    """Unwinds a program that is not to go on; not an Exception, which the interpreter would wrap."""


class Launch:
    """A kernel, its arguments as the interpreter wants them, and its programs in order of their ids."""

    def __init__(self, executor: GridExecutor, args, kwargs, number: int, memory: ShadowMemory) -> None:
        parameters = inspect.signature(executor.fn).parameters
        bound = inspect.signature(executor.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
        bound.apply_defaults()
        constants = set(executor.constexprs)
        self.memory = memory.arguments({k: v for k, v in bound.arguments.items() if k not in constants})
        self.function = executor.fn
        scope = interpreter._patch_lang(self.function)
        try:
            self.arguments = {
                name: value if name in constants else interpreter._implicit_cvt(value)
                for name, value in bound.arguments.items()
            }
            grid = executor.grid(self.arguments) if callable(executor.grid) else executor.grid
        finally:
            scope.restore()
        self.grid = (*grid, 1, 1)[:3]
        self.name = f"{self.function.__name__} (launch {number})"
        self.programs = [Program(self, index) for index in np.ndindex(self.grid)]


class Program:
    """A program of a launch as a coroutine: a thread that runs only between resume() and pause()."""

    def __init__(self, launch: Launch, index: tuple[int, int, int]) -> None:
        self._launch, self._index = launch, index
        self.memory = launch.memory
        self.name = f"program {index[0] if launch.grid[1:] == (1, 1) else index} of {launch.name}"
        self.number = 0  # in a run
        self.pace = 1.0  # how often it gets the turn, beside the others
        self.seen: set[tuple] = set()  # accesses since memory changed: to repeat one is to poll
        self.polls = 0
        self.at: tuple[str, np.ndarray, list] | None = None  # its last access: kind, addresses, lines
        self.found = np.empty(0)  # what an access that changes nothing last got
        self.finished = False
        self.error: BaseException | None = None
        self._cancelled = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._body, name=self.name, daemon=True)

    def _body(self) -> None:
        self._go.acquire()
        try:
            self._launch.function(**self._launch.arguments)
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        self._paused.release()

    def resume(self) -> None:
        """Let the program run up to its next access of memory, or its end."""
        if self._thread.ident is None:
            self._thread.start()
        interpreter_builder.set_grid_dim(*self._launch.grid)
        interpreter_builder.set_grid_idx(*self._index)
        self._go.release()
        self._paused.acquire()

    def pause(self) -> None:
        """Called by the program: hand over the turn, and return when it comes again."""
        self._paused.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def describe(self) -> str:
        """Say what the program did last."""
        if self.at is None:
            return f"{self.name} has not accessed memory"
        kind, addresses, lines = self.at
        what = self.memory.describe(int(addresses[0])) if len(addresses) else "nothing"
        return f"{self.name} {kind} {what}, found {self.found.ravel()[:1]}\n  {source(lines)}"

    def end(self) -> None:
        """Unwind the program if it is in the middle of something, and wait for its thread."""
        if self._thread.ident is not None:
            self._cancelled = True
            if not self.finished:
                self.resume()
            self._thread.join()


def unwrapped(error: BaseException) -> BaseException:
    while isinstance(error, InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def kernel_lines() -> list[tuple[str, int]]:
    """Return the (file, line) of the kernel that led here, the innermost first."""
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals["__name__"].split(".")[0] not in ("triton", "threading", "simulator", __name__):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return lines
