"""The comparisons with megatron-core notice each mistake of broken_megatron.py, and let FusedMLP pass."""

import pytest
from megatron_ranks import Layer, Training
from rank_pool import RankError

pytestmark = pytest.mark.cpu_only
EQUAL, TRAINS = "megatron_cases.equals_megatrons", "megatron_training_cases.trains_as_megatrons"
SWITCH = "megatron_cases.follows_the_switch"
SP = Layer(sequence_parallel=True)
# (broken class, comparison, its case, what is off). On two pairs of tensor-parallel ranks.
MISTAKES = [
    ("DxNotReduced", EQUAL, Layer(), r"Error: dx: Frobenius error"),
    ("ErfUnderFusion", EQUAL, Layer("gelu", fused=True), r"Error: y: Frobenius error"),
    ("ErfUnderFusion", EQUAL, Layer("gelu", gated=True, fused=True), r"Error: y: Frobenius error"),
    ("InterleavedRows", EQUAL, Layer("silu", gated=True), r"Error: y: Frobenius error"),
    ("BiasTwice", EQUAL, Layer(), r"Error: y: Frobenius error"),
    ("BiasUnmarked", EQUAL, Layer(), r"Error: linear_fc2.bias: attributes"),
    ("BiasUnmarked", TRAINS, Training(SP), r"Error: (linear_fc2.bias: off by|loss)"),
    ("WeightUnmarked", EQUAL, Layer(), r"Error: linear_fc1.weight: attributes"),
    ("ReturnsTheParameter", TRAINS, Training(recompute="mlp"), r"Error: no leaf after a forward: .*linear_fc2.bias"),
    # A bucket a parameter: no other module's hook gathers the MLP's. Megatron may notice by itself.
    (
        "HooksBypassed",
        TRAINS,
        Training(bucket_size=1),
        r"assert self.param_gather_handle is None|Error: (loss|.*off by)",
    ),
    ("SequenceParallelFrozen", SWITCH, True, r"Error: y is off by"),
]


@pytest.mark.parametrize(("name", "comparison", "case", "message"), MISTAKES)
def test_a_mistake_is_noticed(on_megatron_ranks, name, comparison, case, message):
    with pytest.raises(RankError, match=message):
        on_megatron_ranks(2, comparison, name, case)


@pytest.mark.parametrize(
    ("comparison", "case"), dict.fromkeys((comparison, case) for _, comparison, case, _ in MISTAKES)
)
def test_without_a_mistake_they_pass(on_megatron_ranks, comparison, case):
    on_megatron_ranks(2, comparison, "FusedMLP", case)
