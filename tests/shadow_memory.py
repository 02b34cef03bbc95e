"""Shadow of the memory that simulated programs share: which bytes are defined, who accessed them, and in what order.

Programs of a run are numbered from 0, and every access takes the next step, counted over all of them. For each byte and
kind of access the shadow keeps the step of every program's last one. known[p, q] is the last step of program q that is
ordered before whatever p does next; an access races with a conflicting one of q that came after it.

    release   an atomic leaves a copy of its program's row of `known`, its own step included, at its address
    acquire   an atomic takes over what was left at its address: known[p] = max(known[p], left)
    between   other atomics keep what was left (a release sequence); a plain store to the address removes it
    scope     "cta" reaches no other program: it neither leaves nor takes, and races with other programs' atomics
    run       a new one forgets all accesses: kernel boundaries order everything

Source: vector clocks as in FastTrack (Flanagan and Freund, PLDI 2009), with whole vectors instead of epochs; what
conflicts, scopes and release sequences as in the PTX memory consistency model.
"""

import linecache
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

READS, WRITES = "reads", "writes"
UPDATES, UPDATES_IN_CTA = "atomically updates", "atomically (scope cta) updates"
CONFLICTS = {
    READS: (WRITES, UPDATES, UPDATES_IN_CTA),
    WRITES: (READS, WRITES, UPDATES, UPDATES_IN_CTA),
    UPDATES: (READS, WRITES, UPDATES_IN_CTA),
    UPDATES_IN_CTA: (READS, WRITES, UPDATES, UPDATES_IN_CTA),
}
# Fresh memory holds it, so that bytes which the host writes before a launch are seen to differ.
FRESH = 0xCB


class Fault(Exception):
    """What a kernel does wrong in a simulated schedule."""


class Race(Fault):
    """Two programs access the same byte, at least one of them writes, and nothing orders the two."""


class Uninitialised(Fault):
    """A program reads what nobody has written."""


class OutOfBounds(Fault):
    """A program accesses what no argument of its launch covers."""


class View(NamedTuple):
    """An argument's part of a storage; strides in elements."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def index(self, address: int) -> list[int]:
        """Return the index of the element at an address; past the shape if the address is."""
        index, offset = [0] * len(self.shape), (address - self.address) // self.itemsize
        for dim in sorted(range(len(self.shape)), key=lambda dim: -self.strides[dim]):
            if self.strides[dim]:
                index[dim], offset = divmod(offset, self.strides[dim])
        return index

    def covers(self, address: int) -> bool:
        return all(0 <= i < size for i, size in zip(self.index(address), self.shape, strict=True))

    def distance(self, address: int) -> int:
        """Return how far an address is from the bytes between the first element and the last."""
        last = self.address + self.itemsize * sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return max(self.address - address, address - last, 0)

    def describe(self, address: int) -> str:
        return f"{self.name}{self.index(address)} (shape {list(self.shape)})"


class Buffer:
    """A storage and its shadow; holding the storage keeps its addresses from being given to another.

    contents  [bytes]                   uint8, the memory itself
    written   [bytes]                   whether the byte is defined
    last      kind: [bytes, programs]   the step of each program's last access of the kind; 0: none
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.address = storage.data_ptr()
        self.contents = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        self.written = np.ones(len(self.contents), bool)
        self.last: dict[str, np.ndarray] = {}


class Arguments:
    """The memory that a launch may access: buffers in order of address, and by buffer which bytes, under what names."""

    def __init__(self, views: list[tuple[View, Buffer]]) -> None:
        self.views: dict[Buffer, list[View]] = {}
        for view, buffer in sorted(views, key=lambda pair: pair[1].address):
            self.views.setdefault(buffer, []).append(view)
        self.buffers = list(self.views)
        self.addresses = np.array([buffer.address for buffer in self.buffers])
        self.covered = [self._covered(buffer) for buffer in self.buffers]

    def _covered(self, buffer: Buffer) -> np.ndarray:
        covered = torch.zeros(len(buffer.contents), dtype=torch.bool)
        for view in self.views[buffer]:
            shape, strides = (*view.shape, view.itemsize), (*(s * view.itemsize for s in view.strides), 1)
            covered.as_strided(shape, strides, view.address - buffer.address).fill_(True)
        return covered.numpy()

    def describe(self, address: int) -> str:
        """Name the element at an address, in every argument that has it, or else in the nearest."""
        views = [view for views in self.views.values() for view in views]
        covering = [view for view in views if view.covers(address)]
        nearest = min(views, key=lambda view: view.distance(address))
        return ", also ".join(view.describe(address) for view in covering or [nearest])


