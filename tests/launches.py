"""Count Triton kernel launches, compiled or interpreted."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def count_launches() -> Iterator[Counter]:
    """Yield a Counter: kernel name → launches inside the block."""
    counts: Counter = Counter()
    call, run = GridExecutor.__call__, JITFunction.run

    def counted_call(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return call(self, *args, **kwargs)

    def counted_run(self, *args, warmup=False, **kwargs):
        counts[self.fn.__name__] += not warmup
        return run(self, *args, warmup=warmup, **kwargs)

    GridExecutor.__call__, JITFunction.run = counted_call, counted_run
    try:
        yield counts
    finally:
        GridExecutor.__call__, JITFunction.run = call, run
