"""The one eager, unsharded reference, in whatever dtype its inputs have; tests and benchmark alike compare with it.

x [..., H]   w1 [F, H]   b1 [F] or None   w2 [H, F]   b2 [H] or None   ->   y [..., H]
gated: w1 [2F, H], b1 [2F], gate rows above up rows

forward  y = act(x @ w1.T + b1) @ w2.T + b2, three separate torch operations; gated: act(z) = f(gate) * up
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS

Activation = Callable[[Tensor], Tensor]


def _gated(activation: Activation) -> Activation:
    def act(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return activation(gate) * up

    return act


_PLAIN: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
ACTIVATIONS = _PLAIN | {name: _gated(_PLAIN[gate]) for name, gate in GATED_ACTIVATIONS.items()}


def ffn_reference(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Return the FFN of the full weights; shapes in the module docstring. Differentiable by autograd."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
