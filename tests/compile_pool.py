"""Compile in parallel processes. A compiler that takes its process with it loses what it compiled, and nothing else."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
Job = TypeVar("Job", bound=Hashable)


def _attempt(function: Callable[[Job], T], jobs: Sequence[Job], workers: int) -> dict[Job, T]:
    """Return the results there are: a process that dies takes those of all that wait with it."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        futures = {job: pool.submit(function, job) for job in jobs}
    ended = {job: future for job, future in futures.items() if not isinstance(future.exception(), BrokenProcessPool)}
    return {job: future.result() for job, future in ended.items()}


def results(function: Callable[[Job], T], jobs: Sequence[Job], workers: int) -> dict[Job, T]:
    """Return function(job) of every job, computed in `workers` processes; a job whose process dies has none.

    Raises: whatever function raises.
    """
    found: dict[Job, T] = {}
    left = list(dict.fromkeys(jobs))
    while left:
        found |= _attempt(function, left, workers)
        left = [job for job in left if job not in found]
        # Jobs start in order: of what is missing, only the first ones can have been running.
        for job in left[:workers]:
            found |= _attempt(function, [job], 1)
        left = left[workers:]
    return found
