"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import functools
import os

# Of the interpreter's products; before the first import of numpy. Workers and ranks share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before the first import of a kernel: triton reads it when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

from megatron_ranks import on_ranks
from rank_pool import Ranks

from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs, forward, weight_grads


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run. Begin with what takes minutes: others are done beside it, not after it."""
    items.sort(key=lambda item: item.path.name != "test_compile_gate.py")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
        if item.get_closest_marker("cpu_only") and torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="exercises the CPU path, packaging or the compiler"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Workers and ranks share the cores; and one thread keeps eager's own sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill every fresh output with NaN: an element that no program writes cannot go unseen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def in_several_launches(monkeypatch):
    """Tables that never ask for one launch: sizes that are too large for one take long to interpret."""
    monkeypatch.setattr(_configs, "select_for_few_tokens", lambda *args: None)
    caches = forward._chosen, weight_grads._prepare
    for arch in _configs.MOST_WAVES:
        monkeypatch.setitem(_configs.MOST_WAVES, arch, 0)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=["triton", "native"])
def implementation(request, monkeypatch) -> str:
    """Run a test on the Triton kernels, and on a CPU also on the native path."""
    if request.param == "native":
        if torch.cuda.is_available():
            pytest.skip("the native path is for CPU tensors")
        monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    return request.param


@pytest.fixture(scope="module")
def ranks_of():
    """Return a function: world size → a pool of that many gloo ranks, kept for the module."""
    pools: dict[int, Ranks] = {}

    def pool(world_size: int) -> Ranks:
        if world_size not in pools:
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    yield pool
    for p in pools.values():
        p.close()


@pytest.fixture(scope="session")
def on_megatron_ranks():
    """Return a function: tp, "module.function", arguments → what each of four ranks returned from it.

    One pool for all modules: its ranks take seconds to import megatron-core.
    """
    pytest.importorskip("megatron.core")
    pool = Ranks(4)
    yield functools.partial(on_ranks, pool)
    pool.close()


@pytest.fixture(scope="module")
def nccl_ranks():
    """Two ranks over NCCL, with a GPU each."""
    ranks = Ranks(2, "nccl")
    yield ranks
    ranks.close()
