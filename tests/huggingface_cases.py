"""Small randomly initialised models of transformers, and what ranks do with `parallelize`, for rank_pool.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from acceptance import assert_accurate
from rank_pool import use
from style_cases import mesh_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpffn_triton.huggingface import parallelize
from tpffn_triton.reference import ACTIVATIONS
from tpffn_triton.tensor_parallel_mlp import TensorParallelMLP

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = WIDTHS | {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = TEXT | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
IMAGES = WIDTHS | {"image_size": 16, "patch_size": 4, "num_labels": 48}
# family → (model, config, its keywords, activation, F)
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 1, "eos_token_id": None}, "gelu_tanh", 256),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT, "gelu", 128),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        WIDTHS | {"image_size": 16, "patch_size": 4, "num_labels": 48},
        "gelu",
        128,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"mlp_bias": True}, "swiglu", 128),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "swiglu", 128),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, "swiglu", 128),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}, "swiglu", 128),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 16}, "geglu_tanh", 128),
}
GENERATING = [family for family in FAMILIES if family not in ("bert", "vit")]


def build(family: str, dtype=torch.float32, **changes):
    """Return a family's model with random weights, biases and norms, in evaluation mode, and its inputs."""
    model, config, keywords, *_ = FAMILIES[family]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**keywords | changes)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(".bias"):  # zeros hide what is done with them
                parameter.normal_(std=0.02)
    images = {"pixel_values": torch.randn(64, 3, 16, 16)}
    inputs = images if family == "vit" else {"input_ids": torch.randint(2, 96, (8, 24))}
    return built.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def logits_of(model, inputs):
    floats = next(model.parameters()).dtype
    inputs = {k: v.to(floats) if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**inputs).logits


def generated(model, inputs):
    return model.generate(**inputs, max_new_tokens=12, do_sample=False)


def eager_over_ranks(mlp, world_size, first):
    """Compute a replaced MLP by separate torch operations: P terms, added from rank `first` on, in this process."""
    wiring, home = mlp._fused.wiring, mlp._fused.second_half or mlp
    act, gated = ACTIVATIONS[wiring.activation], len(wiring.fc1) == 2

    def parts(t, dim):
        return [None] * world_size if t is None else list(t.chunk(world_size, dim))

    def forward(x):
        fc1 = [mlp.get_submodule(name)() for name in wiring.fc1]
        w2, b2 = home.get_submodule(wiring.fc2)()
        columns = [[F.linear(x, *own) for own in zip(parts(w, 0), parts(b, 0), strict=True)] for w, b in fc1]
        hidden = [act(torch.cat(own, -1) if gated else own[0]) for own in zip(*columns, strict=True)]
        terms = [F.linear(h, w) for h, w in zip(hidden, parts(w2, 1), strict=True)]
        y = sum(terms[first + 1 :] + terms[:first], start=terms[first])
        return y if b2 is None else y + b2

    mlp.forward = forward


def eager_models(model, world_size):
    """Yield models that compute as separate operations over P ranks would; the order in which ranks' terms are added,
    which a collective does not promise, is another in each."""
    for first in range(world_size):
        eager = copy.deepcopy(model)
        if world_size > 1:
            parallelize(eager)
            for module in eager.modules():
                if isinstance(module, TensorParallelMLP):
                    eager_over_ranks(module, world_size, first)
        yield eager


def worst(candidates, right):
    return max(candidates, key=lambda t: (t.double() - right).norm())


def keeps_logits(rank, world_size, implementation, family, tp, dtype):
    """Logits before and after by the acceptance rules; tokens equal; the state dict bit for bit the original one."""
    use(implementation)
    mesh = mesh_of(tp)["tp"]
    model, inputs = build(family, dtype)
    original = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        right = logits_of(copy.deepcopy(model).double(), inputs)
        before = worst([logits_of(eager, inputs) for eager in eager_models(model, tp)], right)
        report = parallelize(model, mesh if rank % 2 else mesh.get_group())  # either will do
        after = logits_of(model, inputs)
    assert_accurate("logits", after, before, right)
    everywhere = [None] * world_size
    torch.distributed.all_gather_object(everywhere, after)
    assert all(torch.equal(other, after) for other in everywhere)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    assert bool(sharded) == (tp > 1)
    if dtype == torch.float32 and family in GENERATING:
        untouched, _ = build(family)
        assert torch.equal(generated(model, inputs), generated(untouched, inputs))
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert list(found) == list(original)
    assert all(torch.equal(found[name], t) for name, t in original.items())
    return str(report)


def gradients_of(model, inputs):
    """Return the whole gradients of a training step with dropout off."""
    logits_of(model, inputs).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


