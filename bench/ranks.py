"""Start the ranks of a tensor-parallel group, or join those that torchrun started; run one function on each.

    RANK and WORLD_SIZE set    this process is one rank of torchrun's
    world_size 1               this process, without a group
    otherwise                  world_size processes are spawned here; gloo on CPU, NCCL with one GPU a rank

A rank that fails ends the run: the others are stopped, and its message is raised here. A rank that stops
answering fails the others' collectives after `timeout_s`.
"""

import contextlib
import datetime
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300
Worker = Callable[["Rank", Any], Any]


class RankFailed(RuntimeError):
    """A spawned rank raised or died; the message says which and how."""


@dataclass(frozen=True)
class Rank:
    """What a worker knows of its place; group is None where there is one rank.

    threads   CPU threads of this rank: the machine's cores shared out, at least one
    """

    rank: int
    world_size: int
    device: torch.device
    threads: int
    group: dist.ProcessGroup | None

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Return each value's maximum over the ranks; NaN counts as infinite (MAX would drop it)."""
        t = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        t[t.isnan()] = float("inf")
        if self.group is not None:
            dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        return t.tolist()

    def barrier(self) -> None:
        """Wait for all ranks, and for this rank's GPU."""
        if self.group is not None:
            dist.barrier(self.group, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def say(self, text: str) -> None:
        """Print progress on stderr, on rank 0 alone."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attached_world_size() -> int | None:
    """Return torchrun's number of ranks, or None outside of it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def local_world_size() -> int:
    """Return how many of torchrun's ranks are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def run(worker: Worker, argument: Any, world_size: int, device_type: str, timeout_s: float = TIMEOUT_S) -> Any:
    """Run worker(rank, argument) on every rank; returns rank 0's result. Under torchrun the others get None.

    worker and argument can be pickled; JSON can hold what it returns.

    Raises: RankFailed: a spawned rank failed.
    """
    if attached_world_size() is not None:
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        local_size = local_world_size()
        return _run_rank(worker, argument, local_rank, local_size, device_type, timeout_s, "env://", {})
    if world_size == 1:
        return worker(_rank(0, 1, 0, 1, device_type, None), argument)
    with tempfile.TemporaryDirectory(prefix="ffn_bench_") as directory:
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the message below says it all
        job = (worker, argument, world_size, device_type, timeout_s, directory)
        context = mp.start_processes(_spawned, job, nprocs=world_size, join=False, daemon=True, start_method="spawn")
        try:
            while not context.join():
                pass
        except mp.ProcessRaisedException as error:
            raise RankFailed(f"rank {error.error_index} failed:\n{error.msg.strip()}") from None
        except mp.ProcessExitedException as error:
            raise RankFailed(f"rank {error.error_index} died: {error.msg}") from None
        return json.loads((Path(directory) / "result.json").read_text())


def _spawned(
    rank: int,
    worker: Worker,
    argument: Any,
    world_size: int,
    device_type: str,
    timeout_s: float,
    directory: str,
) -> None:
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    rendezvous = f"file://{directory}/rendezvous"
    result = _run_rank(worker, argument, rank, world_size, device_type, timeout_s, rendezvous, place)
    if rank == 0:
        (Path(directory) / "result.json").write_text(json.dumps(result))


def _run_rank(
    worker: Worker,
    argument: Any,
    local_rank: int,
    local_size: int,
    device_type: str,
    timeout_s: float,
    init_method: str,
    place: dict[str, Any],
) -> Any:
    cuda = device_type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    with _stdout_to_stderr():  # gloo reports its connections on stdout
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=torch.device("cuda", local_rank) if cuda else None,
            **place,
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world_size > 1 else None
    result = worker(_rank(rank, world_size, local_rank, local_size, device_type, group), argument)
    # Not in a `finally`: after a failure the others may be stuck in a collective; this would wait for them.
    dist.barrier()
    dist.destroy_process_group()
    return result if rank == 0 else None


def _rank(
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    device_type: str,
    group: dist.ProcessGroup | None,
) -> Rank:
    threads = max(1, cores() // local_size)
    torch.set_num_threads(threads)
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    return Rank(rank, world_size, device, threads, group)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
