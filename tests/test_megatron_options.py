"""Which activation a Megatron config asks for, and which of its options are refused; without megatron-core."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpffn_triton.megatron_options import activation_of, check_options


def config(function=F.gelu, gated=False, fused=False, **options):
    return SimpleNamespace(activation_func=function, gated_linear_unit=gated, bias_activation_fusion=fused, **options)


def squared_relu(x):
    return torch.pow(F.relu(x), 2)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def tanh_by_hand(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (tanh_by_hand, "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (squared_relu, "relu2"),
        (torch.compile(squared_relu, backend="eager"), "relu2"),
    ],
)
def test_a_function_is_named_by_its_values(function, name):
    assert activation_of(config(function)) == name


@pytest.mark.parametrize(("function", "name"), [(F.gelu, "geglu"), (nn.GELU("tanh"), "geglu_tanh"), (F.silu, "swiglu")])
def test_gated(function, name):
    assert activation_of(config(function, gated=True)) == name


def test_fused_gelu_is_tanh():
    assert activation_of(config(F.gelu, fused=True)) == "gelu_tanh"
    assert activation_of(config(F.gelu, gated=True, fused=True)) == "geglu_tanh"
    assert activation_of(config(F.silu, gated=True, fused=True)) == "swiglu"


@pytest.mark.parametrize("function", [quick_gelu, torch.tanh, F.leaky_relu, lambda x: F.gelu(x) * 1.001, nn.Identity()])
def test_another_function_is_refused(function):
    with pytest.raises(ValueError, match="is none of gelu, gelu_tanh, silu, relu, relu2"):
        activation_of(config(function))


@pytest.mark.parametrize("function", [F.relu, squared_relu])
def test_another_function_is_refused_as_a_gate(function):
    with pytest.raises(ValueError, match=rf"goes with gelu, gelu_tanh, silu; got {function.__name__}"):
        activation_of(config(function, gated=True))


@pytest.mark.parametrize(
    ("function", "gated"), [(F.silu, False), (F.relu, False), (quick_gelu, True), (nn.GELU("tanh"), False)]
)
def test_what_megatron_cannot_fuse_is_refused(function, gated):
    with pytest.raises(ValueError, match=rf"bias_activation_fusion is for F.gelu.*gated_linear_unit={gated}"):
        activation_of(config(function, gated=gated, fused=True))


def test_naming_draws_no_random_numbers_and_builds_no_graph():
    state = torch.get_rng_state()
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    assert activation_of(config(lambda x: F.relu(x) * weight)) == "relu"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8", "hybrid"),
        ("fp4", "nvfp4"),
        ("cpu_offloading", True),
        ("use_te_activation_func", True),
        ("activation_func_fp8_input_store", True),
        ("use_kitchen", True),
        ("batch_invariant_mode", True),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_an_option_that_is_not_honoured_is_refused_by_name(name, value, gated):
    with pytest.raises(ValueError, match=rf"does not support {name}={value!r}"):
        check_options(config(gated=gated, **{name: value}))
    for unset in (None, False):
        check_options(config(gated=gated, **{name: unset}))


@pytest.mark.parametrize(("name", "value"), [("glu_linear_offset", 1.0), ("activation_func_clamp_value", 7.0)])
def test_options_of_gated_mlps(name, value):
    with pytest.raises(ValueError, match=rf"does not support {name}={value}"):
        check_options(config(gated=True, **{name: value}))
    check_options(config(gated=False, **{name: value}))  # of no effect in Megatron either
    check_options(config(gated=True, glu_linear_offset=0.0, activation_func_clamp_value=None))


def test_a_config_of_an_older_version_lacks_options():
    check_options(SimpleNamespace(gated_linear_unit=True))
