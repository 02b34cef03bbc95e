"""Run the textbook ring all-reduce over sends and receives, and count what it sends.

P ranks, N elements in P chunks, the first N mod P one element longer. In round s = 0 … P-2 of

    reduce-scatter   rank r sends chunk r-s to rank r+1, and adds what it receives to chunk r-s-1
    all-gather       rank r sends chunk r+1-s to rank r+1, and writes what it receives to chunk r-s      (all mod P)

so after the first half chunk r+1 is complete on rank r. `tpffn_triton.plan.ring_all_reduce` counts the same without
running it.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Counts:
    """What this rank has sent: rounds it took part in, elements in all."""

    rounds: int = 0
    elements: int = 0


def all_reduce(t: Tensor, group: dist.ProcessGroup) -> Counts:
    """Sum the contiguous t over the group, in place; every rank gets the same bits. Returns what this rank sent."""
    rank, size = group.rank(), group.size()
    chunks, counts = t.view(-1).tensor_split(size), Counts()
    for step in range(size - 1):
        own = chunks[(rank - step - 1) % size]
        received = torch.empty_like(own)
        _exchange(chunks[(rank - step) % size], received, group, counts)
        own += received
    for step in range(size - 1):
        _exchange(chunks[(rank + 1 - step) % size], chunks[(rank - step) % size], group, counts)
    return counts


def _exchange(sent: Tensor, received: Tensor, group: dist.ProcessGroup, counts: Counts) -> None:
    """Send to the next rank while receiving from the one before."""
    rank, size = group.rank(), group.size()
    sending = dist.isend(sent, group=group, group_dst=(rank + 1) % size)
    receiving = dist.irecv(received, group=group, group_src=(rank - 1) % size)
    for work in (sending, receiving):
        assert work is not None  # None is for ranks outside of the group
        work.wait()
    counts.rounds += 1
    counts.elements += sent.numel()
