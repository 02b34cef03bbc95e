"""Make sure that all ranks of a group ask for the same FFN before the first collective depends on it.

A rank whose arguments are wrong would otherwise raise alone and leave the others waiting, and ranks that disagree on
shape or dtype would corrupt each other's data or abort the process. Each rank sends one kilobyte of text, once per
group and layer shape; calls that look the same later cost a set look-up.
"""

import weakref

import torch
import torch.distributed as dist

MESSAGE_BYTES = 1024
_agreed: "weakref.WeakKeyDictionary[dist.ProcessGroup, set]" = weakref.WeakKeyDictionary()


def has_agreed(group: dist.ProcessGroup) -> bool:
    """Say whether this group has agreed on anything yet."""
    return group in _agreed


def agree(
    group: dist.ProcessGroup, device: torch.device, key: tuple, description: str, error: Exception | None = None
) -> None:
    """Exchange `description`, or this rank's `error`, with the group; returns at once where `key` was agreed on before.

    device: where this rank computes; NCCL sends from there.

    Collective on first use of a key. Raises: `error` itself on its own rank; ValueError on every other rank, naming
    the ranks that rejected their arguments or listing what each rank asked for.
    """
    keys = _agreed.setdefault(group, set())
    if error is None and key in keys:
        return
    texts = _all_gather_text(group, device, f"rejected: {error}" if error else description)
    if error is not None:
        raise error
    rejected = [f"rank {rank} {text}" for rank, text in enumerate(texts) if text.startswith("rejected: ")]
    if rejected:
        raise ValueError("another rank of the tensor-parallel group could not start: " + "; ".join(rejected))
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
        raise ValueError(f"ranks of the tensor-parallel group disagree:\n{lines}")
    keys.add(key)


def _all_gather_text(group: dist.ProcessGroup, device: torch.device, text: str) -> list[str]:
    if dist.get_backend(group) != "nccl":
        device = torch.device("cpu")
    elif device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    encoded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    return [bytes(t.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for t in gathered]
