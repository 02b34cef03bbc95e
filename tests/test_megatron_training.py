"""GPT models of megatron-core with FusedMLP: losses and parameters of four steps are those of Megatron's own MLP."""

import pytest
from megatron_ranks import Layer, Training

pytestmark = pytest.mark.cpu_only
GELU, SWIGLU = Layer("gelu", fused=True), Layer("silu", gated=True)
# (layer, options): recomputation, the accumulating weight gradients, gradients' dtype.
CASES = [
    Training(GELU),
    Training(SWIGLU, gradient_accumulation_fusion=True),
    Training(GELU, recompute="full", gradient_accumulation_fusion=True),
    Training(SWIGLU, recompute="mlp", gradient_accumulation_fusion=True),
    Training(Layer("gelu"), recompute="mlp"),
    Training(SWIGLU, recompute="full", grad_reduce_in_fp32=False),
    Training(GELU, recompute="layernorm", gradient_accumulation_fusion=True),
    Training(SWIGLU, recompute="layernorm"),
    Training(Layer("gelu", gated=True, fused=True)),
]


# On four ranks; every case with two of them tensor-parallel and two replicas, the first four otherwise.
RUNS = [
    (tp, sequence_parallel, case)
    for tp in (1, 2, 4)
    for sequence_parallel in (False, True)[:tp]
    for case in CASES[: None if tp == 2 else 4]
]


def test_replicated_gradients_are_summed_without_megatrons_training_loop(on_megatron_ranks):
    on_megatron_ranks(2, "megatron_training_cases.sums_replicated_gradients")


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "case"),
    RUNS,
    ids=[f"TP{tp} {'SP ' * sequence_parallel}{case}" for tp, sequence_parallel, case in RUNS],
)
def test_it_trains_as_megatrons_mlp(on_megatron_ranks, tp, sequence_parallel, case):
    case = case._replace(layer=case.layer._replace(sequence_parallel=sequence_parallel))
    losses = on_megatron_ranks(tp, "megatron_training_cases.trains_as_megatrons", "FusedMLP", case)
    assert all(rank[-1] < rank[0] - 0.1 for rank in losses), losses
