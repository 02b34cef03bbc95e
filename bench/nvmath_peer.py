"""nvmath-python as a peer: the FFN by cuBLASLt's epilogues, GELU (tanh) and its gradient inside of the GEMMs.

    forward    hᵀ [F, M] = GELU(w1 xᵀ + b1), epilogue GELU_AUX_BIAS, which keeps the pre-activation for backward;
               without gradients GELU_BIAS
    backward   d_preᵀ [F, M] = (w2ᵀ dyᵀ) ⊙ GELU', and db1 as its sums over tokens, epilogue DGELU_BGRAD

Transposed, because cuBLASLt adds its bias along the rows of a result whose columns are contiguous: hᵀ by columns is
h [M, F] by rows, nothing is moved. The other GEMMs are torch's. A Matmul is planned once for each shape, the fastest of
cuBLASLt's heuristics, and gets its operands at each call: the host's time for that is nvmath's own.

Source: nvmath-python 0.8, linalg/advanced/matmulmod.py and linalg/_internal/epilog_protocol.py; example13.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from implementations import Forward, Group
from torch import Tensor

MODULE = "nvmath.linalg.advanced"


class PlannedMatmul:
    """a @ b with one epilogue; planned at the first call with operands of their shapes."""

    def __init__(self, epilog: str) -> None:
        self.epilog = epilog
        self.planned: dict[tuple[torch.Size, torch.Size, torch.dtype], Any] = {}

    def __call__(self, a: Tensor, b: Tensor, inputs: dict[str, Tensor]) -> Any:
        """Return the result, and where the epilogue has others (result, {name: tensor})."""
        key = (a.shape, b.shape, a.dtype)
        if key in self.planned:
            self.planned[key].reset_operands(a=a, b=b, epilog_inputs=inputs)
        else:
            advanced = importlib.import_module(MODULE)
            matmul = advanced.Matmul(a, b)
            matmul.plan(epilog=getattr(advanced.MatmulEpilog, self.epilog), epilog_inputs=inputs)
            matmul.autotune()
            self.planned[key] = matmul
        return self.planned[key].execute()


class Epilogues:
    """The three GEMMs whose epilogues do more than a GEMM."""

    def __init__(self) -> None:
        self.hidden = PlannedMatmul("GELU_BIAS")
        self.hidden_kept = PlannedMatmul("GELU_AUX_BIAS")
        self.d_pre = PlannedMatmul("DGELU_BGRAD")


class _Function(torch.autograd.Function):
    """x [M, H] → y [M, H]; both activated hidden and pre-activation are kept, as DGELU does not return the former."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, epilogues: Epilogues) -> Tensor:
        hidden_t, kept = epilogues.hidden_kept(w1, x.t(), {"bias": b1.unsqueeze(1)})
        ctx.save_for_backward(x, w1, w2, hidden_t, kept["gelu_aux"])
        ctx.epilogues = epilogues
        return F.linear(hidden_t.t(), w2, b2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, hidden_t, pre_t = ctx.saved_tensors
        d_pre_t, sums = ctx.epilogues.d_pre(w2.t(), dy.t(), {"gelu_aux": pre_t})
        return d_pre_t.t() @ w1, d_pre_t @ x, sums["dgelu_bgrad"], dy.t() @ hidden_t.t(), dy.sum(0), None


def build(activation: str) -> Forward:
    """Return the forward; implementations.py has its shapes. The activation is gelu_tanh."""
    epilogues = Epilogues()

    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        rows = x.flatten(0, -2)
        if torch.is_grad_enabled():
            y = _Function.apply(rows, w1, b1, w2, b2, epilogues)
        else:
            y = F.linear(epilogues.hidden(w1, rows.t(), {"bias": b1.unsqueeze(1)}).t(), w2, b2)
        return y.view(x.shape)

    return forward
