"""Measure what a forward keeps for backward, and the most memory that one step needs beyond what is allocated when it
begins: the most of any rank.

CUDA   peak of torch's allocator during the step, less what it held before
CPU    peak resident set of the process during the step (/proc, reset before), less its size before; median of
       five, as malloc does not return every freed page; None where the kernel does not offer this
"""

import contextlib
import ctypes
import re
import statistics
from pathlib import Path

import torch
from implementations import Forward
from ranks import Rank
from steps import Step
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from workloads import Problem

_RESET_PEAK = "5"  # /proc/PID/clear_refs, see proc(5)
_SLACK = 1 << 20  # a peak this far above the present size has not been reset


def peak_bytes(step: Step, rank: Rank) -> int | None:
    """Run step a few times and return its peak; results are counted, the problem's own tensors are not."""
    cuda = rank.device.type == "cuda"
    peaks = []
    for _ in range(1 if cuda else 5):
        step.reset()
        peaks.append(_cuda_peak(step) if cuda else _resident_peak(step))
    step.reset()
    most = statistics.median(rank.maxima(peaks))
    return None if most == float("inf") else int(most)


def saved_bytes(forward: Forward, problem: Problem) -> int:
    """Return the bytes of the storages that a forward keeps for backward, beside those of x and the parameters."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, or the address of a freed one could come again

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    p = problem
    with saved_tensors_hooks(keep, lambda t: t):
        forward(p.x, p.w1, p.b1, p.w2, p.b2, None)
    given = {leaf.untyped_storage().data_ptr() for leaf in p.leaves().values()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given)


def _cuda_peak(step: Step) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak(step: Step) -> float:
    """Run step once in any case, as it communicates; returns infinity where nothing can be measured."""
    _return_free_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before, peak_before = _resident("VmRSS"), _resident("VmHWM")
    step()
    if before is None or peak_before is None or peak_before > before + _SLACK:
        return float("inf")
    return max(0, (_resident("VmHWM") or 0) - before)


def _return_free_memory() -> None:
    """Ask malloc for its free pages, or a step would seem to need only what earlier ones left over."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
