"""Megatron-Core's MLP replaced by FusedMLP, in one line of the layer spec.

    spec = replace_mlp(get_gpt_layer_local_spec())        # or of Transformer Engine, or of a block of layers
    spec.submodules.mlp = fused_mlp_spec()                # the same by hand, up to megatron-core 0.17

Importing this module imports megatron-core; importing tpffn_triton does not.
"""

from dataclasses import replace
from typing import Any

import torch

from tpffn_triton.machines import Machine

# First: where megatron-core is missing, its error says what to install.
from tpffn_triton.megatron_mlp import FusedMLP, check_linears

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

try:
    from megatron.core.extensions import transformer_engine
except ImportError:  # some versions, where Transformer Engine is missing
    transformer_engine = None

__all__ = ["FusedMLP", "fused_mlp_spec", "replace_mlp"]
# Transformer Engine's; the first begins with the layer's norm.
NORM_AND_LINEAR, *LINEARS = (
    getattr(transformer_engine, name, None)
    for name in ("TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear")
)


def fused_mlp_spec(
    submodules: MLPSubmodules | None = None,
    *,
    tp_group: "torch.distributed.ProcessGroup | None" = None,
    save: str = "pre_act",
    reduce_dtype: torch.dtype | None = None,
    forward_chunks: int | Machine = 1,
) -> ModuleSpec:
    """Return the spec of a FusedMLP, for `mlp` of a layer's submodules.

    submodules    of the MLP that it takes the place of; only checked
    tp_group      of a model whose tensor-parallel group is not parallel_state's
    save, reduce_dtype, forward_chunks
                  as in `tpffn_triton.ffn`

    Raises: ValueError: submodules whose work would be lost.
    """
    check_linears(submodules)
    params: dict[str, Any] = {"save": save, "reduce_dtype": reduce_dtype, "forward_chunks": forward_chunks}
    if tp_group is not None:
        params["tp_group"] = tp_group
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=FusedMLP, params=params, submodules=linears)


def replace_mlp(spec: Any, **options: Any) -> Any:
    """Return a copy of a spec in which a FusedMLP is in the place of each of Megatron's MLPs.

    spec       a layer's ModuleSpec, or a block's TransformerBlockSubmodules, whose layers without an MLP of this kind
               (mixtures of experts) stay as they are
    options    of `fused_mlp_spec`

    Transformer Engine's linear_fc1 begins with the layer's norm. It comes back as a module of its own,
    `pre_mlp_layernorm`, which distributed checkpoints know by its old name, `mlp.linear_fc1.layer_norm_weight`.

    Raises: TypeError: not such a spec. ValueError: nothing to replace, or linears whose work would be lost; says what
    is there.
    """
    if hasattr(spec, "layer_specs"):
        layers = spec.layer_specs
        if not any(map(_has_mlp, layers)):
            raise ValueError(f"no layer of this block has an MLP to replace: {[_name(_mlp_of(s)[0]) for s in layers]}")
        return replace(spec, layer_specs=[replace_mlp(s, **options) if _has_mlp(s) else s for s in layers])
    if not hasattr(getattr(spec, "submodules", None), "mlp"):
        raise TypeError(f"replace_mlp takes a layer's ModuleSpec or TransformerBlockSubmodules, got {_name(spec)}")
    if not _has_mlp(spec):
        raise ValueError(f"there is no MLP to replace: mlp is {_name(_mlp_of(spec)[0])}")
    before, (_, linears) = spec.submodules, _mlp_of(spec)
    changes: dict[str, Any] = {"mlp": fused_mlp_spec(**options)}
    check_linears(linears, (NORM_AND_LINEAR, *LINEARS))
    if NORM_AND_LINEAR is not None and getattr(linears, "linear_fc1", None) is NORM_AND_LINEAR:
        names = {**before.sharded_state_dict_keys_map, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        changes |= {"pre_mlp_layernorm": transformer_engine.TENorm, "sharded_state_dict_keys_map": names}
    return replace(spec, submodules=replace(before, **changes))


def _mlp_of(spec: Any) -> tuple[Any, Any]:
    """Return the class at `mlp` of a layer's spec, and its linears."""
    mlp: Any = getattr(getattr(spec, "submodules", None), "mlp", None)
    if hasattr(mlp, "func"):  # from 0.18 on, partial(MLP.as_mlp_submodule, submodules=...)
        return getattr(mlp.func, "__self__", mlp.func), mlp.keywords.get("submodules")
    return getattr(mlp, "module", mlp), getattr(mlp, "submodules", None)


def _has_mlp(spec: Any) -> bool:
    mlp, _ = _mlp_of(spec)
    # Not other subclasses: what they add would be lost.
    return mlp is not None and mlp in (MLP, FusedMLP, getattr(transformer_engine, "TEFusedMLP", None))


def _name(what: Any) -> str:
    what = getattr(what, "module", what)
    return getattr(what, "__name__", None) or repr(what)
