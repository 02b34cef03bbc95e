"""FusedMLP against Megatron-Core's MLP, on a rank (megatron_ranks.py): comparisons raise AssertionError.

Which class is compared is an argument, so that a broken one can be: FusedMLP, or another name in broken_megatron.py.
"""

import copy
from typing import Any

import broken_megatron
import torch
import torch.distributed as dist
import torch.nn.functional as F
from acceptance import assert_accurate
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_ranks import BATCH, FFN, HEADS, HIDDEN, SEQUENCE, Layer
from rank_pool import use

from tpffn_triton import reference

try:
    from megatron.core.activations import squared_relu
except ModuleNotFoundError:  # before 0.14
    squared_relu = reference.ACTIVATIONS["relu2"]


ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "relu2": squared_relu}
LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def config_of(layer: Layer, **options: Any) -> TransformerConfig:
    """Return a config in the current layout; options over those of the layer."""
    own = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": layer.sequence_parallel,
        "gated_linear_unit": layer.gated,
        "activation_func": ACTIVATIONS[layer.activation],
        "bias_activation_fusion": layer.fused,
        "add_bias_linear": layer.bias,
        "params_dtype": getattr(torch, layer.dtype),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**own | options)


def class_of(name: str) -> type:
    """Return FusedMLP or a broken one by its name, or Megatron's own."""
    return MLP if name == "MLP" else getattr(broken_megatron, name)


def build(cls: type, config: TransformerConfig, seed: int = 1) -> Any:
    """Return an MLP of a class, with biases that are not zero; the same seed gives the same full weights."""
    torch.manual_seed(seed)
    mlp = cls(config, LINEARS)
    rank = parallel_state.get_tensor_model_parallel_rank()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        if mlp.linear_fc2.bias is not None:
            mlp.linear_fc2.bias.normal_()
            torch.manual_seed(seed + 2 + rank)
            mlp.linear_fc1.bias.normal_()
    return mlp


def draw_input(config: TransformerConfig, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden_states and the output's gradient, [S, B, H], or this rank's slices of them."""
    torch.manual_seed(seed)
    x, dy = torch.randn(2, SEQUENCE, BATCH, HIDDEN, dtype=torch.float64).to(config.params_dtype)
    if config.sequence_parallel:
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        x, dy = (t.chunk(size)[rank] for t in (x, dy))
    return x, dy


def results(mlp: Any, x: torch.Tensor, dy: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Return what forward and backward give, by name; Megatron adds the bias in another place, as here."""
    mlp.zero_grad()
    x = x.clone().requires_grad_()
    y, bias = mlp(x, **options)
    total = y if bias is None else y + bias
    total.backward(dy)
    found = {"y": y, "y + bias": total, "dx": x.grad}
    found |= {} if bias is None else {"bias": bias}
    return {**found, **{name: p.grad for name, p in mlp.named_parameters()}}


def equals_megatrons(name: str, layer: Layer, implementation: str = "native") -> None:
    """Compare parameters with their attributes, state, outputs and gradients; fp64 is Megatron's MLP in fp64."""
    use(implementation)
    config = config_of(layer)
    theirs, ours = (build(cls, config) for cls in (MLP, class_of(name)))
    same_parameters(ours, theirs)
    wide = build(MLP, config_of(layer._replace(dtype="float64")))
    with torch.no_grad():
        for p, q in zip(wide.parameters(), theirs.parameters(), strict=True):
            p.copy_(q)
    found, expected, exact = (several_results(mlp, config) for mlp in (ours, theirs, wide))
    assert found.keys() == expected.keys(), f"results {[*found]}, expected {[*expected]}"
    for key, value in found.items():
        # Of all shards together: the errors of a few elements are large or small by luck.
        ours_whole, eager, right = (gathered(t) for t in (value, expected[key], exact[key]))
        # A sum over tokens, whose terms cancel.
        noise = 2 * right.abs() if key == "linear_fc1.bias" else None
        assert_accurate(key, ours_whole, eager, right, noise)


def several_results(mlp: Any, config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Return the results of several inputs, drawn in the config's dtype, one below the other."""
    drawn = []
    for seed in range(9, 13):
        x, dy = (t.to(mlp.linear_fc1.weight.dtype) for t in draw_input(config, seed))
        drawn.append(results(mlp, x, dy))
    return {name: torch.cat([each[name] for each in drawn]) for name in drawn[0]}


def gathered(t: torch.Tensor) -> torch.Tensor:
    """Return the tensor-parallel ranks' tensors, one below the other."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, t.detach().contiguous(), group=group)
    return torch.cat(parts)


def same_parameters(ours: Any, theirs: Any) -> None:
    """Require Megatron's names, values, attributes of every parameter, and keys of the state."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert [*mine] == [*other], f"parameters {[*mine]}, expected {[*other]}"
    for name, p in mine.items():
        assert torch.equal(p, other[name]), f"{name}: other initial values"
        assert vars(p) == vars(other[name]), f"{name}: attributes {vars(p)}, expected {vars(other[name])}"
    mine, other = ours.state_dict(), theirs.state_dict()
    assert [*mine] == [*other], f"state {[*mine]}, expected {[*other]}"
    theirs.load_state_dict(mine)
    ours.load_state_dict(copy.copy(other))


def follows_the_switch(name: str, on: bool) -> None:
    """Switch sequence parallelism on or off on the linears of a built MLP, as inference does, and compare outputs."""
    config, switched = (config_of(Layer(sequence_parallel=value)) for value in (not on, on))
    theirs, ours = (build(cls, config) for cls in (MLP, class_of(name)))
    x, _ = draw_input(switched)
    for linear in (theirs.linear_fc1, theirs.linear_fc2, ours.linear_fc1, ours.linear_fc2):
        linear.sequence_parallel = on
    with torch.no_grad():
        y, expected = ours(x)[0], theirs(x)[0]
    assert y.shape == expected.shape, f"y {[*y.shape]}, expected {[*expected.shape]}"
    error = (y - expected).abs().max().item()
    assert error < 1e-5, f"y is off by {error:.1e} after the switch"
