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
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton.group_store import CollectiveError, store_of

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


def observed() -> contextlib.AbstractContextManager:
    """Return the observer's context, for one such point."""
    return contextlib.nullcontext() if _observer is None else _observer()


def start_all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum t over the group; returns the tensor to `wait` for. t is consumed: outside of torch.compile the sum
    lands in t itself.

    Raises: ValueError: t is not contiguous (gloo would reduce other elements, silently). CollectiveError: it failed.
    """
    _check_contiguous("all-reduce", t)
    functional = torch.ops._c10d_functional
    all_reduce = functional.all_reduce if torch.compiler.is_compiling() else functional.all_reduce_
    return _start("all-reduce", group, all_reduce, t, "sum")


def start_all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to join every rank's t along dim 0; returns the tensor to `wait` for. t has the same shape on all ranks.

    Raises: ValueError: t is not contiguous. RuntimeError: under torch.func.vmap. CollectiveError: it failed.
    """
    _check_contiguous("all-gather", t)
    check_not_batched("an all-gather", t)
    return _start("all-gather", group, torch.ops._c10d_functional.all_gather_into_tensor, t, group.size())


def start_reduce_scatter(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum t over the group and keep this rank's part of dim 0; returns the tensor to `wait` for.

    Raises: ValueError: t is not contiguous, or dim 0 is not divisible by P (the message shows them). RuntimeError:
    under torch.func.vmap. CollectiveError: it failed.
    """
    _check_contiguous("reduce-scatter", t)
    check_not_batched("a reduce-scatter", t)
    check_splits(t, group.size())
    reduce_scatter_tensor = torch.ops._c10d_functional.reduce_scatter_tensor
    return _start("reduce-scatter", group, reduce_scatter_tensor, t, "sum", group.size())


def _start(name: str, group: dist.ProcessGroup, collective: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return collective(*args, name of the group); outside of torch.compile `wait` will know what it waits for."""
    if torch.compiler.is_compiling():
        return collective(*args, group.group_name)
    begun = name, group, time.monotonic()
    try:
        with observed():
            started: Any = collective(*args, group.group_name)
    except RuntimeError as error:
        raise _failed(begun, args[0], error) from error
    started._begun = begun
    return started


def wait(t: Tensor) -> Tensor:
    """Wait for a started collective: on a GPU the current stream waits, on a CPU the caller does.

    Raises: CollectiveError: it failed.
    """
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(t)
    begun = t.__dict__.pop("_begun", None)
    try:
        with observed():
            return torch.ops._c10d_functional.wait_tensor(t)
    except RuntimeError as error:
        if begun is None:
            raise
        raise _failed(begun, t, error) from error


def _failed(begun: tuple[str, dist.ProcessGroup, float], t: Tensor, error: RuntimeError) -> CollectiveError:
    name, group, since = begun
    message = next(iter(str(error).splitlines()), type(error).__name__)
    if "timed out" in message.lower() or "timeout" in message.lower():
        likely = "a rank stalled, raised, or makes another number of calls: its log should say"
    elif "connection" in message.lower():
        likely = "a rank's process ended, or it gave up on this collective before: its log should say"
    else:
        likely = "ranks differ in the tensors they send, or the group is no longer usable"
    what, why = f"{name} of {list(t.shape)} in {t.dtype} failed", f"{message}\n  likely {likely}"
    store = store_of(group)
    return CollectiveError(f"{what}: {why}") if store is None else store.failure(what, since, why)


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


def check_not_batched(name: str, t: Tensor) -> None:
    """Raises: RuntimeError: t is batched by torch.func.vmap."""
    if not torch.compiler.is_compiling() and is_batchedtensor(t):
        # It would stack the results of the batch's elements before they have arrived.
        raise RuntimeError(f"torch.func.vmap over sequence_parallel or batch_invariant: it cannot batch {name}")


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} of a tensor that is not contiguous: {tuple(t.shape)} with strides {t.stride()}")
