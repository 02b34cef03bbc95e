"""MLPs as others write them, for what turns them into ours: two linears or three, nn.Linear or Conv1D."""

import torch
import torch.nn.functional as F
from ffn_cases import Problem
from torch import nn

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS
from tpffn_triton.reference import ACTIVATIONS


class Conv1D(nn.Module):
    """transformers' linear with a weight [in, out], for tests that run without transformers."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf, self.nx = out_features, in_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.02)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class PlainMLP(nn.Module):
    """fc2(act(fc1(x))), with dropout behind, as in GPT-2, BERT's successors and ViT."""

    def __init__(self, H: int, FFN: int, activation: str, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, FFN, bias), nn.Linear(FFN, H, bias)
        self.act, self.dropout = ACTIVATIONS[activation], nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class ConvMLP(PlainMLP):
    """The same with GPT-2's Conv1D."""

    def __init__(self, H: int, FFN: int, activation: str) -> None:
        super().__init__(H, FFN, activation)
        self.fc1, self.fc2 = Conv1D(FFN, H), Conv1D(H, FFN)


class GatedMLP(nn.Module):
    """down(f(gate(x)) · up(x)), as in Llama; up comes first here, since names and order must not matter."""

    def __init__(self, H: int, FFN: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(H, FFN, bias), nn.Linear(H, FFN, bias)
        self.down_proj = nn.Linear(FFN, H, bias)
        self.act_fn = ACTIVATIONS[GATED_ACTIVATIONS[activation]]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def build(H: int, FFN: int, activation: str, conv1d: bool = False) -> nn.Module:
    """Return an MLP that computes the activation."""
    if activation in GATED_ACTIVATIONS:
        return GatedMLP(H, FFN, activation)
    return (ConvMLP if conv1d else PlainMLP)(H, FFN, activation)


def names_of(mlp: nn.Module) -> dict[str, list[str]]:
    """Return the names of the parameters that make up w1, b1, w2 and b2; of a gated w1 and b1, gate and up."""
    fc1, fc2 = (["gate_proj", "up_proj"], "down_proj") if isinstance(mlp, GatedMLP) else (["fc1"], "fc2")
    return {
        "w1": [f"{name}.weight" for name in fc1],
        "b1": [f"{name}.bias" for name in fc1],
        "w2": [f"{fc2}.weight"],
        "b2": [f"{fc2}.bias"],
    }


def as_module(problem: Problem, conv1d: bool = False) -> nn.Module:
    """Return a module with the problem's full weights."""
    H, FFN = problem.w2.shape
    mlp = build(H, FFN, problem.activation, conv1d).to(problem.w1.device, problem.w1.dtype)
    with torch.no_grad():
        for ours, names in names_of(mlp).items():
            for name, part in zip(names, getattr(problem, ours).chunk(len(names)), strict=True):
                turned = conv1d and part.dim() == 2
                mlp.get_parameter(name).copy_(part.t() if turned else part)
    return mlp
