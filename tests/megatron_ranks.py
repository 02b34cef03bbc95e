"""Run comparisons with megatron-core on a pool of ranks, and the cases to compare; imports no megatron-core itself.

    on_ranks(Ranks(4), tp, "megatron_cases.equals_megatrons", "FusedMLP", layer)

Every rank limits its memory, leads CUDA to the CPU, splits its world into tensor-parallel groups of `tp` ranks beside
data-parallel ones, and calls the function named. Such a rank is of no use to other tests. The modules so named import
megatron-core at their top, and nothing but a rank imports them.
"""

import importlib
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from rank_pool import Ranks, use

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# A rank needs 1 GiB. Megatron's own MLP under recompute_modules=["mlp"] would take the whole machine.
MEMORY_LIMIT = 12 << 30
HIDDEN, FFN, HEADS, VOCABULARY, SEQUENCE, BATCH = 64, 256, 4, 64, 32, 2
_layouts: dict[int, dict[str, Any]] = {}


class Layer(NamedTuple):
    """What Megatron's config says of an MLP; activation is the config's activation_func."""

    activation: str = "gelu"
    gated: bool = False
    fused: bool = False  # bias_activation_fusion
    bias: bool = True
    sequence_parallel: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        words = {"gated": self.gated, "fused": self.fused, "no bias": not self.bias, "SP": self.sequence_parallel}
        return " ".join([self.activation, *(word for word, said in words.items() if said), self.dtype])


class Training(NamedTuple):
    """A GPT to train, with an MLP of `layer`."""

    layer: Layer = Layer()
    recompute: str | None = None  # "full", or the name of a module
    gradient_accumulation_fusion: bool = False  # of the MLPs alone: attention's linears need APEX for it
    grad_reduce_in_fp32: bool = True
    bucket_size: int = 2000

    def __str__(self) -> str:
        return f"{self.layer} recompute={self.recompute} fusion={self.gradient_accumulation_fusion}"


PLAIN = [Layer(name) for name in ("gelu", "silu", "relu", "relu2")] + [Layer("gelu", fused=True)]
GATED = [Layer(name, gated=True, fused=fused) for name in ("gelu", "silu") for fused in (False, True)]


def on_ranks(pool: Ranks, tp: int, function: str, *args: Any, folder: str | None = None) -> list:
    """Return what every rank of the pool returns from "module.function"; raises if any rank did.

    folder: where megatron-core is imported from, by the first call to a pool; None: as installed
    """
    return pool.run(call, tp, function, args, folder)


def call(rank: int, world_size: int, tp: int, function: str, args: tuple, folder: str | None = None) -> Any:
    """Call "module.function" on a rank."""
    if not _layouts:
        _redirect(folder)
    _split(tp)
    use("native")
    module, name = function.split(".")
    return getattr(importlib.import_module(module), name)(*args)


def _split(tp: int) -> None:
    """Have parallel_state hold the groups of this layout. Groups made anew each time would pile up: none ever ends."""
    from megatron.core import parallel_state, tensor_parallel

    if tp not in _layouts:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp)
        _layouts[tp] = {name: value for name, value in vars(parallel_state).items() if name.strip("_").isupper()}
    vars(parallel_state).update(_layouts[tp])
    tensor_parallel.model_parallel_cuda_manual_seed(7)


def _redirect(folder: str | None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(EXAMPLES))
    if folder is not None:
        sys.path.insert(0, folder)
    importlib.import_module("megatron_without_gpu").run_on_cpu()
