"""See what runs: kernel launches, and the operators of torch.ops.tpffn."""

import contextlib
from collections import Counter
from collections.abc import Iterator

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
