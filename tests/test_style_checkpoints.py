"""Distributed checkpoints of FusedFFNParallel: saved at one P, loaded at another, by torch's styles or without any."""

import pytest
import torch
from mlp_modules import as_module
from style_cases import FFN, LEAD, H, draw, mesh_of, stock
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor.parallel import parallelize_module

from tpffn_triton.parallel_style import FusedFFNParallel

pytestmark = pytest.mark.cpu_only
ACTIVATIONS = ["gelu", "swiglu"]


def build(activation, tp, plan, seed, conv1d=False):
    """Return an MLP with random weights and its optimizer, over tp ranks by "ours", "stock" or no plan."""
    mlp = as_module(draw(LEAD, H, FFN, activation=activation, seed=seed), conv1d)
    if plan is not None:
        parallelize_module(mlp, mesh_of(tp)["tp"], FusedFFNParallel() if plan == "ours" else stock(mlp))
    return mlp, torch.optim.AdamW(mlp.parameters(), lr=1e-2)


def step(mlp, optimizer):
    torch.manual_seed(3)
    mlp(torch.randn(*LEAD, H)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def full(mlp, optimizer):
    """Return every tensor of the model and of its optimizer, whole."""
    options = StateDictOptions(full_state_dict=True)
    model, state = get_state_dict(mlp, optimizer, options=options)
    found = dict(model)
    for name, values in state["state"].items():
        found |= {f"{name} {key}": t for key, t in values.items()}
    return found


def reshards(rank, world_size, folder, activation, save, load, conv1d=False):
    """Save after a step, load into another model, and compare every tensor, bit for bit; both then step alike."""
    (saved_plan, saved_tp), (loaded_plan, loaded_tp) = save, load
    mlp, optimizer = build(activation, saved_tp, saved_plan, 0, conv1d)
    step(mlp, optimizer)
    model, state = get_state_dict(mlp, optimizer)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    other, other_optimizer = build(activation, loaded_tp, loaded_plan, 1, conv1d)
    model, state = get_state_dict(other, other_optimizer)
    into = {"model": model, "optimizer": state}
    checkpoint.load(into, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
    right, found = full(mlp, optimizer), full(other, other_optimizer)
    assert list(right) == list(found)
    assert sum("exp_avg_sq" in name for name in right) == len(list(mlp.parameters()))
    for name, t in right.items():
        assert torch.equal(t, found[name]), name
    step(mlp, optimizer)
    step(other, other_optimizer)
    for name, t in full(mlp, optimizer).items():
        torch.testing.assert_close(full(other, other_optimizer)[name], t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("save", "load"),
    [
        (("ours", 2), ("ours", 4)),
        (("ours", 2), ("ours", 1)),
        (("ours", 4), ("stock", 2)),
        (("stock", 4), ("ours", 4)),
        (("ours", 2), (None, 1)),
        ((None, 1), ("ours", 2)),
    ],
    ids=str,
)
def test_model_and_optimizer_reshard_bit_for_bit(save, load, activation, ranks_of, tmp_path):
    ranks_of(4).run(reshards, str(tmp_path), activation, save, load)


def test_conv1d_reshards_bit_for_bit(ranks_of, tmp_path):
    """Whose shards lie transposed in memory."""
    ranks_of(4).run(reshards, str(tmp_path), "gelu", ("ours", 2), ("ours", 4), True)


def comes_back(rank, world_size, activation, conv1d):
    """The full state dict is the original module's, and can be given to all ranks from one."""
    mlp = as_module(draw(LEAD, H, FFN, activation=activation), conv1d)
    original = {name: t.clone() for name, t in mlp.state_dict().items()}
    parallelize_module(mlp, mesh_of(4)["tp"], FusedFFNParallel())
    found = get_model_state_dict(mlp, options=StateDictOptions(full_state_dict=True))
    assert list(found) == list(original)
    assert all(torch.equal(found[name], t) for name, t in original.items())
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(mlp, dict(original) if rank == 0 else {}, options=options)
    again = get_model_state_dict(mlp, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(again[name], t) for name, t in original.items())


@pytest.mark.parametrize(("activation", "conv1d"), [("gelu", False), ("gelu", True), ("swiglu", False)])
def test_the_full_state_dict_is_the_original_one(activation, conv1d, ranks_of):
    ranks_of(4).run(comes_back, activation, conv1d)
