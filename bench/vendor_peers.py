"""Liger-Kernel's, QuACK's and Transformer Engine's kernels as peers, on a GPU where they are installed.

    liger                gate and up are two F.linear, as in Liger's own MLPs, then its kernel of activation and
                         product. w1 is one tensor here: joining the two halves of dw1 counts
    quack                quack.mlp.mlp_func, whose two GEMMs hold activation and its gradient in their epilogues; its
                         default configurations, or what its autotuner finds
    transformer-engine   transformer_engine.pytorch.ops.Sequential(Linear, activation, Linear), which fuses what it can:
                         LayerNormMLP without its norm

Source: liger_kernel 0.8, ops/geglu.py and ops/swiglu.py; quack 0.6, mlp.py; transformer_engine, pytorch/ops.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from implementations import Forward, Group
from shard_modules import OnShards
from torch import Tensor

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS

# Their names of our activations.
LIGER = {
    "geglu_tanh": ("liger_kernel.ops.geglu", "LigerGELUMulFunction"),
    "swiglu": ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
}
QUACK_MODULE = "quack.mlp"
QUACK = {
    "gelu_tanh": "gelu_tanh_approx",
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_sq",
    "geglu_tanh": "geglu",
    "swiglu": "swiglu",
}
TE_MODULE = "transformer_engine.pytorch.ops"
TE = {"gelu_tanh": "GELU", "relu": "ReLU", "relu2": "SReLU", "silu": "SiLU", "geglu_tanh": "GEGLU", "swiglu": "SwiGLU"}


def build_liger(activation: str) -> Forward:
    """Return the forward; implementations.py has its shapes."""
    module, name = LIGER[activation]
    function = getattr(importlib.import_module(module), name)

    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        (gate, up), (gate_bias, up_bias) = w1.chunk(2), b1.chunk(2)
        return F.linear(function.apply(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)), w2, b2)

    return forward


def build_quack(tuned: bool) -> Callable[[str], Forward]:
    """Return a build: the forward with default configurations, or with tuned ones."""

    def build(activation: str) -> Forward:
        mlp = importlib.import_module(QUACK_MODULE).mlp_func
        # Gate above up, where QuACK's own layout has their rows alternate.
        layout = {"concat_layout": True} if activation in GATED_ACTIVATIONS else {}
        options: dict[str, Any] = {"activation": QUACK[activation], "tuned": tuned} | layout

        def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
            return mlp(x, w1, w2, bias1=b1, bias2=b2, **options)

        return forward

    return build


def build_transformer_engine(activation: str) -> Forward:
    """Return the forward; implementations.py has its shapes."""
    module = OnShards(partial(_sequential, activation))

    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        return module(w1, b1, w2, b2)(x)

    return forward


def _sequential(activation: str, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
    """Make the module and put the shards in the place of its parameters, which its basic operations hold as well."""
    ops = importlib.import_module(TE_MODULE)
    linears = []
    for weight, bias in ((w1, b1), (w2, b2)):
        linear = ops.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        for operation in (linear, *linear.basic_ops):
            given = {"weight": weight, "bias": bias}
            operation._parameters.update({name: given[name] for name in operation._parameters})
        linears.append(linear)
    return ops.Sequential(linears[0], getattr(ops, TE[activation])(), linears[1])
