"""FusedMLP against megatron-core's own MLP on CPU ranks over gloo: values, gradients, parameters, state."""

import pytest
from megatron_ranks import GATED, PLAIN

pytestmark = pytest.mark.cpu_only
# P of the four ranks, which are 4/P replicas, and sequence parallelism.
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
LAYOUT_IDS = ["P=1", "P=2", "P=2 SP", "P=4", "P=4 SP"]
# Megatron fuses gelu with a bias only.
WITHOUT_BIAS = [layer._replace(bias=False) for layer in [*PLAIN[:4], *GATED]]
EQUAL = "megatron_cases.equals_megatrons"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", [*PLAIN, *GATED], ids=str)
@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS, ids=LAYOUT_IDS)
def test_it_equals_megatrons_mlp(on_megatron_ranks, tp, sequence_parallel, layer, dtype):
    layer = layer._replace(sequence_parallel=sequence_parallel, dtype=dtype)
    on_megatron_ranks(tp, EQUAL, "FusedMLP", layer)


@pytest.mark.parametrize("layer", WITHOUT_BIAS, ids=str)
@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS[2:4], ids=LAYOUT_IDS[2:4])
def test_without_biases(on_megatron_ranks, tp, sequence_parallel, layer):
    on_megatron_ranks(tp, EQUAL, "FusedMLP", layer._replace(sequence_parallel=sequence_parallel))


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS[1:3], ids=LAYOUT_IDS[1:3])
@pytest.mark.parametrize("layer", [PLAIN[-1], GATED[2]], ids=str)
def test_with_the_triton_kernels(on_megatron_ranks, tp, sequence_parallel, layer):
    layer = layer._replace(sequence_parallel=sequence_parallel)
    on_megatron_ranks(tp, EQUAL, "FusedMLP", layer, "triton")


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_may_be_switched_after_construction(on_megatron_ranks, tp, on):
    on_megatron_ranks(tp, "megatron_cases.follows_the_switch", "FusedMLP", on)
