"""Make sure that all ranks of a group ask for the same FFN, before a collective depends on it.

A rank whose arguments are wrong would otherwise raise alone and leave the others waiting; ranks that disagree on shape
or dtype would abort the process or corrupt each other's data.

when                                          what is compared, over the group's store
the group's first call of a kind of layer     the call, biases' bits, which tensors are finite (not slices of x)
a call other than the expected one            the call: its kind, x's shape, chunks, the backwards before it
a backward more than is expected              its number, dy's shape
within `comparing_every_call`                 as on a first call, and x's bits; in backward dy's shape and bits

Expected is the call that came when ranks last compared at this place: after that same call, made as often in a row, as
many calls after the last backward; else the one after that same call, made as often in a row; else the same call again.
So one thing is expected at a time, the same on every rank: a rank that does something else compares, and one that does
not is where all others are. Backwards are counted from call to call, if they communicate: one that is missing makes the
next call another. Models that repeat themselves step by step compare nothing from the fourth or fifth step on. What has
no such place is compared for ever: a change of length, or between training and evaluation, by about two exchanges;
without backwards, layers A A B A A C by two a round. After an error that this rank has seen it compares anew.

Not noticed, until the others wait for it: a rank that makes one call fewer, with its backward, of several that are
alike.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tpffn_triton.group_store import CollectiveError, Facts, store_of

# Names of facts, which must be the same on every rank that has them.
CALL, REJECTED, ANEW = "call", "rejected", "anew"

MOST_PLACES = 4096


class LayerKind(NamedTuple):
    """What ranks agree on: calls that differ in tokens alone are of one kind. Each option is a word or two for the
    message."""

    w1_shape: torch.Size
    dtype: torch.dtype
    device_type: str
    options: tuple[str, ...]


@dataclass
class _Agreed:
    """What a group has agreed on. A call is its kind, x's shape, its chunks and the backwards before it; a place is a
    call, how often it was made in a row, and its number since the last backward; or the first two.

    kinds       whose contents were compared
    follows     place → the call that came there when ranks last compared
    last, run, number
                this rank's place
    expected    the next call; None: compare, whatever it is
    backwards   that communicate, since the last call
    """

    kinds: set[LayerKind] = field(default_factory=set)
    follows: dict[tuple, tuple] = field(default_factory=dict)
    last: tuple | None = None
    run: int = 0
    number: int = 0
    expected: tuple | None = None
    backwards: int = 0

    def advance(self, call: tuple) -> None:
        self.run = self.run + 1 if call == self.last else 1
        self.number = 0 if call[-1] else self.number + 1
        self.last = call
        follows, run = self.follows, self.run
        self.expected = follows.get((call, run, self.number)) or follows.get((call, run)) or call

    def learn(self, call: tuple) -> None:
        """Remember that call comes at this place."""
        self.follows[self.last, self.run] = self.follows[self.last, self.run, self.number] = call

    def restart(self) -> None:
        self.kinds.clear()
        self.follows.clear()
        self.last, self.run, self.number = None, 0, 0


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
    group: dist.ProcessGroup,
    kind: LayerKind,
    chunks: int,
    replicated: tuple[str, ...],
    x: Tensor,
    *parameters: Tensor | None,
) -> None:
    """Compare this call with the group's others where there is something new (the table above), else return at once.

    chunks        of y's rows, at most
    replicated    which of x, b1 and b2 are the same on every rank, rather than a slice or a shard
    parameters    w1, w2, b1, b2

    Raises: ValueError: another rank rejected its arguments, or ranks differ; says who, and what each has.
    CollectiveError: a rank did not come.
    """
    agreed = _state(group)
    call = kind, x.shape, chunks, agreed.backwards
    agreed.backwards = 0
    if call == agreed.expected and not _every_call:
        agreed.advance(call)
        return
    anew = agreed.expected is None
    agreed.expected = None  # until all have agreed
    facts = {CALL: _description(*call)}
    if anew:
        facts[ANEW] = "compares anew"
    if _every_call or anew or kind not in agreed.kinds:
        named = dict(zip(("x", "w1", "w2", "b1", "b2"), (x, *parameters), strict=True))
        if "x" not in replicated and not _every_call:
            # One rank's tokens may overflow in fp16: a gradient scaler is to see it.
            del named["x"]
        facts |= contents(named, tuple(name for name in replicated if _every_call or name != "x"))
    ranks = compare(group, facts)
    # Places must be the same on all ranks, so all forget them at the same time.
    if any(ANEW in theirs for theirs in ranks) or len(agreed.follows) >= MOST_PLACES:
        agreed.restart()
    agreed.kinds.add(kind)
    agreed.learn(call)
    agreed.advance(call)


def agree_on_gradient(group: dist.ProcessGroup, dy: Tensor, replicated: bool, communicates: bool) -> None:
    """Compare a backward where it communicates and is one more than is expected before the next call; within
    `comparing_every_call` each, with dy, replicated or a slice. Raises: as `agree`."""
    if torch.compiler.is_compiling():
        return
    agreed = _state(group)
    agreed.backwards += communicates
    # Once is enough: after one too many the next call is compared in any case.
    new = communicates and (agreed.expected is None or agreed.backwards == agreed.expected[-1] + 1)
    if _every_call or new:
        digested = ("dy",) if replicated else ()
        facts = {CALL: f"dy {list(dy.shape)} in {dy.dtype}, backward {agreed.backwards} after a call"}
        compare(group, facts | contents({"dy": dy}, digested) if _every_call else facts)


def _state(group: dist.ProcessGroup) -> _Agreed:
    agreed = _agreed.get(group)
    if agreed is None:
        agreed = _agreed[group] = _Agreed()
    return agreed


def _description(kind: LayerKind, shape: torch.Size, chunks: int, backwards: int) -> str:
    words = [f"x {list(shape)} and w1 {list(kind.w1_shape)} in {kind.dtype} on {kind.device_type}", *kind.options]
    if chunks != 1:
        words.append(f"forward_chunks={chunks}")
    if backwards:
        words.append(f"after {backwards} backward{'s' * (backwards > 1)}")
    return ", ".join(words)


def reject(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the group that this rank's arguments are wrong: those that compare theirs will raise, and the error of those
    that are already in a collective will say so. The next call compares, so that it cannot pass for this one."""
    store = store_of(group)
    if store is not None:
        text = f"rejected: {error}"
        store.note(text)
        store.post({REJECTED: text})
        agreed = _state(group)
        agreed.expected, agreed.backwards = None, 0


def report(group: dist.ProcessGroup, error: Exception) -> None:
    """Tell the group's other ranks, whose collectives will fail, what this one raised. The next call compares: it comes
    after collectives that this rank has not taken part in."""
    _state(group).expected = None
    store = store_of(group)
    if store is not None and not isinstance(error, CollectiveError):
        store.note(f"raised {type(error).__name__}: {error}")


def reporting(group: "dist.ProcessGroup | None", function: Callable, *args: Any) -> Any:
    """Return function(*args); if it raises, `report` that to the group."""
    try:
        return function(*args)
    except Exception as error:
        if group is not None and not torch.compiler.is_compiling():
            report(group, error)
        raise


def compare(group: dist.ProcessGroup, facts: Facts) -> list[Facts]:
    """Return every rank's facts, none where ranks cannot ask each other. Raises: ValueError, CollectiveError: as
    `agree`."""
    store = store_of(group)
    if store is None:
        return []
    ranks = store.exchange(facts)
    _check(ranks)
    return ranks


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
