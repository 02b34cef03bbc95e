"""Raw collectives of the tensor-parallel group, which the operator orders itself: none has a gradient (regions.py).

    start_all_reduce       [...]          → [...]          sum over the group
    start_all_gather       [n, ...]       → [P·n, ...]     rank r's rows at r·n
    start_reduce_scatter   [P·n, ...]     → [n, ...]       rows r·n of the sum on rank r
    wait                   the result, once it has arrived

They go through `torch.ops._c10d_functional`: unlike `torch.distributed.all_reduce(async_op=True)` it keeps a compiled
graph whole, and unlike `torch.distributed._functional_collectives.all_reduce` it claims no gradient of its own. The
operators are the same in every supported torch; the functions of torch.distributed for the last two change their names.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributed.device_mesh import DeviceMesh

Observer = Callable[[], contextlib.AbstractContextManager]
_observer: Observer | None = None


def resolve_group(tp_group: "dist.ProcessGroup | DeviceMesh | None") -> "dist.ProcessGroup | None":
    """Return the process group behind tp_group; None for no group and for a group of one rank.

    Raises: TypeError: neither None, ProcessGroup nor DeviceMesh. ValueError: a mesh of more than one dim, or a group
    that this rank is not in.
    """
    if tp_group is None:
        return None
    if isinstance(tp_group, DeviceMesh):
        if tp_group.ndim != 1:
            raise ValueError(f"tp_group must be a 1-D DeviceMesh, got {tp_group.ndim} dims: {tp_group}")
        if tp_group.get_coordinate() is None:
            raise ValueError(f"tp_group does not contain this process (global rank {dist.get_rank()}): {tp_group}")
        tp_group = tp_group.get_group()
    if tp_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"tp_group does not contain this process (global rank {dist.get_rank()})")
    if not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(f"tp_group must be None, a ProcessGroup or a 1-D DeviceMesh, got {type(tp_group).__name__}")
    return tp_group if tp_group.size() > 1 else None


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Enter `observer()` around every point where computation may stand still for a collective (benchmarks)."""
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = None


def _observed() -> contextlib.AbstractContextManager:
    if _observer is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _observer()


def start_all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum t over the group; returns the tensor to `wait` for. t is consumed: outside of torch.compile the sum
    lands in t itself.

    Raises: ValueError: t is not contiguous (gloo would reduce other elements, silently).
    """
    _check_contiguous("all-reduce", t)
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.all_reduce(t, "sum", group.group_name)
    with _observed():
        return torch.ops._c10d_functional.all_reduce_(t, "sum", group.group_name)


def start_all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to join every rank's t along dim 0; returns the tensor to `wait` for. t has the same shape on all ranks.

    Raises: ValueError: t is not contiguous. RuntimeError: under torch.func.vmap.
    """
    _check_contiguous("all-gather", t)
    _check_not_batched("all-gather", t)
    with _observed():
        return torch.ops._c10d_functional.all_gather_into_tensor(t, group.size(), group.group_name)


def start_reduce_scatter(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum t over the group and keep this rank's part of dim 0; returns the tensor to `wait` for.

    Raises: ValueError: t is not contiguous, or dim 0 is not divisible by P (the message shows them). RuntimeError:
    under torch.func.vmap.
    """
    _check_contiguous("reduce-scatter", t)
    _check_not_batched("reduce-scatter", t)
    check_splits(t, group.size())
    with _observed():
        return torch.ops._c10d_functional.reduce_scatter_tensor(t, "sum", group.size(), group.group_name)


def wait(t: Tensor) -> Tensor:
    """Wait for a started collective: on a GPU the current stream waits, on a CPU the caller does."""
    with _observed():
        return torch.ops._c10d_functional.wait_tensor(t)


def all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return t summed over the group; consumes t."""
    return wait(start_all_reduce(t, group))


def all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's t joined along dim 0."""
    return wait(start_all_gather(t, group))


def reduce_scatter(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part of dim 0 of t summed over the group."""
    return wait(start_reduce_scatter(t, group))


def check_splits(t: Tensor, world_size: int) -> None:
    """Raises: ValueError: dim 0, the sequence, is absent or not divisible by P (the message shows both)."""
    if t.dim() < 1 or t.shape[0] % world_size:
        raise ValueError(
            f"sequence parallelism splits dim 0 into {world_size} equal parts; got a tensor of shape {list(t.shape)}"
        )


def _check_not_batched(name: str, t: Tensor) -> None:
    if not torch.compiler.is_compiling() and is_batchedtensor(t):
        # It would stack the results of the batch's elements before they have arrived.
        raise RuntimeError(f"torch.func.vmap over sequence parallelism: it does not know how to batch its {name}")


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} of a tensor that is not contiguous: {tuple(t.shape)} with strides {t.stride()}")
