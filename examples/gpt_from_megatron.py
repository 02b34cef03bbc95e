"""A GPT from Megatron-Core, with its data parallelism and its optimizer; its MLP Megatron's, or FusedMLP.

What a training script for Megatron-Core has anyway. FusedMLP is one line of it: `replace_mlp(spec)`.

Without a GPU call `megatron_without_gpu.run_on_cpu()` before importing this.
"""

import argparse
import importlib.util
from typing import Any

import torch
from megatron.core import package_info, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from tpffn_triton.megatron import replace_mlp

VERSION = package_info.__version__
VOCABULARY = 256  # a token is a byte


class NormOnSlices(nn.LayerNorm):
    """LayerNorm whose gradients Megatron sums over the slices of sequence parallelism, as APEX's are."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def distributed_optimizer_works() -> bool:
    """Say whether the distributed optimizer runs: up to 0.12 it calls Transformer Engine."""
    old = tuple(map(int, VERSION.split(".")[:2])) < (0, 13)
    return not old or importlib.util.find_spec("transformer_engine") is not None


def start_parallelism(args: argparse.Namespace) -> None:
    """Make Megatron's groups of ranks: args.tp consecutive ones, and data parallelism over the rest."""
    parallel_state.initialize_model_parallel(args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)


def configuration(args: argparse.Namespace, fused: bool) -> TransformerConfig:
    """Return the model's configuration: the same for both MLPs, but for recompute_modules=["mlp"], which Megatron's own
    cannot take."""
    function, gated, fusion = args.activation_options
    recompute: dict[str, Any] = {}
    if args.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif args.recompute == "mlp" and fused:
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        activation_func=function,
        gated_linear_unit=gated,
        bias_activation_fusion=fusion,
        tensor_model_parallel_size=args.tp,
        sequence_parallel=args.sequence_parallel and args.tp > 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=args.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,  # the same full weights at every tp, and with both MLPs
        **recompute,
    )


def layer_specs(config: TransformerConfig, fused: bool) -> TransformerBlockSubmodules:
    """Return what the model is made of."""
    spec = get_gpt_layer_local_spec()
    norm = spec.submodules.input_layernorm
    if norm is WrappedTorchNorm and config.sequence_parallel:  # it refuses; with APEX it is FusedLayerNorm
        norm = spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = NormOnSlices
    if fused:
        spec = replace_mlp(spec)  # the one line
    return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=norm)


class Trainer:
    """A model, its DistributedDataParallel and its optimizer.

    Two of them with the same arguments begin with the same weights, and differ in the MLP alone.
    """

    def __init__(self, args: argparse.Namespace, fused: bool, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        config = configuration(args, fused)
        model: Any = GPTModel(
            config, layer_specs(config, fused), vocab_size=VOCABULARY, max_sequence_length=args.seq
        ).to(device)
        self.mlp = type(model.decoder.layers[0].mlp)
        if args.bf16:
            model = Float16Module(config, model)
        sharded = args.distributed_optimizer
        data_parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=sharded,
            overlap_param_gather=sharded,
        )
        self.model = DistributedDataParallel(config, data_parallel, model)
        # From 0.14 on the optimizer is told as well.
        told = hasattr(OptimizerConfig, "overlap_param_gather")
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            bf16=args.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=sharded,
            **({"overlap_param_gather": sharded} if told else {}),
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.model])
        self.positions = torch.arange(args.seq, device=device)[None]
        self.mask = torch.ones(args.seq, args.seq, dtype=torch.bool, device=device).triu(1)[None, None]

    def step(self, tokens: Tensor) -> Tensor:
        """Take one step; tokens [B / dp, S + 1]. Returns the loss before it, of these tokens."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        text, following = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = self.model(text, self.positions.expand_as(text), self.mask, labels=following).float().mean()
        loss.backward()
        finalize_model_grads([self.model])  # over dp, and over tp what sequence parallelism leaves in parts
        self.optimizer.step()
        return loss.detach()
