"""Run functions on P processes that form a process group, and bring back what each of them returned or raised.

    pool = Ranks(4)
    values = pool.run(function, *args)       function(rank, world_size, *args) on every rank; raises if any rank did
    outcomes = pool.outcomes(function, ...)  the same, exceptions as values
    pool.close()

The processes start once and stay: a start costs seconds, a call milliseconds. A rank that does not answer within
`timeout` seconds fails the call and ends the pool: no test hangs. Functions must be importable by name.
"""

import datetime
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tpffn_triton import interpreter


class RankError(AssertionError):
    """One or more ranks raised; the message holds their tracebacks."""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, backend: str, group_timeout: float, pipe) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=group_timeout)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            pipe.send((True, function(rank, world_size, *args)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


def use(implementation: str) -> None:
    """Choose, on a rank, between the Triton kernels and the "native" path."""
    interpreting = implementation != "native"
    interpreter.interpreting = lambda: interpreting


class Ranks:
    """A pool of `world_size` ranks over gloo, or over NCCL with one GPU each."""

    def __init__(self, world_size: int, backend: str = "gloo", group_timeout: float = 60) -> None:
        context = mp.get_context("spawn")
        port = _free_port()
        self.world_size, self._pipes, self._processes = world_size, [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            args = (rank, world_size, port, backend, group_timeout, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def outcomes(self, function, *args, timeout: float = 240) -> list:
        """Return per rank (True, value) or (False, (exception type, message, traceback))."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise RankError(f"rank {rank} of {self.world_size} did not answer within {timeout} s")
            results.append(pipe.recv())
        return results

    def run(self, function, *args, timeout: float = 240) -> list:
        """Return every rank's value. Raises: RankError: with the tracebacks of the ranks that raised."""
        results = self.outcomes(function, *args, timeout=timeout)
        failures = [f"rank {rank}:\n{value[2]}" for rank, (ok, value) in enumerate(results) if not ok]
        if failures:
            raise RankError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        """End the processes, killing those that do not leave by themselves."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []
