"""The plan's peaks and saved bytes are those of what runs: what is alive after each operation, added up."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import tpffn_triton as tp
from tpffn_triton import functional, interpreter, partitioned, passes
from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn

pytestmark = pytest.mark.cpu_only
B, S, H, F, P = 2, 16, 32, 96, 4


class Alive(TorchDispatchMode):
    """`peak`: the most bytes of storages that were alive after an operation, those of `given` included."""

    def __init__(self, given):
        super().__init__()
        self.storages, self.peak = {}, 0
        for t in given:
            self.add(t)

    def add(self, t):
        storage = t.untyped_storage()
        known = self.storages.get(storage._cdata)
        if known is None or known[0].expired():  # an address may come again
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.tpffn.ffn_forward.default:
            with self:
                return _in_two_launches(*args)
        results = func(*args, **(kwargs or {}))
        for t in tree_iter(results):
            if isinstance(t, torch.Tensor):
                self.add(t)
        self.storages = {key: known for key, known in self.storages.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return results


def _in_two_launches(x, w1, b1, w2, b2, activation, keep, out_dtype=None):
    """ffn_forward, so that act is seen: what is alive at once is the same in one launch."""
    act, pre_act = torch.ops.tpffn.linear_act(x, w1, b1, activation, keep == "pre_act")
    return torch.ops.tpffn.linear(act, w2, b2, out_dtype), act if keep == "act" else pre_act


@pytest.fixture
def group(monkeypatch):
    """A group whose collectives do nothing at once, but hold their input until they are waited for, as real ones do."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    for module in (functional, partitioned):
        monkeypatch.setattr(module, "agree", lambda *args: None)
    for module in (passes, partitioned):
        monkeypatch.setattr(module, "agree_on_gradient", lambda *args: None)
        for name in ("start_all_gather", "start_reduce_scatter"):
            monkeypatch.setattr(module, name, _holding(getattr(module, name)))
        monkeypatch.setattr(module, "wait", _letting_go(module.wait))
    dist.init_process_group("fake", rank=0, world_size=P, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def _holding(start):
    def held(t, group):
        started = start(t, group)
        started.held = t
        return started

    return held


def _letting_go(wait):
    def waited(t):
        result = wait(t)
        t.__dict__.pop("held", None)
        return result

    return waited


WAYS = {
    **{name: {"partitioning": name} for name in PARTITIONINGS},
    "ffn": {},
    "ffn, recomputing": {"save": "nothing"},
    "ffn on slices": {"sequence_parallel": True},
    "ffn on slices, recomputing": {"sequence_parallel": True, "save": "nothing"},
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("way", WAYS)
def test_peaks_and_saved_bytes(way, bias, activation, group):
    options = WAYS[way]
    p = PARTITIONINGS[options.get("partitioning", "column_row")]
    shapes = p.shard_shapes(H, F, P, halves(activation))
    shards = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items() if bias or name[0] == "w"}
    x = torch.randn((S // P, B, H) if "sequence_parallel" in options else (B, S, H), requires_grad=True)
    dy = torch.randn_like(x)
    plan = plan_ffn(B, S, H, F, P, activation=activation, bias=bias, **options)
    call = partitioned_ffn if "partitioning" in options else tp.ffn
    with Alive([x, *shards.values()]) as forward:
        y = call(x, activation=activation, tp_group=group, **shards, **options)
    assert forward.peak == plan.totals["peak_bytes_forward"]

    function = y.grad_fn
    while not hasattr(function, "saved_tensors"):  # y may be a view
        function = function.next_functions[0][0]
    given = {t.data_ptr() for t in shards.values()}
    saved = [t for t in function.saved_tensors if t is not None and t.data_ptr() not in given]
    assert sum(t.nbytes for t in saved) == plan.totals["saved_bytes"]

    edge = get_gradient_edge(y)  # y itself is let go of
    with Alive([x, dy, *shards.values(), *saved]) as backward:
        del y, function, saved
        torch.autograd.backward((edge,), (dy,))
    assert backward.peak == plan.totals["peak_bytes_backward"]