class ShadowMemory:
    """Check every access of a run. A program is anything with `number`, `name` and its launch's `memory`; `lines` are
    the (file, line) where it is, the innermost first."""

    def __init__(self) -> None:
        self._buffers: dict[int, Buffer] = {}
        self.begin(0)

    def _buffer(self, storage: torch.UntypedStorage) -> Buffer:
        if storage.data_ptr() not in self._buffers:
            self._buffers[storage.data_ptr()] = Buffer(storage)
        return self._buffers[storage.data_ptr()]

    def allocate(self, tensor: torch.Tensor) -> None:
        """Take note of a new CPU tensor whose contents are undefined, and overwrite them."""
        buffer = self._buffer(tensor.untyped_storage())
        buffer.contents[:], buffer.written[:] = FRESH, False

    def arguments(self, named: dict[str, Any]) -> Arguments:
        """Return the memory behind a launch's tensors and descriptors. Raises: TypeError: one is not on the CPU."""
        views = [
            (view, self._buffer(storage))
            for name, value in named.items()
            for view, storage in _views(name, value)
            if storage.nbytes()
        ]
        for _, buffer in views:
            if (buffer.contents[~buffer.written] != FRESH).any():
                buffer.written[:] = True  # by the host, which is taken to write all or nothing
        return Arguments(views)

    def begin(self, programs: int) -> None:
        """Start a run: all that came before is ordered before it."""
        self._programs = programs
        self._known = np.zeros((programs, programs), np.int64)
        np.fill_diagonal(self._known, np.iinfo(np.int64).max)
        self._left: dict[int, np.ndarray] = {}
        self._history: list[tuple[Any, Sequence]] = [(None, ())]  # by step: program, lines
        for buffer in self._buffers.values():
            buffer.last = {}

    def access(self, program: Any, kind: str, addresses: np.ndarray, width: int, lines: Sequence) -> None:
        """Check one access of `width` bytes at each address, then take note of it.

        Raises: OutOfBounds, Uninitialised, Race: the first fault found, in this order.
        """
        step = len(self._history)
        self._history.append((program, lines))
        for buffer, offsets in self._located(program, kind, addresses, width, lines):
            if kind != WRITES and not buffer.written[offsets].all():
                address = buffer.address + int(offsets[~buffer.written[offsets]][0])
                raise Uninitialised(
                    f"{program.name} {kind} {program.memory.describe(address)}, which nobody has written\n"
                    f"  {source(lines)}"
                )
            for other in CONFLICTS[kind]:
                if other in buffer.last:
                    self._check_order(program, kind, other, buffer, offsets, lines)
            if kind not in buffer.last:
                buffer.last[kind] = np.zeros((len(buffer.contents), self._programs), np.int32)
            buffer.last[kind][offsets, program.number] = step
            if kind != READS:
                buffer.written[offsets] = True
        if kind == WRITES and self._left:
            for address in self._left.keys() & set(addresses.tolist()):
                del self._left[address]

    def _located(self, program, kind, addresses, width, lines) -> Iterator[tuple[Buffer, np.ndarray]]:
        """Yield each buffer that is accessed and the offsets of the bytes in it."""
        memory: Arguments = program.memory
        which = np.searchsorted(memory.addresses, addresses, side="right") - 1
        for i in np.unique(which):
            if not memory.buffers:
                raise OutOfBounds(f"{program.name} {kind} memory, but has no argument\n  {source(lines)}")
            buffer, covered = memory.buffers[max(i, 0)], memory.covered[max(i, 0)]
            offsets = ((addresses[which == i] - buffer.address)[:, None] + np.arange(width)).ravel()
            inside = (offsets >= 0) & (offsets < len(covered))
            inside[inside] = covered[offsets[inside]]
            if not inside.all():
                outside = buffer.address + offsets[~inside]
                raise OutOfBounds(
                    f"{program.name} {kind} {len(outside)} bytes outside of its arguments, the first at "
                    f"{memory.describe(int(outside[0]))}\n  {source(lines)}"
                )
            yield buffer, offsets

    def _check_order(self, program, kind, other, buffer, offsets, lines) -> None:
        steps = buffer.last[other][offsets]
        unordered = steps > self._known[program.number]
        if unordered.any():
            first, by = np.argwhere(unordered)[0]
            whom, where = self._history[steps[first, by]]
            raise Race(
                f"{program.name} {kind} {program.memory.describe(buffer.address + int(offsets[first]))} and "
                f"{whom.name} {other} it, in no order\n  {source(lines)}\n  {source(where)}"
            )

    def acquire(self, program: Any, addresses: np.ndarray) -> None:
        """Order what was released at the addresses before what the program does next."""
        for address in addresses.tolist():
            if address in self._left:
                np.maximum(self._known[program.number], self._left[address], out=self._known[program.number])

    def release(self, program: Any, addresses: np.ndarray) -> None:
        """Leave what is ordered before the program's last access, that access included, at the addresses."""
        known = self._known[program.number].copy()
        known[program.number] = len(self._history) - 1
        for address in addresses.tolist():
            self._left[address] = np.maximum(known, self._left.get(address, known))


def source(lines: Sequence[tuple[str, int]]) -> str:
    """Return the text of (file, line)s."""
    return "\n    from ".join(
        f"{os.path.relpath(file)}:{line}: {linecache.getline(file, line).strip()}" for file, line in lines
    )


def _views(name: str, value: Any) -> Iterator[tuple[View, torch.UntypedStorage]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _views(f"{name}[{i}]", item)
    elif isinstance(value, TensorDescriptor) or hasattr(value, "data_ptr"):
        tensor = getattr(value, "base", value)
        if tensor.device.type != "cpu":
            raise TypeError(f"{name}: the interpreter takes CPU tensors, got one on {tensor.device}")
        strides = value.strides if isinstance(value, TensorDescriptor) else value.stride()
        view = View(name, tensor.data_ptr(), tuple(value.shape), tuple(strides), tensor.element_size())
        yield view, tensor.untyped_storage()
