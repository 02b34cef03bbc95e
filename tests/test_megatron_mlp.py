"""FusedMLP against megatron-core's own MLP on CPU ranks over gloo: values, gradients, parameters, state."""

import pytest
from megatron_ranks import GATED, PLAIN

pytestmark = pytest.mark.cpu_only
# (tp, dp), sequence parallelism
LAYOUTS = [((1, 4), False), ((2, 2), False), ((2, 2), True), ((4, 1), False), ((4, 1), True)]
LAYOUT_IDS = ["P=1", "P=2", "P=2 SP", "P=4", "P=4 SP"]
# Megatron fuses gelu with a bias only.
LAYERS = [*PLAIN, *GATED, *(layer._replace(bias=False) for layer in [*PLAIN[:4], *GATED])]
EQUAL = "megatron_cases.equals_megatrons"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("layout", "sequence_parallel"), LAYOUTS, ids=LAYOUT_IDS)
def test_it_equals_megatrons_mlp(on_megatron_ranks, layout, sequence_parallel, layer, dtype):
    layer = layer._replace(sequence_parallel=sequence_parallel, dtype=dtype)
    on_megatron_ranks(layout, EQUAL, "FusedMLP", layer)


@pytest.mark.parametrize(("layout", "sequence_parallel"), LAYOUTS[1:3], ids=LAYOUT_IDS[1:3])
@pytest.mark.parametrize("layer", [PLAIN[-1], GATED[2]], ids=str)
def test_with_the_triton_kernels(on_megatron_ranks, layout, sequence_parallel, layer):
    layer = layer._replace(sequence_parallel=sequence_parallel)
    on_megatron_ranks(layout, EQUAL, "FusedMLP", layer, "triton")


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("layout", [(2, 2), (4, 1)], ids=["P=2", "P=4"])
def test_sequence_parallelism_may_be_switched_after_construction(on_megatron_ranks, layout, on):
    on_megatron_ranks(layout, "megatron_cases.follows_the_switch", "FusedMLP", on)
