"""Keep the counters of single launches: zero before each, and left at zero by it.

Launches of one stream come one after the other and share counters. Those of two streams may run at once, so each
(device, stream) has its own. A captured launch may be replayed at any time beside others, so it has its own for ever:
cut from a reserve that was zeroed outside of any graph, or, where that is used up, zeroed by the graph itself.
"""

import torch

_LEAST = 1024  # counters of a stream at first; more when M wants them
_RESERVE = 1 << 18  # counters kept for captured launches, by device: 1 MiB
_LINE = 32  # counters in the 128 bytes that L2 works on

_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_reserves: dict[torch.device, torch.Tensor] = {}


def _zeros(device: torch.device, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _cut(device: torch.device, count: int) -> torch.Tensor:
    """Return counters that no other launch will use."""
    left = _reserves.get(device)
    if left is None or count > len(left):
        return _zeros(device, count)
    _reserves[device] = left[-(-count // _LINE) * _LINE :]
    return left[:count]


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Return at least `count` counters, int32, for the next launch in the current stream of a device, which must be the
    current one."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _cut(device, count)
        stream = torch.cuda.current_stream(device).cuda_stream
        if device not in _reserves:
            _reserves[device] = _zeros(device, _RESERVE)
            # Captured launches come in other streams.
            torch.cuda.current_stream(device).synchronize()
    kept = _of_stream.get((device, stream))
    if kept is None or count > len(kept):
        kept = _zeros(device, max(_LEAST, 1 << (count - 1).bit_length()))
        _of_stream[device, stream] = kept
    return kept


def discard(used: torch.Tensor) -> None:
    """Never hand out these counters again: the launch did not come to its end."""
    for key in [key for key, kept in _of_stream.items() if kept is used]:
        del _of_stream[key]
