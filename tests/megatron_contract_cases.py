"""How FusedMLP is built, called and frozen, on a rank (megatron_ranks.py); raises AssertionError."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import build_module
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
