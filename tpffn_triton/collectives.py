"""Collectives of the tensor-parallel group: raw ones that the operator orders itself, and differentiable regions.

raw            start_all_reduce, wait, all_reduce       no gradient; start returns before the data has arrived
regions        copy_to_tp_region                        forward: identity         backward: all-reduce (sum)
               reduce_from_tp_region                    forward: all-reduce (sum) backward: identity

The regions are Megatron-LM's f and g. The raw collectives go through `torch.ops._c10d_functional`: unlike
`torch.distributed.all_reduce(async_op=True)` it keeps a compiled graph whole, and unlike
`torch.distributed._functional_collectives.all_reduce` it claims no gradient of its own.

Source: Shoeybi et al., "Megatron-LM" (2019), figure 3.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
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


def _observed() -> contextlib.AbstractContextManager:
    if _observer is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _observer()


def start_all_reduce(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to sum t over the group; returns the tensor to `wait` for. t is consumed: outside of torch.compile the sum
    lands in t itself.

    Raises: ValueError: t is not contiguous (gloo would reduce other elements, silently). CollectiveError: it failed.
    """
    if not t.is_contiguous():
        raise ValueError(f"all-reduce of a tensor that is not contiguous: {tuple(t.shape)} with strides {t.stride()}")
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.all_reduce(t, "sum", group.group_name)
    return _start("all-reduce", group, torch.ops._c10d_functional.all_reduce_, t, "sum")


def _start(name: str, group: dist.ProcessGroup, collective: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return collective(*args, name of the group), outside of torch.compile; `wait` will know what it waits for."""
    begun = name, group, time.monotonic()
    try:
        with _observed():
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
        with _observed():
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


def _sum_of(t: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
    t = t.detach()
    return all_reduce(t.contiguous() if consume else t.clone(memory_format=torch.contiguous_format), group)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
        ctx.group, ctx.consume = group, consume
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of(dx, ctx.group, ctx.consume), None, None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup, consume: bool) -> Tensor:
        return _sum_of(partial, group, consume)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy, None, None


def copy_to_tp_region(x: Tensor, group: "dist.ProcessGroup | None", *, consume: bool = False) -> Tensor:
    """Enter the parallel region: forward identity, backward all-reduce of dx. Identity without a group.

    consume: sum into dx itself, sparing a copy; right only where nothing else reads dx.
    """
    return x if group is None else _CopyToRegion.apply(x, group, consume)


def reduce_from_tp_region(partial: Tensor, group: "dist.ProcessGroup | None", *, consume: bool = False) -> Tensor:
    """Leave the parallel region: forward all-reduce of partial sums, backward identity. Identity without a group.

    consume: sum into `partial` itself, sparing a copy; right only where nothing else reads it, backward included.
    """
    return partial if group is None else _ReduceFromRegion.apply(partial, group, consume)
