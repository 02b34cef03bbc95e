"""TensorParallelFFN and sharding on one rank: parameters, initialisation, conversion from dense layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpffn_triton as tp
from tpffn_triton.sharding import shard_ffn, unshard_ffn


def dense(H, F, bias=True, seed=0, **kwargs):
    """Return the two linears that a dense FFN has."""
    torch.manual_seed(seed)
    return nn.Linear(H, F, bias=bias, **kwargs), nn.Linear(F, H, bias=bias, **kwargs)


def test_parameters_have_megatron_names_and_shard_shapes():
    layer = tp.TensorParallelFFN(32, 48)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "linear_fc1.weight": (48, 32),
        "linear_fc1.bias": (48,),
        "linear_fc2.weight": (32, 48),
        "linear_fc2.bias": (32,),
    }
    assert list(tp.TensorParallelFFN(32, 48, bias=False).state_dict()) == ["linear_fc1.weight", "linear_fc2.weight"]
    assert (layer.linear_fc1.in_features, layer.linear_fc1.out_features) == (32, 48)
    assert (layer.linear_fc2.in_features, layer.linear_fc2.out_features) == (48, 32)


def test_same_seed_as_dense_gives_the_same_weights():
    fc1, fc2 = dense(32, 48, seed=7)
    torch.manual_seed(7)
    layer = tp.TensorParallelFFN(32, 48)
    for own, linear in ((layer.linear_fc1, fc1), (layer.linear_fc2, fc2)):
        assert torch.equal(own.weight, linear.weight)
        assert torch.equal(own.bias, linear.bias)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_computes_what_dense_computes(bias, device):
    fc1, fc2 = dense(32, 48, bias, device=device)
    fc1.weight.requires_grad_(False)
    layer = tp.TensorParallelFFN.from_dense(fc1, fc2, activation="silu")
    x = torch.randn(2, 5, 32, device=device)
    torch.testing.assert_close(layer(x), fc2(F.silu(fc1(x))))
    assert not layer.linear_fc1.weight.requires_grad
    assert layer.linear_fc2.weight.requires_grad
    assert layer.linear_fc1.weight.data_ptr() != fc1.weight.data_ptr()
    fc1, fc2 = dense(32, 48, dtype=torch.bfloat16)
    assert tp.TensorParallelFFN.from_dense(fc1.eval(), fc2).linear_fc1.weight.dtype == torch.bfloat16
    assert not tp.TensorParallelFFN.from_dense(fc1.eval(), fc2).training


def test_meta_device_and_late_initialisation():
    layer = tp.TensorParallelFFN(32, 48, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    expected = tp.TensorParallelFFN(32, 48, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected.parameters(), strict=True))


def test_copies_and_prints():
    layer = tp.TensorParallelFFN(32, 48, activation="relu2", save="nothing")
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 32)
    assert torch.equal(twin(x), layer(x))
    assert "hidden_size=32, ffn_hidden_size=48, activation='relu2'" in repr(layer)
    assert "in_features=48, out_features=32" in repr(layer)


def test_trains():
    """A few steps of SGD lower the loss, and by as much as dense does."""
    fc1, fc2 = dense(16, 32)
    layer = tp.TensorParallelFFN.from_dense(fc1, fc2)
    x, target = torch.randn(20, 16), torch.randn(20, 16)
    losses = []
    for model in (layer, nn.Sequential(fc1, nn.GELU(), fc2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses.append([])
        for _ in range(5):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_partial_results_of_shards_add_up():
    """Each shard's Linear1 gives its part of the hidden, and the partial products sum to the dense output."""
    fc1, fc2 = dense(16, 24)
    x = torch.randn(5, 16)
    hidden, total = [], torch.zeros(5, 16)
    for rank in range(3):
        w1, b1, w2, _ = shard_ffn(fc1.weight, fc1.bias, fc2.weight, fc2.bias, rank, 3, activation="gelu")
        hidden.append(F.gelu(F.linear(x, w1, b1)))
        total += F.linear(hidden[-1], w2)
    torch.testing.assert_close(torch.cat(hidden, dim=1), F.gelu(fc1(x)))
    torch.testing.assert_close(total + fc2.bias, fc2(F.gelu(fc1(x))))


def test_gated_shards_hold_matching_gate_and_up_rows():
    """Rank r holds rows r·F/P ... of the gate above the same rows of up, b1 likewise; joined, they stand as before."""
    F, H, P = 6, 2, 3
    w1, b1 = torch.arange(2 * F * H).view(2 * F, H), torch.arange(2 * F)
    w2, b2 = torch.arange(H * F).view(H, F), torch.zeros(H)
    shards = [shard_ffn(w1, b1, w2, b2, rank, P, activation="swiglu") for rank in range(P)]
    assert [b.tolist() for _, b, _, _ in shards] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert all(torch.equal(w, w1[b]) for w, b, _, _ in shards)
    assert all(torch.equal(w, w2[:, b[:2]]) for _, b, w, _ in shards)
    assert unshard_ffn(shards, activation="swiglu")[1].tolist() == b1.tolist()


@pytest.mark.usefixtures("implementation")
def test_gated_module_from_dense(device):
    """fc1 with 2F outputs, gate before up; the same seed draws what nn.Linear(H, 2F) and nn.Linear(F, H) would."""
    torch.manual_seed(7)
    fc1, fc2 = nn.Linear(32, 96, device=device), nn.Linear(48, 32, device=device)
    layer = tp.TensorParallelFFN.from_dense(fc1, fc2, activation="swiglu")
    assert layer.linear_fc1.weight.shape == (96, 32)
    assert layer.linear_fc1.out_features == 96
    x = torch.randn(2, 5, 32, device=device)
    gate, up = fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), fc2(F.silu(gate) * up))
    torch.manual_seed(7)
    drawn = tp.TensorParallelFFN(32, 48, activation="swiglu", device=device)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), layer.parameters(), strict=True))
