"""parallelize() on models of transformers: logits, gradients, tokens, state dicts over 1, 2 and 4 ranks; reports."""

import pytest
import torch

pytest.importorskip("transformers")

import huggingface_cases as cases
import transformers
from transformers.models.mixtral import modeling_mixtral

from tpffn_triton.huggingface import parallelize

pytestmark = pytest.mark.cpu_only
FAMILIES = list(cases.FAMILIES)


@pytest.fixture
def ranks(ranks_of):
    return ranks_of(4).run


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_as_before(family, dtype, tp, ranks):
    """The report says what was replaced, with the activation of the model's config."""
    *_, activation, ffn = cases.FAMILIES[family]
    for report in ranks(cases.keeps_logits, "native", family, tp, dtype):
        assert report.startswith(f"2 MLPs replaced, over {tp} rank")
        assert f"{activation}, H=64, F={ffn}" in report
        assert "left" not in report


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_logits_by_the_kernels(family, ranks):
    ranks(cases.keeps_logits, "triton", family, 2, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_before(family, ranks):
    ranks(cases.keeps_gradients, family, 2)


def test_dropout_is_the_same_on_every_rank(ranks):
    first, *others = ranks(cases.drops_out_alike, 4)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("family", "tp"), [("gpt2", 2), ("llama", 2), ("llama", 1)])
def test_it_is_saved_in_the_original_layout(family, tp, ranks, tmp_path):
    ranks(cases.saves_pretrained, family, tp, str(tmp_path))


SMALL = cases.WIDTHS | {"vocab_size": 96, "pad_token_id": 0}
LEFT = {
    "CLIPTextModel": (transformers.CLIPTextConfig(**SMALL), "CLIPMLP  does not compute fc2"),
    "T5EncoderModel": (
        transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=96),
        "T5DenseActDense  has dropout before its second linear",
    ),
    "MixtralForCausalLM": (
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2),
        r"mlp ×2 +MixtralSparseMoeBlock +has, beside nn.Linear",
    ),
    "BloomForCausalLM": (
        transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=96),
        "BloomMLP  cannot be called with one tensor",
    ),
    "Phi3ForCausalLM": (
        transformers.Phi3Config(**SMALL),
        r"Phi3MLP  has linears that do not lead from H to F and back \(gate_up_proj 64 → 256, down_proj 128 → 64\)",
    ),
    "OPTForCausalLM": (
        transformers.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=96,
            word_embed_proj_dim=64,
        ),
        r"OPTDecoderLayer  has, beside nn.Linear, self_attn_layer_norm",
    ),
    "DebertaV2ForMaskedLM": (transformers.DebertaV2Config(**SMALL), "DebertaV2Layer  cannot be called with one tensor"),
}


# Before, each expert was an MLP of its own, which is replaced.
fused_experts = pytest.mark.skipif(not hasattr(modeling_mixtral, "MixtralExperts"), reason="transformers before 5")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[fused_experts] * (name == "MixtralForCausalLM")) for name in LEFT]
)
def test_what_is_not_known_is_left_and_said(name):
    config, message = LEFT[name]
    model = getattr(transformers, name)(config)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"found no MLP that can be replaced\n  .*" + message):
        parallelize(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@fused_experts
def test_a_mixture_keeps_its_experts_and_gets_its_shared_one():
    config = transformers.Qwen2MoeConfig(
        **SMALL, num_key_value_heads=4, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4
    )
    report = parallelize(transformers.Qwen2MoeForCausalLM(config))
    assert {(r.name.rpartition(".")[2], r.activation, r.ffn_hidden_size) for r in report.replaced} == {
        ("shared_expert", "swiglu", 48)
    }
    assert {left.kind for left in report.left} == {"Qwen2MoeSparseMoeBlock", "Qwen2MoeExperts"}
    text = str(report)
    assert text.splitlines()[0] == "2 MLPs replaced, over 1 rank"
    assert "model.layers.*.mlp.shared_expert ×2  Qwen2MoeMLP  swiglu, H=64, F=48" in text
    assert "4 left as they were" in text


def test_parameters_of_one_rank_stay_the_same_objects():
    """An optimizer made before goes on."""
    for family in ("llama", "gpt2", "bert"):
        model, inputs = cases.build(family)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parameters = dict(model.named_parameters())
        parallelize(model)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        cases.logits_of(model, inputs).sum().backward()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.step()
        assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save": "all"}, ValueError, "save 'all'"),
        ({"forward_chunks": 1.5}, TypeError, "forward_chunks must be an int"),
        ({"tp_group": 4}, TypeError, "tp_group must be None, a ProcessGroup or a 1-D DeviceMesh, got int"),
    ],
)
def test_bad_input_changes_nothing(arguments, error, message):
    model, _ = cases.build("llama")
    with pytest.raises(error, match=message):
        parallelize(model, **arguments)
    parallelize(model)
    with pytest.raises(ValueError, match="found no MLP that can be replaced"):
        parallelize(model)


def test_sizes_that_do_not_divide_are_left(ranks):
    ranks(cases.leaves_what_does_not_divide)


def test_shared_parameters_and_ranks_that_differ(ranks):
    ranks(cases.leaves_what_is_shared)


def test_gradients_are_clipped_as_the_page_says(ranks):
    ranks(cases.clips_and_steps, 2)


def test_a_model_on_the_meta_device(ranks):
    ranks(cases.moves_from_the_meta_device, 2)
