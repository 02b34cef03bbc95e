"""FusedMLP in megatron-core's layer and block specs, on a rank (megatron_ranks.py); raises AssertionError."""

from typing import Any

import torch
from gpt_from_megatron import NormOnSlices
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron_cases import config_of
from megatron_contract_cases import refused
from megatron_ranks import Layer

from tpffn_triton.megatron import FusedMLP, fused_mlp_spec, replace_mlp


def replaces_the_mlp_of_a_layer() -> None:
    """In the local spec, by replace_mlp and by one line; the spec given stays as it was."""
    given = get_gpt_layer_local_spec()
    before = repr(given)
    spec = replace_mlp(given, save="nothing")
    assert repr(given) == before, "the spec given has changed"
    assert spec.submodules.mlp.module is FusedMLP
    assert spec.submodules.self_attention == given.submodules.self_attention
    assert spec.submodules.pre_mlp_layernorm is given.submodules.pre_mlp_layernorm
    config = config_of(Layer())
    layer = TransformerLayer(config, spec.submodules)
    assert type(layer.mlp) is FusedMLP
    assert layer.mlp.save == "nothing"
    again = replace_mlp(spec, save="pre_act")
    assert TransformerLayer(config, again.submodules).mlp.save == "pre_act"
    with refused(TypeError, "'sav'"):
        replace_mlp(given, sav="nothing")
    given.submodules.mlp = fused_mlp_spec(reduce_dtype=torch.float32)
    assert TransformerLayer(config, given.submodules).mlp.reduce_dtype == torch.float32


def replaces_the_mlps_of_a_block() -> None:
    """All dense layers; mixtures of experts stay, and alone are refused."""
    dense, mixture = get_gpt_layer_local_spec(), get_gpt_layer_local_spec(num_experts=2)
    block = TransformerBlockSubmodules(layer_specs=[dense, mixture, dense], layer_norm=NormOnSlices)
    replaced = replace_mlp(block)
    mlps = [getattr(spec.submodules.mlp, "module", None) for spec in replaced.layer_specs]
    assert [mlp is FusedMLP for mlp in mlps] == [True, False, True]
    assert replaced.layer_specs[1] is mixture
    assert replaced.layer_norm is NormOnSlices
    assert block.layer_specs[0].submodules.mlp is dense.submodules.mlp
    with refused(ValueError, "MoELayer"):
        replace_mlp(mixture)
    with refused(ValueError, "no layer of this block has an MLP to replace: .*MoELayer"):
        replace_mlp(TransformerBlockSubmodules(layer_specs=[mixture], layer_norm=NormOnSlices))
    for nothing in (ModuleSpec(module=TransformerLayer), dense.submodules, None):
        with refused(TypeError, "replace_mlp takes a layer's ModuleSpec or TransformerBlockSubmodules, got"):
            replace_mlp(nothing)


def brings_the_norm_back() -> None:
    """From Transformer Engine's spec, whose linear_fc1 begins with it; under the same name in checkpoints."""
    from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider

    # The spec alone needs no Transformer Engine.
    transformer_engine_spec_provider.is_te_min_version = lambda *_, **__: True
    gpt_layer_specs.TESpecProvider = transformer_engine_spec_provider.TESpecProvider
    given = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    assert given.submodules.pre_mlp_layernorm is IdentityOp
    before = dict(given.submodules.sharded_state_dict_keys_map)
    spec = replace_mlp(given)
    assert given.submodules.pre_mlp_layernorm is IdentityOp
    assert given.submodules.sharded_state_dict_keys_map == before
    assert given.submodules.mlp.module is MLP
    submodules = spec.submodules
    assert submodules.mlp.module is FusedMLP
    assert submodules.pre_mlp_layernorm is transformer_engine.TENorm
    for name, value in before.items():
        assert submodules.sharded_state_dict_keys_map[name] == value
    # Linears without a norm, or from both: nothing is lost.
    for linears in (
        MLPSubmodules(transformer_engine.TEColumnParallelLinear, linear_fc2=transformer_engine.TERowParallelLinear),
        MLPSubmodules(transformer_engine.TEColumnParallelLinear, linear_fc2=RowParallelLinear),
    ):
        local = get_gpt_layer_local_spec()
        local.submodules.mlp.submodules = linears
        assert replace_mlp(local).submodules.pre_mlp_layernorm is local.submodules.pre_mlp_layernorm
    # What can be built without it: another norm, and attention of the local spec.
    local = get_gpt_layer_local_spec().submodules
    submodules.pre_mlp_layernorm = submodules.input_layernorm = NormOnSlices
    submodules.self_attention = local.self_attention
    config = config_of(Layer())
    layer = TransformerLayer(config, submodules)
    keys = {value.key for value in state_of(layer, config).values() if hasattr(value, "key")}
    assert {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias", "mlp.linear_fc2.weight"} <= keys
    assert not [key for key in keys if key.startswith("pre_mlp_layernorm")]


def state_of(layer: Any, config: Any) -> dict:
    """Return a layer's sharded state."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return layer.sharded_state_dict(metadata={"dp_cp_group": group})