def keeps_gradients(rank, world_size, family, tp):
    """Every gradient by the acceptance rules, and those of replicated parameters the same on every rank. All of them
    as one vector, each to its own size: some are sums of few terms, whose errors differ by chance."""
    use("native")
    model, inputs = build(family)
    right = gradients_of(copy.deepcopy(model).double(), inputs)
    eagers = [gradients_of(eager, inputs) for eager in eager_models(model, tp)]
    parallelize(model, mesh_of(tp)["tp"])
    ours = gradients_of(model, inputs)
    assert list(ours) == list(right)
    least = 1e-3 * max(t.norm() for t in right.values())  # a bias of attention's keys has none

    def vector(gradients):
        return torch.cat([(t / right[name].norm().clamp(min=least)).flatten() for name, t in gradients.items()])

    exact = vector(right)
    assert_accurate("gradients", vector(ours).float(), worst(map(vector, eagers), exact).float(), exact)
    everywhere = [None] * world_size
    torch.distributed.all_gather_object(everywhere, list(ours.values()))
    assert all(torch.equal(a, b) for other in everywhere for a, b in zip(other, ours.values(), strict=True))


def drops_out_alike(rank, world_size, tp):
    """In training, ranks that draw alike drop alike, behind the sum over ranks: the model stays replicated."""
    use("native")
    model, inputs = build("gpt2", resid_pdrop=0.5)
    parallelize(model, mesh_of(tp)["tp"])
    model.train()
    torch.manual_seed(1)
    first, second = logits_of(model, inputs), logits_of(model, inputs)
    assert not torch.equal(first, second)
    return first.detach()


def saves_pretrained(rank, world_size, family, tp, folder):
    """What save_pretrained writes with the full state dict loads into an untouched model, bit for bit."""
    use("native")
    model, _ = build(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parallelize(model, mesh_of(tp)["tp"])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        again = type(model).from_pretrained(folder)
        assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())


def leaves_what_does_not_divide(rank, world_size):
    model, _ = build("llama", intermediate_size=130)
    with pytest.raises(ValueError, match=r"LlamaMLP  ffn_hidden_size 130 is not divisible by .* 4"):
        parallelize(model, mesh_of(4)["tp"])


def leaves_what_is_shared(rank, world_size):
    """Two layers with one fc2: shards would go apart. One rank with another model is an error on every rank."""
    model, _ = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    with pytest.raises(ValueError, match=r"shares down_proj\.weight with another module"):
        parallelize(model, mesh_of(4)["tp"])
    assert parallelize(model).replaced, "over one rank they stay one"
    assert second.down_proj.weight is first.down_proj.weight
    aliased, _ = build("llama")
    aliased.alias = aliased.model.layers[0].mlp.up_proj
    report = parallelize(aliased, mesh_of(4)["tp"])
    assert [(left.name, left.reason[:14]) for left in report.left] == [("model.layers.0.mlp", "shares up_proj")]
    other, _ = build("llama", hidden_act="gelu" if rank == 1 else "silu")
    with pytest.raises(ValueError, match=r"rank 1: .*'geglu'"):
        parallelize(other, mesh_of(4)["tp"])


def clips_and_steps(rank, world_size, tp):
    """docs/huggingface.md's way to clip gradients of sharded and replicated parameters, beside the dense model's."""
    use("native")
    model, inputs = build("llama")
    dense, _ = build("llama")
    parallelize(model, mesh_of(tp)["tp"])
    for each in (dense, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        logits_of(each, inputs).square().mean().backward()
        if each is dense:
            right = torch.nn.utils.clip_grad_norm_(each.parameters(), 1e-3)
        else:
            sharded = [p for p in each.parameters() if isinstance(p, DTensor)]
            replicated = [p for p in each.parameters() if not isinstance(p, DTensor)]
            norms = [get_total_norm([p.grad for p in part]) for part in (sharded, replicated)]
            total = torch.stack([norms[0].full_tensor(), norms[1]]).norm()
            for part in (sharded, replicated):
                clip_grads_with_norm_(part, 1e-3, total)
        optimizer.step()
    torch.testing.assert_close(total, right)
    for name, parameter in dense.named_parameters():
        ours = model.get_parameter(name)
        ours, grad = (t.full_tensor() if isinstance(t, DTensor) else t for t in (ours.detach(), ours.grad))
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-3, atol=1e-4)


def moves_from_the_meta_device(rank, world_size, tp):
    """A model without memory, over a group: parameters go where to_empty says, gate and up included."""
    use("native")
    right, inputs = build("llama")
    with torch.device("meta"):
        config = type(right.config)(**right.config.to_dict())
        model = type(right)(config).eval()
    parallelize(model, mesh_of(tp)["tp"].get_group())
    model.to_empty(device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(right.state_dict()) if rank == 0 else {}, options=options)
    for name, buffer in right.named_buffers():  # not in the state dict
        model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(logits_of(model, inputs), logits_of(right, inputs))
