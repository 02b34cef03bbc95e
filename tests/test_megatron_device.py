"""FusedMLP against megatron-core's MLP where nothing is redirected: on a GPU, and interpreted on CPU tensors.

With several ranks: over NCCL alone. Everything else about FusedMLP is tested on CPU ranks (test_megatron_mlp.py).
"""

import pytest
import torch
import torch.nn.functional as F
from acceptance import assert_accurate

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from tpffn_triton.megatron import FusedMLP

# activation_func, gated_linear_unit, bias_activation_fusion
LAYERS = {
    "gelu": (F.gelu, False, False),
    "gelu_tanh": (F.gelu, False, True),
    "geglu": (F.gelu, True, False),
    "swiglu": (F.silu, True, True),
}


def mlp_of(cls, device, dtype, layer, **options):
    """Return an MLP with the weights that all of its sizes have."""
    function, gated, fusion = LAYERS[layer]
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=4,
        hidden_size=32,
        ffn_hidden_size=64,
        activation_func=function,
        gated_linear_unit=gated,
        bias_activation_fusion=fusion,
        params_dtype=dtype,
        use_cpu_initialization=True,
        **options,
    )
    torch.manual_seed(0)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return cls(config, linears, ffn_hidden_size=64).to(device)


def results(mlp, x, dy):
    """Return (output, dx, the weights' gradients ...)."""
    x = x.clone().requires_grad_()
    # Megatron's activations are compiled; for these few calls eager is quicker.
    with torch.compiler.set_stance("force_eager"):
        y, bias = mlp(x)
        (y + bias).backward(dy)
    return {"y": y, "dx": x.grad, **{name: p.grad for name, p in mlp.named_parameters()}}


def compare(device, dtype, layer, seed, **options):
    """Compare with Megatron's MLP in the same dtype, both against fp64."""
    ours, theirs = (mlp_of(cls, device, dtype, layer, **options) for cls in (FusedMLP, MLP))
    wide = mlp_of(MLP, device, torch.float64, layer, **options)
    with torch.no_grad():
        for p, q, r in zip(wide.parameters(), theirs.parameters(), ours.parameters(), strict=True):
            q.add_(torch.randn_like(q) * 0.1 if q.dim() == 1 else 0)
            p.copy_(q)
            r.copy_(q)
    torch.manual_seed(seed)
    x, dy = (torch.randn(16, 4, 32).to(device, dtype) for _ in range(2))
    found, eager = results(ours, x, dy), results(theirs, x, dy)
    exact = results(wide, x.double(), dy.double())
    for name, right in exact.items():
        noise = 2 * right.abs() if name.endswith("bias") else None  # sums over tokens, whose terms cancel
        assert_accurate(name, found[name], eager[name], right, noise)


def compare_on_ranks(rank, world_size, layer, dtype, sequence_parallel=False):
    """On a rank, with the GPU that it has; b2's gradient is this rank's part of a sum, in both."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(world_size)
    seed = 1 + rank * sequence_parallel
    options = {"tensor_model_parallel_size": world_size, "sequence_parallel": sequence_parallel}
    compare("cuda" if torch.cuda.is_available() else "cpu", dtype, layer, seed, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_rank(ranks_of, layer, dtype):
    ranks_of(1).run(compare_on_ranks, layer, dtype)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("layer", ["gelu_tanh", "swiglu"])
def test_ranks_over_nccl(nccl_ranks, layer, sequence_parallel):
    nccl_ranks.run(compare_on_ranks, layer, torch.float32, sequence_parallel)
