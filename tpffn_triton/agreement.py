"""Make sure that all ranks of a group ask for the same FFN, before a collective depends on it.

A rank whose arguments are wrong would otherwise raise alone and leave the others waiting; ranks that disagree on shape
or dtype would abort the process or corrupt each other's data.

when                                          what is compared, over the group's store
the group's first call of a kind of layer     the kind, x's shape, b2's bits, which tensors are finite
a call that does not follow as last time      the kind, x's shape
within `comparing_every_call`                 as on a first call, and x's bits; in backward dy's shape and bits

A call follows as last time if its kind and x's shape are those of the call that came after the one before it when ranks
last compared there; at first, those of the one before. What may follow is thus one thing, the same on every rank:
whoever does something else compares, and whoever does not is where all others are. Ranks never meet in a collective
with different tensors, and models that repeat themselves, layer by layer or all alike, compare nothing. Not noticed: a
rank that makes one call fewer of several that are alike, until the others wait for it.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tpffn_triton.group_store import CollectiveError, Facts, store_of

# Names of facts, which must be the same on every rank that has them.
CALL, REJECTED = "call", "rejected"


class LayerKind(NamedTuple):
    """What ranks agree on: calls that differ in tokens alone are of one kind. Each option is a word or two for the
    message."""

    w1_shape: torch.Size
    dtype: torch.dtype
    device_type: str
    options: tuple[str, ...]


@dataclass
class _Agreed:
    """What a group has agreed on; a call is its kind and the sizes of its collectives.

    kinds      whose contents were compared
    last       call
    follows    call → the one that came after it when ranks last compared there
    """

    kinds: set[LayerKind] = field(default_factory=set)
    last: Hashable = None
    follows: dict[Hashable, Hashable] = field(default_factory=dict)


_agreed: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Agreed]" = weakref.WeakKeyDictionary()
_every_call = False


@contextlib.contextmanager
def comparing_every_call() -> Iterator[None]:
    """Compare everything before every call's and every backward's first collective: for finding out why ranks drift
    apart. Enter it on every rank. Compiled calls compare nothing.

    Compared are shapes, dtype and options, the bits of what is replicated (x, b2, dy) and which tensors are finite; a
    call then waits for the slowest rank and reads every tensor once.
    """
    global _every_call
    before, _every_call = _every_call, True
    try:
        yield
    finally:
        _every_call = before


def agree(
    group: dist.ProcessGroup, kind: LayerKind, sizes: Hashable, replicated: bool, x: Tensor, *parameters: Tensor | None
) -> None:
    """Compare this call with the group's others where there is something new (the table above), else return at once.

    sizes         beside the kind, what decides the sizes of the call's collectives
    replicated    x is the same on every rank, rather than a slice
    parameters    w1, w2, b1, b2

    Raises: ValueError: another rank rejected its arguments, or ranks differ; says who, and what each has.
    CollectiveError: a rank did not come.
    """
    agreed, call = _agreed.get(group), (kind, sizes)
    if agreed is not None and agreed.follows[agreed.last] == call and not _every_call:
        agreed.last = call
        return
    if agreed is None:
        agreed = _Agreed()
    shapes = f"x {list(x.shape)} and w1 {list(kind.w1_shape)} in {kind.dtype} on {kind.device_type}"
    facts = {CALL: ", ".join([shapes, *kind.options])}
    named = dict(zip(("x", "w1", "w2", "b1", "b2"), (x, *parameters), strict=True))
    if _every_call:
        facts |= contents(named, ("x", "b2") if replicated else ("b2",))
    elif kind not in agreed.kinds:
        facts |= contents(named, ("b2",))
    compare(group, facts)
    agreed.kinds.add(kind)
    agreed.follows[agreed.last] = call
    agreed.follows.setdefault(call, call)
    agreed.last = call
    _agreed[group] = agreed


def agree_on_gradient(group: dist.ProcessGroup, dy: Tensor, replicated: bool) -> None:
    """Within `comparing_every_call`: compare dy, replicated or a slice, with the group's others. Raises: as `agree`."""
    if _every_call and not torch.compiler.is_compiling():
        digested = ("dy",) if replicated else ()
        compare(group, {CALL: f"dy {list(dy.shape)} in {dy.dtype}"} | contents({"dy": dy}, digested))


def reject(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the group that this rank's arguments are wrong: those that compare theirs will raise, and the error of those
    that are already in a collective will say so. The next call compares, so that it cannot pass for this one."""
    store = store_of(group)
    if store is not None:
        text = f"rejected: {error}"
        store.note(text)
        store.post({REJECTED: text})
        _agreed.pop(group, None)


def report(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the group's other ranks, whose collectives will fail, what this one raised."""
    store = store_of(group)
    if store is not None and not isinstance(error, CollectiveError):
        store.note(f"raised {type(error).__name__}: {error}")


def compare(group: dist.ProcessGroup, facts: Facts) -> None:
    """Exchange facts with the group. Raises: ValueError, CollectiveError: as `agree`."""
    store = store_of(group)
    if store is None:
        return
    try:
        _check(store.exchange(facts))
    except Exception:
        _agreed.pop(group, None)
        raise


def _check(ranks: list[Facts]) -> None:
    rejected = [f"rank {rank} {facts[REJECTED]}" for rank, facts in enumerate(ranks) if REJECTED in facts]
    if rejected:
        raise ValueError("another rank of the tensor-parallel group could not start: " + "; ".join(rejected))
    lines: list[str] = []
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        if len({facts[name] for facts in ranks if name in facts}) > 1:
            lines += [f"  rank {rank}: {facts.get(name, f'nothing about {name}')}" for rank, facts in enumerate(ranks)]
            if name == CALL:  # which explains all other differences
                break
    if lines:
        raise ValueError("\n".join(["ranks of the tensor-parallel group disagree:", *lines]))


def contents(tensors: Mapping[str, Tensor | None], replicated: tuple[str, ...]) -> Facts:
    """Return of each tensor whether it is finite or, if it is and is replicated, a digest of its bits; nothing of
    tensors that cannot be read: fake, wrapped by a transform, or while a CUDA graph is captured."""
    facts: Facts = {}
    with _disable_current_modes():
        for name, t in tensors.items():
            if t is None or not _readable(t):
                continue
            t = t.detach()
            if not t.isfinite().all():
                facts[name] = f"{name} has NaN or infinity"
            else:
                facts[name] = f"{name} has digest {_digest(t)}" if name in replicated else f"{name} is finite"
    return facts


def _readable(t: Tensor) -> bool:
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"
    capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return plain and not capturing and not torch._C._are_functorch_transforms_active()


def _digest(t: Tensor) -> str:
    # numpy() makes a storage one that cannot be resized, as FSDP does.
    octets = t.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(octets, digest_size=6).hexdigest()
