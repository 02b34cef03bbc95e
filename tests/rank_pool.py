"""Run functions on P processes that form a process group, and bring back what each of them returned or raised.

    pool = Ranks(4)
    values = pool.run(function, *args)       function(rank, world_size, *args) on every rank; raises if any rank did
    outcomes = pool.outcomes(function, ...)  the same, exceptions as values
    pool.close()

The processes start once and stay: a start costs seconds, a call milliseconds. A rank that dies, or does not answer
within `timeout` seconds, fails the call, and the next call gets new ranks: no test hangs, or fails because another did.
Functions must be importable by name.
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


def _serve(rank: int, world_size: int, bound: socket.socket, backend: str, group_timeout: float, pipe) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=group_timeout)
    address = bound.getsockname()
    # On a socket that was bound before: a port that is only known to be free may be somebody's by now.
    listening = bound.detach() if rank == 0 else None
    bound.close()  # another rank's would keep the port open after rank 0 died
    is_master = listening is not None
    store = dist.TCPStore(*address, world_size, is_master, timeout=timeout, master_listen_fd=listening)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, store=store)
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
        self.world_size, self._backend, self._group_timeout = world_size, backend, group_timeout
        self._pipes: list = []
        self._processes: list = []
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, bound, self._backend, self._group_timeout, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()  # or its end would not show when the rank dies
            self._pipes.append(ours)
            self._processes.append(process)
        bound.close()

    def outcomes(self, function, *args, timeout: float = 240) -> list:
        """Return per rank (True, value) or (False, (exception type, message, traceback))."""
        if not self._pipes:
            self._start()
        results = []
        rank = 0
        try:
            for pipe in self._pipes:
                pipe.send((function, args))
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(timeout):
                    raise RankError(f"rank {rank} of {self.world_size} did not answer within {timeout} s")
                results.append(pipe.recv())
        except (RankError, EOFError, OSError) as error:
            for process in self._processes:
                process.join(1)  # those that died tell how
            codes = [process.exitcode for process in self._processes]
            self.close()
            if isinstance(error, RankError):
                raise
            raise RankError(f"rank {rank} of {self.world_size} died; exit codes, None where alive: {codes}") from None
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
