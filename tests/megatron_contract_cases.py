"""How FusedMLP is built, called, frozen and put into specs, on a rank (megatron_ranks.py); raises AssertionError."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from gpt_from_megatron import NormOnSlices
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron_cases import LINEARS, build, config_of, draw_input, results, same_parameters
from megatron_ranks import BATCH, FFN, HIDDEN, SEQUENCE, Layer
from torch import nn

from tpffn_triton.megatron import FusedMLP, fused_mlp_spec, replace_mlp


@contextlib.contextmanager
def refused(kind: type[Exception], pattern: str) -> Iterator[None]:
    """As pytest.raises, whose own failure is no Exception and would end the rank."""
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__} about {pattern!r}"
    assert re.search(pattern, message), f"{pattern!r} is not in: {message}"


def imported() -> tuple[str, str]:
    """Return megatron-core's version and where it was imported from."""
    return megatron.core.__version__, megatron.core.__file__


def is_built_in_every_form() -> None:
    """In the forms of all versions, and over a group of its own."""
    config = config_of(Layer())
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair = pairs[dist.get_rank() // 2]
    world = parallel_state.get_tensor_model_parallel_world_size()
    no_group = SimpleNamespace(tp=None)
    forms: list[tuple[tuple, dict, int]] = [
        ((), {}, world),
        ((LINEARS, False, HIDDEN), {}, world),
        ((LINEARS,), {"is_expert": False, "input_size": None, "ffn_hidden_size": FFN}, world),
        ((LINEARS,), {"tp_group": pair}, 2),
        ((LINEARS,), {"name": "mlp", "pg_collection": SimpleNamespace(tp=pair), "is_mtp_layer": False}, 2),
        ((LINEARS,), {"pg_collection": no_group}, world),
        ((LINEARS, False, HIDDEN, FFN, pair), {"pg_collection": no_group}, 2),
    ]
    for args, kwargs, size in forms:
        mlp = FusedMLP(config, *args, **kwargs)
        assert mlp.linear_fc1.weight.shape == (FFN // size, HIDDEN), f"{args} {kwargs}"
        x, _ = draw_input(config)
        assert mlp(x)[0].shape == x.shape


def takes_the_models_group() -> None:
    """A model may have other groups than parallel_state; up to 0.17 its layers do not hand theirs on."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair = pairs[dist.get_rank() // 2]
    config = config_of(Layer(), tensor_model_parallel_size=2)
    with warned("parallel_state's tensor-parallel group, of 4 ranks, .*tensor_model_parallel_size=2"):
        assert FusedMLP(config).linear_fc1.weight.shape == (FFN // 4, HIDDEN)
    spec = replace_mlp(get_gpt_layer_local_spec(), tp_group=pair)
    mlp = build_module(spec.submodules.mlp, config=config)
    torch.manual_seed(dist.get_rank() // 2)  # each pair has an input of its own
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    theirs = MLP(config, LINEARS, ffn_hidden_size=FFN, tp_group=pair)
    theirs.load_state_dict(mlp.state_dict())
    torch.testing.assert_close(mlp(x)[0], theirs(x)[0])


def says_what_it_ignores() -> None:
    """Of keywords that no version of a layer passes: likely typos of our own."""
    with warned("ignores forward_chunk$"):
        FusedMLP(config_of(Layer()), forward_chunk=4)


@contextlib.contextmanager
def warned(pattern: str) -> Iterator[None]:
    """Require a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert any(re.search(pattern, str(w.message)) for w in caught), [str(w.message) for w in caught]


def begins_as_megatrons_on_a_gpu() -> None:
    """With weights drawn where they stay, as in training, rather than whole on the CPU."""
    for layer in (Layer(), Layer("silu", gated=True, sequence_parallel=True)):
        config = config_of(layer, use_cpu_initialization=False)
        same_parameters(build(FusedMLP, config), build(MLP, config))


def refuses() -> None:
    """What would change results or be lost is refused by name."""
    config = config_of(Layer())
    with refused(TypeError, "config must be a TransformerConfig, got dict"):
        FusedMLP(vars(config))
    with refused(ValueError, "is_expert=True"):
        FusedMLP(config, LINEARS, True)
    with refused(ValueError, f"input_size={HIDDEN}, as in its config; got 32"):
        FusedMLP(config, LINEARS, input_size=32)
    with refused(ValueError, f"ffn_hidden_size={FFN}, as in its config; got 96"):
        FusedMLP(config, LINEARS, ffn_hidden_size=96)
    for name, wrong in (("linear_fc1", RowParallelLinear), ("linear_fc2", nn.Linear)):
        linears = MLPSubmodules(**{"linear_fc1": ColumnParallelLinear, "linear_fc2": RowParallelLinear, name: wrong})
        for make in (lambda given: FusedMLP(config, given), fused_mlp_spec):
            with refused(ValueError, f"as {name}, not of {wrong.__name__}"):
                make(linears)
    changed = copy.copy(config)
    changed.cpu_offloading = True
    with refused(ValueError, "cpu_offloading=True"):
        FusedMLP(changed, LINEARS)
    changed = copy.copy(config)
    changed.activation_func = torch.tanh
    with refused(ValueError, "activation_func tanh is none of"):
        FusedMLP(changed, LINEARS)
    for options in ({"save": "all"}, {"forward_chunks": 0}, {"reduce_dtype": torch.float16}):
        with refused(ValueError, next(iter(options))):
            FusedMLP(config, LINEARS, **options)
    mlp = FusedMLP(config, LINEARS)
    x, _ = draw_input(config)
    with refused(ValueError, "per_token_scale"):
        mlp(x, per_token_scale=torch.ones(x.shape[:-1]))
    mlp.linear_fc2.sequence_parallel = True
    with refused(ValueError, "linear_fc1 False, linear_fc2 True"):
        mlp(x)


def ignores_what_is_for_experts() -> None:
    """padding_mask changes nothing; the members that a layer calls are there."""
    mlp = build(FusedMLP, config_of(Layer()))
    x, dy = draw_input(mlp.config)
    plain, masked = results(mlp, x, dy), results(mlp, x, dy, padding_mask=torch.zeros(x.shape[1::-1], dtype=torch.bool))
    for name, value in plain.items():
        assert torch.equal(value, masked[name]), name
    mlp.backward_dw()
    mlp.linear_fc1.backward_dw()
    mlp.linear_fc2.backward_dw()
    mlp.set_layer_number(3)
    assert mlp.layer_number == 3
    assert "activation='gelu', save='pre_act'" in repr(mlp)


def keeps_what_save_says() -> None:
    """save reaches ffn: without the pre-activations backward keeps so many elements less."""
    config = config_of(Layer())
    x, _ = draw_input(config)
    kept = []
    for save in ("pre_act", "nothing"):
        mlp, sizes = FusedMLP(config, LINEARS, save=save), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()), lambda _: None):
            mlp(x.requires_grad_())
        kept.append(sum(sizes))
    features, tokens = mlp.linear_fc1.weight.shape[0], x.numel() // HIDDEN
    # Without them b1 is kept.
    assert kept[0] - kept[1] == tokens * features - features, kept


