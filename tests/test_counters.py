"""Counters of single launches: whose they are. A CPU stands in for a GPU: test_single_launch.py has what needs one."""

import threading
from types import SimpleNamespace

import pytest
import torch

from tpffn_triton.kernels import _counters
from tpffn_triton.kernels._counters import counters

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """Say which stream is current, and whether it is captured; allocations are counted, and made on the CPU."""
    now = SimpleNamespace(stream=7, capturing=False, allocated=[])

    def zeros(device, count):
        now.allocated.append((count, threading.current_thread()))
        return torch.zeros(count, dtype=torch.int32)

    def stream(device):
        return SimpleNamespace(cuda_stream=now.stream, synchronize=lambda: None)

    monkeypatch.setattr(_counters, "_zeros", zeros)
    monkeypatch.setattr(_counters, "_of_stream", {})
    monkeypatch.setattr(_counters, "_reserves", {})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    return now


def apart(*given: torch.Tensor) -> bool:
    """Say whether no two share a line of 128 bytes of their storage."""
    lines = [{(t.untyped_storage().data_ptr(), (t.storage_offset() + i) // 32) for i in range(len(t))} for t in given]
    return len(set().union(*lines)) == sum(map(len, lines))


def test_streams_have_their_own(cuda):
    first = counters(GPU, 5)
    assert counters(GPU, 9) is first
    cuda.stream = 8
    second = counters(GPU, 5)
    assert apart(first, second)
    cuda.stream = 7
    assert counters(GPU, 5) is first
    assert apart(counters(torch.device("cuda", 1), 5), first, second)


def test_captured_launches_have_their_own_for_ever(cuda):
    eager = counters(GPU, 5)
    cuda.capturing = True
    captured = [counters(GPU, 5) for _ in range(3)]
    cuda.capturing = False
    assert counters(GPU, 5) is eager
    cuda.stream = 8
    assert apart(eager, *captured, counters(GPU, 5))
    assert len(cuda.allocated) == 1, "one reserve"


def test_captured_launches_without_a_reserve(cuda):
    """None was allocated before, or it is used up: the graph allocates, and so zeroes at each replay."""
    cuda.capturing = True
    first = counters(GPU, 5)
    assert cuda.allocated[-1][1] is threading.current_thread()
    cuda.capturing = False
    counters(GPU, 5)
    cuda.capturing = True
    many = counters(GPU, _counters._RESERVE)
    assert apart(first, many)
    assert len(many) >= _counters._RESERVE
    assert cuda.allocated[-1][1] is threading.current_thread()


def test_the_reserve_is_allocated_by_another_thread(cuda):
    """So it lies in no pool that this thread allocates from, such as that of CUDA graphs being warmed up."""
    counters(GPU, 5)
    counters(GPU, 2 * _counters._RESERVE)
    assert len(cuda.allocated) == 2
    assert all(thread is not threading.current_thread() for _, thread in cuda.allocated)


def test_they_grow(monkeypatch):
    """With the number of row blocks; what is enough is used again."""
    monkeypatch.setattr(_counters, "_of_stream", {})
    few = counters(CPU, 3)
    assert counters(CPU, len(few)) is few
    more = counters(CPU, len(few) + 1)
    assert len(more) == 2 * len(few)
    assert not more.any()
    assert counters(CPU, 3) is more


def test_what_is_discarded_never_comes_again(cuda):
    used = counters(GPU, 5)
    _counters.discard(used)
    assert apart(used, counters(GPU, 5))
