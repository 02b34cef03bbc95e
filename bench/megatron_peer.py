"""Megatron-Core's own MLP as a peer, on the harness's shards and over its process group.

    megatron         the installed version's MLP, of its ColumnParallelLinear and RowParallelLinear
    megatron-fused   tpffn_triton.megatron.FusedMLP in its place: `fused` and what the adapter's Python costs

    gelu_tanh, geglu_tanh, swiglu    with bias_activation_fusion: bias and activation in Megatron's compiled functions
    relu2                            Megatron's squared_relu, compiled too; before 0.14 an eager one
    gelu, geglu, silu, relu          eager: bias, then config.activation_func

b2 is added to what the module returns, as Megatron's bias-dropout-add does. x is taken as it comes: Megatron's
[S, B, H] is another order of the same tokens. Its exposed communication is measured as ours is. With sequence
parallelism it gathers x into a buffer of its own for good, at the first step: peak memory leaves that out.

CUDA_DEVICE_MAX_CONNECTIONS is left as it is: Megatron asks for 1, to have collectives begin before the GEMMs launched
after them, but it holds for a whole process, hence for all that are compared. Rows record it; set it for the run.

This process is changed where a module is built: without a group torch.distributed begins with one rank; parallel_state
gets the group and the buffer; on a CPU torch.cuda.current_device leads to it with sequence parallelism, and where
nothing can be compiled torch.compile is off.

Source: megatron-core 0.12.0 to 0.19.0, transformer/mlp.py, tensor_parallel/layers.py and mappings.py.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import checkout  # noqa: F401
import compiler
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shard_modules import OnShards
from torch import Tensor

from tpffn_triton import collectives
from tpffn_triton.kernels.activations import GATED_ACTIVATIONS
from tpffn_triton.reference import ACTIVATIONS

Group = dist.ProcessGroup | None
_FUSED = {"gelu_tanh": F.gelu, "swiglu": F.silu, "geglu_tanh": F.gelu}
_EAGER = {"gelu": F.gelu, "geglu": F.gelu, "silu": F.silu, "relu": F.relu}


@functools.cache
def missing() -> str | None:
    """Return what to install where megatron-core cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each rank would tell which of its own extras it lacks
            importlib.import_module("megatron.core.transformer.mlp")
    except ImportError as error:
        return f"needs megatron-core ({error}): pip install 'tpffn-triton[megatron]'"
    return None


def build_megatron(activation: str, sequence_parallel: bool) -> Callable[..., Tensor]:
    """Return Megatron's MLP as a forward; implementations.py has its shapes."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def make(config: Any, **given: Any) -> Any:
        if config.bias_activation_fusion or hasattr(config.activation_func, "_torchdynamo_orig_callable"):
            # Compiled for this problem's shape and dtype alone, as in a training run.
            torch.compiler.reset()
            if config.use_cpu_initialization and not _can_compile():
                torch.compiler.set_stance("force_eager")
        return MLP(config, linears, **given)

    return _forward(make, activation, sequence_parallel)


def build_fused(activation: str, sequence_parallel: bool) -> Callable[..., Tensor]:
    """Return FusedMLP as a forward."""
    from tpffn_triton.megatron import FusedMLP

    return _forward(FusedMLP, activation, sequence_parallel)


def _forward(make: Callable[..., Any], activation: str, sequence_parallel: bool) -> Callable[..., Tensor]:
    module = OnShards(functools.partial(_module, make, activation, sequence_parallel))

    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        output, bias = module(w1, b1, w2, b2, group)(x)
        return output + bias

    return forward


def _module(
    make: Callable[..., Any],
    activation: str,
    sequence_parallel: bool,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    group: Group,
) -> Any:
    """Make the module and put the shards in the place of its parameters."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    sequence_parallel = sequence_parallel and group is not None
    world_size = 1 if group is None else group.size()
    own_group = _prepare(sequence_parallel, w1.device.type, group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TransformerConfig(
            num_layers=1,
            num_attention_heads=world_size,
            hidden_size=w2.shape[0],
            ffn_hidden_size=world_size * w2.shape[1],
            tensor_model_parallel_size=world_size,
            sequence_parallel=sequence_parallel,
            gated_linear_unit=activation in GATED_ACTIVATIONS,
            activation_func=_activation_func(activation),
            bias_activation_fusion=activation in _FUSED,
            params_dtype=w1.dtype,
            use_cpu_initialization=w1.device.type == "cpu",
            perform_initialization=False,
        )
        takes_group = "tp_group" in signature(MLP.__init__).parameters  # not before 0.13
        given = {"ffn_hidden_size": config.ffn_hidden_size, "tp_group": own_group} if takes_group else {}
        module = make(config, **given)
    # Not Parameters made of them: backward is to leave its gradients in the harness's tensors.
    for linear, weight, bias in ((module.linear_fc1, w1, b1), (module.linear_fc2, w2, b2)):
        linear._parameters.update(weight=weight, bias=bias)
    return module


def _activation_func(activation: str) -> Any:
    if activation == "relu2":
        with contextlib.suppress(ImportError):
            return importlib.import_module("megatron.core.activations").squared_relu
        return ACTIVATIONS["relu2"]
    return (_FUSED | _EAGER)[activation]


def _prepare(sequence_parallel: bool, device_type: str, group: Group) -> dist.ProcessGroup:
    """Make ready in this process what a module needs, see the module docstring; returns the module's group."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = group or dist.group.WORLD
    assert found is not None
    # Up to 0.14 linears ask parallel_state for the group. Not initialize_model_parallel: it makes some twenty groups.
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = found
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    if found.size() > 1:
        _observe_collectives()
    if device_type == "cpu" and sequence_parallel and not torch.cuda.is_available():
        cuda: Any = torch.cuda
        cuda.current_device = lambda: torch.device("cpu")
    return found


@functools.cache
def _can_compile() -> bool:
    """Say whether torch.compile works on a CPU here, and on stderr once where it does not."""
    reason = compiler.missing()
    if reason is not None and dist.get_rank() == 0:
        print(f"Megatron's fused activation runs EAGERLY, torch.compile fails here: {reason}", file=sys.stderr)
    return reason is None


@functools.cache
def _observe_collectives() -> None:
    """Have `collectives.observe` see the collectives that Megatron calls: replaces them, once a process."""
    from megatron.core.tensor_parallel import layers, mappings

    # Each rank would warn of CUDA_DEVICE_MAX_CONNECTIONS, which the table does, and of the collectives' names in torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    layers.linear_with_grad_accumulation_and_async_allreduce.warned = True
    aliases = ("dist_all_gather_func", "dist_reduce_scatter_func")
    for module, names in ((dist, ("all_reduce",)), (layers, aliases), (mappings, aliases)):
        for name in names:
            setattr(module, name, _observed(getattr(module, name)))


def _observed(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        with collectives.observed():
            work = collective(*args, **kwargs)
        return None if work is None else _ObservedWork(work)

    return call


class _ObservedWork:
    """What an asynchronous collective of torch.distributed returns: its `wait` is observed."""

    def __init__(self, work: dist.Work) -> None:
        self.work = work

    def wait(self, *args: Any) -> bool:
        with collectives.observed():
            return self.work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)
