"""LoRA by PEFT on our linears: what can be targeted is right, also over ranks, and the rest raises or is left out."""

import pytest
import torch
import torch.distributed as dist
from ffn_cases import draw
from rank_pool import use
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import huggingface_cases
import style_cases
from peft import LoraConfig, get_peft_model

import tpffn_triton as tp
from tpffn_triton.huggingface import parallelize
from tpffn_triton.reference import ffn_reference
from tpffn_triton.sharding import unshard_ffn

pytestmark = pytest.mark.cpu_only
H, FFN = 16, 48
FC1, FC2 = "ffn.linear_fc1.weight", "ffn.linear_fc2.weight"


def adapted(layer, **config):
    """Return a model of one layer with adapters whose B is not zero, as it is after some training."""
    model = get_peft_model(nn.ModuleDict({"ffn": layer}), LoraConfig(r=4, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.base_model.model["ffn"], model


def test_linears_say_their_shards_sizes():
    layer = tp.TensorParallelFFN(H, FFN, activation="swiglu")
    assert (layer.linear_fc1.in_features, layer.linear_fc1.out_features) == (H, 2 * FFN)
    assert (layer.linear_fc2.in_features, layer.linear_fc2.out_features) == (FFN, H)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_target_parameters_adapt_both_weights(activation, device):
    """Result and gradients are those of the merged weights; the layer's own stay frozen; merging changes nothing."""
    layer = tp.TensorParallelFFN(H, FFN, activation=activation, device=device)
    weights = [parameter.detach().double() for parameter in layer.parameters()]
    ffn, model = adapted(layer, target_parameters=[FC1, FC2])
    adapters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4
    (a1, b1, a2, b2), (w1, bias1, w2, bias2) = adapters.values(), weights
    x, scale = torch.randn(5, H, device=device), 8 / 4  # lora_alpha / r
    right = ffn_reference(x.double(), w1 + scale * b1 @ a1, w2 + scale * b2 @ a2, bias1, bias2, activation=activation)
    y = ffn(x)
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    right.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in adapters:
            torch.testing.assert_close(parameter.grad.double(), adapters[name].grad, rtol=1e-4, atol=1e-3)
        else:
            assert parameter.grad is None, name
    model.merge_adapter()
    torch.testing.assert_close(ffn(x), y.detach(), rtol=1e-4, atol=1e-4)


def every_rank_adapts_its_shard(rank, world_size, activation):
    use("native")
    torch.manual_seed(0)
    layer = tp.TensorParallelFFN(H, FFN, activation=activation, tp_group=dist.group.WORLD)
    torch.manual_seed(rank)
    ffn, model = adapted(layer, target_parameters=[FC1, FC2])
    shard = [ffn.linear_fc1(None), ffn.linear_fc2(None)]  # with the adapters added
    own = [None if t is None else t.detach() for pair in shard for t in pair]
    shards = [None] * world_size
    dist.all_gather_object(shards, own)
    w1, b1, w2, b2 = unshard_ffn(shards, activation=activation)
    problem = draw((6,), H, FFN)
    y = ffn(problem.x)
    torch.testing.assert_close(y, ffn_reference(problem.x, w1, w2, b1, b2, activation=activation), rtol=1e-4, atol=1e-4)
    y.backward(problem.dy)
    # Nudge this rank's adapters alone: y moves by what the gradients of all ranks' adapters say.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    change = sum(parameter.grad.square().sum() for parameter in trained)
    dist.all_reduce(change)
    step = 1e-3 / change.item() ** 0.5
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(parameter.grad, alpha=sign * step)
            values.append((ffn(problem.x).double() * problem.dy.double()).sum().item())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(change.item(), rel=2e-2)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_over_ranks_each_adapts_its_own_shard(activation, ranks_of):
    ranks_of(4).run(every_rank_adapts_its_shard, activation)


def test_target_modules_raise():
    """PEFT would call the linear in the product's place."""
    with pytest.raises(ValueError, match=r"Target module LinearShard\(in_features=16, out_features=48, bias=True\)"):
        adapted(tp.TensorParallelFFN(H, FFN), target_modules=["linear_fc1"])
    model, _ = huggingface_cases.build("llama")
    parallelize(model)
    with pytest.raises(ValueError, match="Target module PlacedShard"):
        get_peft_model(model, LoraConfig(target_modules=["gate_proj"]))


def test_all_linear_leaves_the_mlps_out():
    model, inputs = huggingface_cases.build("llama")
    parallelize(model)
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in peft.targeted_module_names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    huggingface_cases.logits_of(peft, inputs).sum().backward()
    assert all((parameter.grad is not None) == ("lora_" in name) for name, parameter in peft.named_parameters())


def test_weights_of_a_replaced_mlp_can_be_adapted():
    model, inputs = huggingface_cases.build("llama")
    untouched, _ = huggingface_cases.build("llama")
    parallelize(model)
    right = huggingface_cases.logits_of(model, inputs)
    config = {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight", "mlp.down_proj.weight"], "r": 4}
    both = [get_peft_model(each, LoraConfig(**config)) for each in (model, untouched)]
    assert torch.equal(huggingface_cases.logits_of(both[0], inputs), right), "B begins as zero"
    for peft in both:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
    ours, theirs = (huggingface_cases.logits_of(peft, inputs) for peft in both)
    assert not torch.equal(ours, right)
    torch.testing.assert_close(ours, theirs)
    for logits in (ours, theirs):
        logits.sum().backward()
    for (name, parameter), other in zip(both[0].named_parameters(), both[1].parameters(), strict=True):
        assert (parameter.grad is None) == ("lora_" not in name)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_adapters_in_an_mlp_leave_it_as_it_was():
    model, inputs = huggingface_cases.build("llama")
    peft = get_peft_model(model, LoraConfig(target_modules=["gate_proj"], layers_to_transform=[0]))
    right = huggingface_cases.logits_of(peft, inputs)
    report = parallelize(peft)
    assert [r.name for r in report.replaced] == ["base_model.model.model.layers.1.mlp"]
    assert [left.name for left in report.left] == ["base_model.model.model.layers.0.mlp"]
    assert "has 5 linears" in report.left[0].reason
    torch.testing.assert_close(huggingface_cases.logits_of(peft, inputs), right)


def dtensors_are_refused(rank, world_size):
    model, inputs = huggingface_cases.build("llama")
    parallelize(model, style_cases.mesh_of(2)["tp"])
    peft = get_peft_model(model, LoraConfig(target_parameters=["mlp.down_proj.weight"]))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        huggingface_cases.logits_of(peft, inputs)


def attention_is_adapted(rank, world_size):
    """Beside MLPs over ranks: logits and gradients of the adapters as without, the same on every rank."""
    use("native")
    found = []
    for tensor_parallel in (True, False):
        model, inputs = huggingface_cases.build("llama")
        if tensor_parallel:
            parallelize(model, style_cases.mesh_of(4)["tp"])
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        logits = huggingface_cases.logits_of(peft, inputs)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in peft.parameters() if p.requires_grad)])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)
    return found[0]


def test_replaced_mlps_over_ranks(ranks_of):
    """LoRA on attention works beside them; on their own weights, which are DTensors, torch refuses it."""
    first, *others = ranks_of(4).run(attention_is_adapted)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    ranks_of(4).run(dtensors_are_refused)


def test_the_second_half_of_an_mlp_of_two_modules_cannot_be_adapted():
    """Loudly: the first half asks it for its weight without an input."""
    model, inputs = huggingface_cases.build("bert")
    parallelize(model)
    peft = get_peft_model(model, LoraConfig(target_parameters=["output.dense.weight"], target_modules=[]))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        huggingface_cases.logits_of(peft, inputs)
