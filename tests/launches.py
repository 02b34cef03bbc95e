"""See what runs: kernel launches, the operators of torch.ops.tpffn, and collectives."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from tpffn_triton.kernels._launch import Launch


@contextlib.contextmanager
def count_launches() -> Iterator[Counter]:
    """Yield a Counter: kernel name → launches inside the block."""
    counts: Counter = Counter()
    launch = Launch.__call__

    def counted(self, *tensors):
        counts[self._kernel.fn.__name__] += 1
        return launch(self, *tensors)

    Launch.__call__ = counted
    try:
        yield counts
    finally:
        Launch.__call__ = launch


class RecordOperators(TorchDispatchMode):
    """Append the name of each tpffn operator that is called to `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tpffn":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class CountCollectives(CommDebugMode):
    """torch's counter of collectives, told of the in-place all-reduce that it does not know, and of bytes.

    counts   name → [times, bytes that each rank gave to it]
    calls    in order: (kind, elements of the full tensor)
    """

    def __init__(self) -> None:
        super().__init__()
        self.comm_registry.add(torch.ops._c10d_functional.all_reduce_)
        self.bytes: Counter = Counter()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.comm_registry:
            name = func.overloadpacket.__name__
            self.bytes[name] += args[0].nbytes
            ranks = args[1] if name == "all_gather_into_tensor" else 1  # each gives its part
            self.calls.append(
                (name.removesuffix("_").removesuffix("_tensor").removesuffix("_into"), ranks * args[0].numel())
            )
        return super().__torch_dispatch__(func, types, args, kwargs)

    @property
    def counts(self) -> dict[str, list[int]]:
        return {
            packet.__name__: [times, self.bytes[packet.__name__]] for packet, times in self.get_comm_counts().items()
        }
