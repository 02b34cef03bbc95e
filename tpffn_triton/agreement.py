"""Make sure that all ranks of a group ask for the same FFN before the first collective depends on it.

A rank whose arguments are wrong would otherwise raise alone and leave the others waiting, and ranks that disagree on
shape or dtype would corrupt each other's data or abort the process. Each rank sends one kilobyte of text, once per
group and kind of layer; a later call costs a look-up.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

MESSAGE_BYTES = 1024


class LayerKind(NamedTuple):
    """What ranks agree on once: calls that differ in tokens alone are of one kind."""

    w1_shape: torch.Size
    options: Hashable


_agreed: "weakref.WeakKeyDictionary[dist.ProcessGroup, set[LayerKind]]" = weakref.WeakKeyDictionary()


def agree(group: dist.ProcessGroup, device: torch.device, kind: LayerKind, describe: Callable[[], str]) -> None:
    """Exchange `describe()` with the group; returns at once where it has agreed on `kind` before.

    device: where this rank computes; NCCL sends from there. Collective on the first use of a kind.

    Raises: ValueError: another rank rejected its arguments, or ranks differ; says who, and what each asked for.
    """
    kinds = _agreed.setdefault(group, set())
    if kind in kinds:
        return
    texts = _all_gather_text(group, device, describe())
    rejected = [f"rank {rank} {text}" for rank, text in enumerate(texts) if text.startswith("rejected: ")]
    if rejected:
        raise ValueError("another rank of the tensor-parallel group could not start: " + "; ".join(rejected))
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
        raise ValueError(f"ranks of the tensor-parallel group disagree:\n{lines}")
    kinds.add(kind)


def reject(
    group: dist.ProcessGroup, device: torch.device, known: LayerKind | torch.Size | None, error: Exception
) -> None:
    """Tell the group that this rank's arguments are wrong, if the others are about to compare theirs: on the first call
    of a kind, when they wait for this rank's text. Later they no longer listen, and a message would be taken for data.

    known: the kind; where the error hides that, the shape of w1 (None: w1 itself is wrong), and the first call counts
    that has it.
    """
    agreed = any(known in (kind, kind.w1_shape, None) for kind in _agreed.get(group, set()))
    if not agreed:
        _all_gather_text(group, device, f"rejected: {error}")


def _all_gather_text(group: dist.ProcessGroup, device: torch.device, text: str) -> list[str]:
    backend = dist.get_backend(group)
    if "nccl" not in backend or "gloo" in backend:
        device = torch.device("cpu")
    elif device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    encoded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    with _disable_current_modes():  # which would fake the exchange, or record it as part of the layer
        mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(gathered, mine, group=group)
        return [bytes(t.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for t in gathered]
