"""Keep the counters of launches of both GEMMs: zero before each, and left at zero by it.

Launches of one stream come one after the other and share counters. Those of two streams may run at once, so each
(device, stream) has its own. A captured launch may be replayed at any time beside others, so it has its own for ever.
All are cut from a reserve of their device, which is zeroed when it is allocated; where a launch is captured and nothing
is left, the graph itself zeroes what it then allocates.

A stream is known by its handle: one that is destroyed while it still runs, and another created with its handle, would
share counters. torch's own streams are never destroyed.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_LEAST = 1024  # counters of a stream at first; more when a launch wants them
_RESERVE = 1 << 19  # counters allocated at once: 2 MiB
_LINE = 32  # counters in the 128 bytes that L2 works on

_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_reserves: dict[torch.device, torch.Tensor] = {}
_lock = threading.Lock()


def _zeros(device: torch.device, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _zeros_in_a_thread(device: torch.device, count: int) -> torch.Tensor:
    """Return zeros that any stream may use. Allocated by another thread: this one may be allocating from a pool that is
    reused later, as in the warm-up of CUDA graphs by torch.compile."""

    def allocate() -> torch.Tensor:
        zeros = _zeros(device, count)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(allocate).result()


def _cut(device: torch.device, count: int, capturing: bool) -> torch.Tensor:
    """Return counters that no other launch will use, in cache lines of their own."""
    lines = -(-count // _LINE) * _LINE
    with _lock:
        left = _reserves.get(device)
        if left is None or lines > len(left):
            if capturing:
                return _zeros(device, count)
            left = _zeros_in_a_thread(device, max(_RESERVE, lines))
        _reserves[device] = left[lines:]
    return left[:lines]


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Return at least `count` counters, int32, for the next launch in the current stream of a device, which must be the
    current one."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _cut(device, count, capturing=True)
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _of_stream.get((device, stream))
    if kept is None or count > len(kept):
        kept = _cut(device, max(_LEAST, 1 << (count - 1).bit_length()), capturing=False)
        _of_stream[device, stream] = kept
    return kept


def launch_counting(launch: Callable[..., None], count: int, *tensors: torch.Tensor) -> None:
    """Call launch with the tensors and at least `count` counters, on the device of the first tensor."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # whose current stream counts
            return launch_counting(launch, count, *tensors)
    used = counters(device, count)
    try:
        launch(*tensors, used)
    except BaseException:
        discard(used)
        raise


def discard(used: torch.Tensor) -> None:
    """Never hand out these counters again: the launch did not come to its end."""
    for key in [key for key, kept in _of_stream.items() if kept is used]:
        del _of_stream[key]
