"""The one eager, unsharded reference, in whatever dtype its inputs have; tests and benchmark alike compare with it.

x [..., H]   w1 [F, H]   b1 [F] or None   w2 [H, F]   b2 [H] or None   ->   y [..., H]

forward  y = act(x @ w1.T + b1) @ w2.T + b2, three separate torch operations
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


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