def trains_what_is_not_frozen(frozen: tuple[str, ...], need_x: bool, layer: Layer) -> None:
    """Gradients of what is trained are Megatron's; what is frozen gets none."""
    config = config_of(layer)
    x, dy = draw_input(config)
    found = []
    for mlp in (build(FusedMLP, config), build(MLP, config)):
        for name, p in mlp.named_parameters():
            p.requires_grad_(name not in frozen)
        own = x.clone().requires_grad_(need_x)
        y, bias = mlp(own)
        (y + bias).backward(dy)
        found.append([own.grad, *(p.grad for p in mlp.parameters())])
    for name, ours, theirs in zip(["x", *dict(mlp.named_parameters())], *found, strict=True):
        assert (ours is None) == (theirs is None) == (name in frozen or (name == "x" and not need_x)), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def adds_to_main_grads(layer: Layer, main_dtype: str, frozen: tuple[str, ...] = ()) -> None:
    """With gradient_accumulation_fusion, without APEX: into fp32 main_grads, else a gradient as ever and a warning."""
    config = config_of(layer)
    fused = copy.copy(config)
    fused.gradient_accumulation_fusion = True
    plain, ours = build(FusedMLP, config), build(FusedMLP, fused)
    assert ours.linear_fc1.gradient_accumulation_fusion
    assert ours.linear_fc1.config is ours.config is fused
    weights = {name: p for name, p in ours.named_parameters() if name.endswith("weight")}
    for name, p in weights.items():
        p.grad_added_to_main_grad = False
        if name in frozen:
            p.requires_grad_(False)
        else:
            p.main_grad = torch.full_like(p, 3, dtype=getattr(torch, main_dtype))
    x, dy = draw_input(config)
    expected = results(plain, x, dy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results(ours, x, dy)
    adds = main_dtype == "float32"
    assert adds == (not any(main_dtype in str(w.message) and "torch.float32" in str(w.message) for w in caught))
    for name, p in weights.items():
        added = adds and name not in frozen
        assert p.grad_added_to_main_grad == added, name
        if added:
            tolerance = 1e-5 if layer.dtype == "float32" else 3e-2
            grad = p.main_grad - 3
            torch.testing.assert_close(grad, expected[name].float(), rtol=tolerance, atol=tolerance)
            assert not p.grad.any(), f"{name}: would be added twice"
        elif name in frozen:
            assert p.grad is None, name
        else:
            assert (p.main_grad == 3).all(), name
            assert torch.equal(p.grad, expected[name]), name
    for p in weights.values():
        vars(p).pop("main_grad", None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)  # where nothing is added, none is asked for


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
