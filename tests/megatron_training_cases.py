"""GPT models of megatron-core, trained with Megatron's MLP and with FusedMLP, on a rank (megatron_ranks.py)."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from gpt_from_megatron import NormOnSlices
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_cases import class_of, config_of
from megatron_ranks import BATCH, SEQUENCE, VOCABULARY, Layer, Training
from torch import Tensor, nn

from tpffn_triton import reduce_replicated_grads
from tpffn_triton.megatron import FusedMLP, replace_mlp

STEPS = 4
# Of Transformer Engine; recomputation of norms asks for them, and does nothing with them without fp8.
STUBS = {
    "FP8GlobalStateManager": SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None),
    "activation_recompute_forward": lambda **_: contextlib.nullcontext(),
    "fp8_autocast": lambda **_: contextlib.nullcontext(),
}
for _name, _stub in STUBS.items():
    if not hasattr(random, _name):
        setattr(random, _name, _stub)
# Of fp8 weights, of which there are none: 0.12 asks for Transformer Engine nevertheless.
distrib_optimizer.quantize_param_shard = lambda *_: None


def model_of(case: Training, cls: type) -> tuple[Any, Any]:
    """Return (config, GPTModel) whose MLPs are of a class; the same initial weights for each."""
    options: dict[str, Any] = {}
    # Megatron's own MLP recurses for ever with "mlp": it is what a model without recomputation computes.
    if cls is not MLP and case.recompute == "full":
        options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif cls is not MLP and case.recompute:
        options = {"recompute_granularity": "selective", "recompute_modules": [case.recompute]}
    config = config_of(case.layer, **options)
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = NormOnSlices
    spec = TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=NormOnSlices)
    if cls is not MLP:
        spec = replace_mlp(spec)
        for layer in spec.layer_specs:
            layer.submodules.mlp.module = accumulating(cls) if case.gradient_accumulation_fusion else cls
    torch.manual_seed(3)
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE)
    torch.manual_seed(4)
    for name, p in model.named_parameters():
        if name.endswith("linear_fc2.bias"):
            nn.init.normal_(p, std=0.1)
    return config, model


def accumulating(cls: type) -> type:
    """Return the class for a model whose other linears cannot have gradient_accumulation_fusion: it needs APEX."""

    class Accumulating(cls):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(config, *args, **kwargs)

    return Accumulating


def trainer_of(case: Training, config: Any, model: Any) -> tuple[Any, Any]:
    """Return DistributedDataParallel and the distributed optimizer, both with overlap."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        grad_reduce_in_fp32=case.grad_reduce_in_fp32,
        bucket_size=case.bucket_size,
    )
    parallel = DistributedDataParallel(config, settings, model)
    # The gradient of attention's key bias is noise: a large epsilon keeps Adam from following its sign.
    options = {
        "optimizer": "adam",
        "lr": 1e-2,
        "adam_eps": 1e-3,
        "use_distributed_optimizer": True,
        "overlap_param_gather": True,
    }
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    options = {name: value for name, value in options.items() if name in known}
    return parallel, get_megatron_optimizer(OptimizerConfig(**options), [parallel])


def train(case: Training, cls: type) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss before each step and after the last one, and the parameters after it."""
    config, model = model_of(case, cls)
    parallel, optimizer = trainer_of(case, config, model)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE), 1).bool()[None, None]
    losses = []
    for step in range(STEPS + 1):
        torch.manual_seed(100 + step + 10 * parallel_state.get_data_parallel_rank())
        # Something to learn: the next one.
        tokens = (torch.randint(0, VOCABULARY, (BATCH, 1)) + torch.arange(SEQUENCE + 1)) % VOCABULARY
        parallel.zero_grad_buffer()
        optimizer.zero_grad()
        loss = parallel(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()).mean()
        losses.append(loss.item())
        # Megatron's checkpoint makes a parameter that it is given as an output its own: backward would not end.
        made = [name for name, p in model.named_parameters() if not p.is_leaf]
        assert not made, f"no leaf after a forward: {made}"
        loss.backward()
        finalize_model_grads([parallel])
        if step < STEPS:
            optimizer.step()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def sums_replicated_gradients() -> None:
    """Without finalize_model_grads, as docs/megatron.md says."""
    config, model = model_of(Training(Layer(sequence_parallel=True)), FusedMLP)
    group = parallel_state.get_tensor_model_parallel_group()
    tokens = torch.arange(SEQUENCE)[None]
    model(tokens, tokens, torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None], labels=tokens).mean().backward()
    marked = {name: p for name, p in model.named_parameters() if getattr(p, "sequence_parallel", False)}
    assert len(marked) == config.num_layers * (1 + 1 + 4) + 2, [*marked]
    expected = {name: p.grad.clone() for name, p in marked.items()}
    for grad in expected.values():
        dist.all_reduce(grad, group=group)
    reduce_replicated_grads(model, tp_group=group)
    for name, p in marked.items():
        torch.testing.assert_close(p.grad, expected[name])


def trains_as_megatrons(name: str, case: Training) -> list[float]:
    """Compare every loss and the parameters after four steps; return the losses."""
    cls = class_of(name)
    losses, parameters = train(case, cls)
    expected, expected_parameters = train(case, MLP)
    for step, (own, theirs) in enumerate(zip(losses, expected, strict=True)):
        assert abs(own - theirs) <= 1e-5, f"loss {own} before step {step}, Megatron's {theirs}"
    assert [*parameters] == [*expected_parameters]
    for name, p in parameters.items():
        error = (p - expected_parameters[name]).abs().max().item()
        assert error <= 2e-5, f"{name}: off by {error:.1e} after {STEPS} steps"
    return losses
