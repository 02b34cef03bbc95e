"""The comparisons with megatron-core notice FusedMLPs with one mistake each (broken_megatron.py), and let FusedMLP pass."""

import pytest
from megatron_ranks import Layer, Training
from rank_pool import RankError

pytestmark = pytest.mark.cpu_only
EQUAL, TRAINS = "megatron_cases.equals_megatrons", "megatron_training_cases.trains_as_megatrons"
SWITCH = "megatron_cases.follows_the_switch"
SP = Layer(sequence_parallel=True)
# (broken class, comparison, its case, what is off). On 2 x 2 ranks, tensor-parallel by data-parallel.
MISTAKES = [
    ("DxNotReduced", EQUAL, Layer(), r"dx: Frobenius error"),
    ("ErfUnderFusion", EQUAL, Layer("gelu", fused=True), r"y: Frobenius error"),
    ("ErfUnderFusion", EQUAL, Layer("gelu", gated=True, fused=True), r"y: Frobenius error"),
    ("InterleavedRows", EQUAL, Layer("silu", gated=True), r"y: Frobenius error"),
    ("BiasTwice", EQUAL, Layer(), r"y: Frobenius error"),
    ("BiasUnmarked", EQUAL, Layer(), r"linear_fc2.bias: attributes"),
    ("BiasUnmarked", TRAINS, Training(SP), r"linear_fc2.bias: off by|loss"),
    ("WeightUnmarked", EQUAL, Layer(), r"linear_fc1.weight: attributes"),
    ("ReturnsTheParameter", TRAINS, Training(recompute="mlp"), r"no leaf after a forward: .*linear_fc2.bias"),
    # A bucket a parameter: no other module's hook gathers the MLP's.
    ("HooksBypassed", TRAINS, Training(bucket_size=1), r"loss|off by"),
    ("SequenceParallelFrozen", SWITCH, None, r"y \[\d+, 2, \d+\], expected"),
]


def run(on_ranks, name, comparison, case):
    return on_ranks((2, 2), comparison, name, *(() if case is None else (case,)))


@pytest.mark.parametrize(("name", "comparison", "case", "message"), MISTAKES)
def test_a_mistake_is_noticed(on_megatron_ranks, name, comparison, case, message):
    with pytest.raises(RankError, match=rf"AssertionError: ({message})"):
        run(on_megatron_ranks, name, comparison, case)


@pytest.mark.parametrize(
    ("comparison", "case"), dict.fromkeys((comparison, case) for _, comparison, case, _ in MISTAKES)
)
def test_without_a_mistake_they_pass(on_megatron_ranks, comparison, case):
    run(on_megatron_ranks, "FusedMLP", comparison, case)
