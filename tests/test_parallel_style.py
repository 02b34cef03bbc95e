"""FusedFFNParallel in torch's parallelize_module: an MLP of two or three linears as ours, over 1, 2 and 4 ranks."""

import re

import pytest
import style_cases
import torch
import torch.distributed as dist
from mlp_modules import Conv1D, PlainMLP, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.parallel_style import FusedFFNParallel

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def ranks(ranks_of):
    return ranks_of(4).run


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_the_reference(activation, dtype, tp, ranks):
    ranks(style_cases.equals_reference, "native", tp, activation, dtype, "replicate")


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_it_equals_the_reference_on_slices_of_either_dim(activation, layout, ranks):
    """Sequence parallelism; the whole gradient of fc2's bias is on every rank."""
    ranks(style_cases.equals_reference, "native", 2, activation, torch.float32, layout)


@pytest.mark.parametrize(("tp", "activation", "conv1d"), [(1, "geglu", False), (2, "swiglu", False), (4, "gelu", True)])
def test_it_equals_the_reference_by_the_kernels(tp, activation, conv1d, ranks):
    ranks(style_cases.equals_reference, "triton", tp, activation, torch.bfloat16, "replicate", conv1d)


def test_conv1d_equals_the_reference(ranks):
    ranks(style_cases.equals_reference, "native", 2, "gelu_tanh", torch.float32, "replicate", True)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parameters_are_placed_as_by_torchs_own_styles(tp, activation, ranks):
    ranks(style_cases.placements_are_stock, tp, activation)


@pytest.mark.parametrize("tp", [1, 2])
def test_gate_and_up_stay_side_by_side(tp, ranks):
    ranks(style_cases.hands_over_what_it_holds, tp)


def test_gradients_move_along(ranks):
    ranks(style_cases.gradients_move_along, 2)


def test_dtensors_in_and_out(ranks):
    ranks(style_cases.takes_dtensors, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "layout"), [("gelu", "replicate"), ("swiglu", "replicate"), ("swiglu", 1)])
def test_a_block_compiles_into_one_graph(activation, layout, ranks):
    ranks(style_cases.compiles_whole, 2, activation, layout)


@pytest.mark.parametrize(("activation", "layout"), [("gelu", "replicate"), ("swiglu", "replicate"), ("gelu", 1)])
def test_fsdp2_around_it_trains_as_one_process_does(activation, layout, ranks):
    for sharded, dense in ranks(style_cases.trains_as_dense, activation, layout):
        assert sharded == pytest.approx(dense, rel=1e-5)
        assert dense[-1] != pytest.approx(dense[0], rel=1e-2), "nothing was learned"


@pytest.fixture
def mesh():
    """One rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "selu"}, "activation 'selu' is not one of gelu"),
        ({"save": "all"}, "save 'all' is not one of"),
        ({"input_layouts": Partial()}, "must be the same, Replicate.* or Shard"),
        ({"input_layouts": Shard(1), "output_layouts": Replicate()}, "must be the same"),
        ({"input_layouts": Shard(0), "forward_chunks": 2}, "forward_chunks=2 cuts an all-reduce"),
        ({"forward_chunks": 0}, "forward_chunks must be at least 1"),
    ],
)
def test_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        FusedFFNParallel(**options)


def test_a_module_that_does_something_else_is_refused_and_unchanged(mesh):
    class Doubled(PlainMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = Doubled(8, 16, "gelu")
    before = dict(mlp.named_parameters())
    for style, message in (
        (FusedFFNParallel(), "does not compute fc2.act.fc1.x"),
        (FusedFFNParallel(activation="relu"), "does not compute"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize_module(mlp, mesh, style)
    with pytest.raises(ValueError, match="computes gelu, not gelu_tanh"):
        parallelize_module(PlainMLP(8, 16, "gelu"), mesh, FusedFFNParallel(activation="gelu_tanh"))
    assert type(mlp) is Doubled
    assert all(parameter is before[name] for name, parameter in mlp.named_parameters())
    with pytest.raises(ValueError, match="1-D DeviceMesh"):
        FusedFFNParallel()._apply(PlainMLP(8, 16, "gelu"), init_device_mesh("cpu", (1, 1)))


def test_a_rank_with_another_mlp_is_an_error_on_every_rank(ranks_of):
    """Not a wait in the scatter of the weights, corrupted ones, nor two activations."""
    for change, message in (
        ("selu", r"does not compute fc2\(act\(fc1\(x\)\)\)"),
        ("relu", r"disagree:\n  rank 0: .*'gelu'.*\n  rank 1: .*'relu'"),
        ("bias", r"disagree:\n  rank 0: .*fc2.bias.*\n  rank 1: "),
        ("bf16", r"disagree:\n  rank 0: .*torch.float32.*\n  rank 1: .*torch.bfloat16"),
    ):
        for ok, (kind, text, _) in ranks_of(4).outcomes(style_cases.one_rank_differs, change):
            assert not ok
            assert kind == "ValueError"
            assert re.search(message, text), text


def test_reset_parameters_draws_full_weights(ranks):
    ranks(style_cases.draws_anew, 2)


def test_copies_with_gradients_and_calls_by_name(ranks):
    ranks(style_cases.goes_on_after_a_copy, 2)


def test_it_is_not_applied_twice(mesh):
    mlp = parallelize_module(build(8, 16, "swiglu"), mesh, FusedFFNParallel())
    with pytest.raises(ValueError, match="applied to this module before"):
        parallelize_module(mlp, mesh, FusedFFNParallel())


def test_cutting_the_features_is_refused(mesh):
    mlp = parallelize_module(PlainMLP(8, 16, "gelu"), mesh, FusedFFNParallel(input_layouts=Shard(1)))
    with pytest.raises(ValueError, match="would cut the features of x"):
        mlp(torch.randn(4, 8))


def test_frozen_parameters_stay_frozen_and_dropout_behind_acts(mesh):
    mlp = PlainMLP(8, 16, "gelu", dropout=0.5)
    mlp.fc1.requires_grad_(False)
    parallelize_module(mlp, mesh, FusedFFNParallel())
    x = torch.randn(64, 8)
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is None
    assert mlp.fc2.weight.grad is not None
    assert 0.3 < (mlp(x) == 0).float().mean() < 0.7
    assert not (mlp.eval()(x) == 0).any()


def test_linears_say_their_shards_sizes(mesh, ranks):
    assert ranks(style_cases.sizes_of_linears, 2) == [[(8, 12), (8, 12), (12, 8)]] * 4
    mlp = parallelize_module(build(8, 16, "swiglu"), mesh, FusedFFNParallel())
    assert (mlp.gate_proj.in_features, mlp.gate_proj.out_features) == (8, 16)
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (16, 8)
    assert "activation='swiglu'" in repr(mlp)
    assert "gate_proj and up_proj, down_proj" in repr(mlp)
    assert "FusedFFNParallel(activation='gelu'" in repr(FusedFFNParallel(activation="gelu"))
    conv = parallelize_module(build(8, 16, "gelu", conv1d=True), mesh, FusedFFNParallel())
    assert (conv.fc1.in_features, conv.fc1.out_features) == (8, 16)
    assert conv.fc1.weight.shape == (8, 16)
    assert not isinstance(conv.fc1, nn.Linear | Conv1D)
