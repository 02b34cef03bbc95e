"""megatron-core's distributed checkpoints: saved at one P, loaded at another, from and into Megatron's own MLP."""

import pytest
import torch
from megatron_ranks import Layer, Training

from tpffn_triton.sharding import unshard_ffn

pytestmark = pytest.mark.cpu_only
LAYERS = {"gelu": Layer(), "swiglu": Layer("silu", gated=True)}
NAMES = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
RESHARDINGS = [(1, 2), (2, 4), (4, 1)]
CLASSES = [("MLP", "FusedMLP"), ("FusedMLP", "MLP"), ("FusedMLP", "FusedMLP")]


def whole(per_rank, p, activation):
    """Return the full weights of the shards on the first p ranks, which are one tensor-parallel group."""
    shards = [tuple(shards[name] for name in NAMES) for shards, _ in per_rank[:p]]
    return unshard_ffn(shards, activation=activation)


def check(on_ranks, folder, activation, from_class, to_class, saved_at, loaded_at, separate=False):
    """Save and load; require the full weights bit for bit, and what they compute."""
    arguments = LAYERS[activation], separate, str(folder)
    before = on_ranks(saved_at, "megatron_checkpoint_cases.saved", from_class, *arguments)
    after = on_ranks(loaded_at, "megatron_checkpoint_cases.loaded", to_class, *arguments)
    pairs = zip(whole(before, saved_at, activation), whole(after, loaded_at, activation), strict=True)
    for name, (mine, theirs) in zip(NAMES, pairs, strict=True):
        assert torch.equal(mine, theirs), f"{name}: other values after loading"
    torch.testing.assert_close(after[0][1], before[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize(("from_class", "to_class"), CLASSES)
@pytest.mark.parametrize(("saved_at", "loaded_at"), RESHARDINGS)
def test_weights_survive(on_megatron_ranks, tmp_path, activation, from_class, to_class, saved_at, loaded_at):
    check(on_megatron_ranks, tmp_path, activation, from_class, to_class, saved_at, loaded_at)


@pytest.mark.parametrize(("from_class", "to_class"), CLASSES)
def test_gate_and_up_under_names_of_their_own(on_megatron_ranks, tmp_path, from_class, to_class):
    if not on_megatron_ranks(1, "megatron_checkpoint_cases.can_separate")[0]:
        pytest.skip("this version of megatron-core has no singleton_local_shards")
    check(on_megatron_ranks, tmp_path, "swiglu", from_class, to_class, 2, 4, separate=True)


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize(("from_class", "to_class"), CLASSES[:2])
def test_a_whole_model_survives(on_megatron_ranks, tmp_path, activation, from_class, to_class):
    case, folder = Training(LAYERS[activation]), str(tmp_path)
    expected = on_megatron_ranks(2, "megatron_checkpoint_cases.model_saved", from_class, case, folder)[0]
    for before, after in on_megatron_ranks(4, "megatron_checkpoint_cases.model_loaded", to_class, case, folder):
        assert abs(before - expected) > 1e-3
        assert abs(after - expected) < 1e-5


def test_gate_and_up_cut_as_one_are_noticed(on_megatron_ranks, tmp_path):
    broken = "GateAndUpTogether"
    with pytest.raises(AssertionError, match=r"linear_fc1.weight: other values"):
        check(on_megatron_ranks, tmp_path, "swiglu", broken, broken, 2, 4)
