"""List what is compared: each implementation computes one rank's FFN on its shards.

    forward(x [B, S, H], w1 [F/P, H], b1 [F/P], w2 [H, F/P], b2 [H], group) -> y [B, S, H]
    gated activations: w1 [2F/P, H], b1 [2F/P]; sequence_parallel: x, y [B·S/P, H]

    unfused          F.linear, activation, F.linear: three torch operations; a gated activation is chunk, act and mul
    unfused-onednn   the same three steps with every GEMM by oneDNN (CPU, fp32 and bf16)
    fused            tpffn_triton.ffn
    fused-triton     the same, and no GEMM goes to cuBLAS, whatever was measured to be faster (CUDA)
    megatron         Megatron-Core's own MLP, where megatron-core is installed (megatron_peer.py)
    megatron-fused   tpffn_triton.megatron.FusedMLP in its place

On a CPU `fused` computes GEMMs through F.linear, which uses whatever torch was built with, and in bf16 a forward
without gradients through oneDNN (tpffn_triton/native.py): what it gains over the better of the two baselines is fusion
and overlap.

Around the unfused steps stand Megatron-LM's f and g (tpffn_triton/regions.py). Both sum in place, so that no copy
slows the baseline; b2 is added after the sum, on every rank. Without a group it goes into the second F.linear. With
sequence parallelism they are gather and reduce-scatter, and the gathered x is kept for backward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import checkout  # noqa: F401
import megatron_peer
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tpffn_triton import ffn
from tpffn_triton.kernels.forward import ffn_forward
from tpffn_triton.kernels.matmul import dgrad, linear, linear_into, wgrad
from tpffn_triton.kernels.weight_grads import weight_grads
from tpffn_triton.reference import ACTIVATIONS
from tpffn_triton.regions import (
    copy_to_tp_region,
    gather_from_sp_region,
    reduce_from_tp_region,
    reduce_scatter_to_sp_region,
)

T = TypeVar("T")
Group = dist.ProcessGroup | None
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Group], Tensor]
Linear = Callable[..., Tensor]
# What fused-triton computes by: none of these leaves a GEMM to torch's own.
_PURE_TRITON: dict[str, Callable] = {
    launcher.__name__: partial(launcher, by_torch=False)
    for launcher in (ffn_forward, linear, linear_into, dgrad, wgrad, weight_grads)
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute the FFN: `build(activation, sequence_parallel)` returns its forward.

    device_types, dtypes   where it exists
    missing                returns what it needs that is not installed, None: nothing
    launchers              what computes in the place of the package's own (exchanged_launchers.py)
    """

    name: str
    summary: str
    build: Callable[[str, bool], Forward]
    device_types: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("fp32", "tf32", "bf16", "fp16")
    missing: Callable[[], str | None] = lambda: None
    launchers: Mapping[str, Callable] = field(default_factory=dict)

    def reason_against(self, device_type: str, dtype: str) -> str | None:
        """Say why it does not run with this device type and dtype; None: it does."""
        if device_type not in self.device_types or dtype not in self.dtypes:
            return f"does not exist for {dtype} on {device_type}"
        return self.missing()


class _OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias with oneDNN's GEMM in all three places; the operator itself records no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows_dy, rows_x = dy.flatten(0, -2), x.flatten(0, -2)
        dx = _onednn(rows_dy, weight.t(), None).view(x.shape)
        return dx, _onednn(rows_dy.t(), rows_x.t(), None), rows_dy.sum(0) if ctx.needs_input_grad[2] else None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _unfused(linear: Linear) -> Callable[[str, bool], Forward]:
    def build(activation: str, sequence_parallel: bool) -> Forward:
        activate = ACTIVATIONS[activation]

        def on_slices(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
            hidden = activate(linear(gather_from_sp_region(x, group), w1, b1))
            return reduce_scatter_to_sp_region(linear(hidden, w2, None), group) + b2

        def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
            if group is None:
                return linear(activate(linear(x, w1, b1)), w2, b2)
            hidden = activate(linear(copy_to_tp_region(x, group, consume=True), w1, b1))
            return reduce_from_tp_region(linear(hidden, w2, None), group, consume=True) + b2

        return on_slices if sequence_parallel else forward

    return build


def _fused(activation: str, sequence_parallel: bool) -> Forward:
    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        options: dict[str, Any] = {"activation": activation, "tp_group": group}
        return ffn(x, w1, w2, b1, b2, sequence_parallel=sequence_parallel, **options)

    return forward


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("unfused", "F.linear, activation, F.linear: the baseline", _unfused(F.linear)),
        Implementation(
            "unfused-onednn",
            "the same three steps, GEMMs by oneDNN (CPU, fp32 and bf16)",
            _unfused(_OneDNNLinear.apply),
            device_types=("cpu",),
            dtypes=("fp32", "bf16"),
        ),
        Implementation("fused", "tpffn_triton.ffn", _fused),
        Implementation(
            "fused-triton",
            "the same by Triton's kernels alone, none of its GEMMs by cuBLAS (CUDA)",
            _fused,
            device_types=("cuda",),
            launchers=_PURE_TRITON,
        ),
        Implementation(
            "megatron",
            "Megatron-Core's own MLP; gelu_tanh, geglu_tanh and swiglu by its fused kernels, others eager",
            megatron_peer.build_megatron,
            missing=megatron_peer.missing,
        ),
        Implementation(
            "megatron-fused",
            "tpffn_triton.megatron.FusedMLP in its place: fused and the adapter's Python",
            megatron_peer.build_fused,
            missing=megatron_peer.missing,
        ),
    )
}


def here(
    known: Mapping[str, T], names: tuple[str, ...] | None, what: str, against: Callable[[T], str | None]
) -> list[T]:
    """Return the named ones of those that are known, or with None all that are here; against: says why one is not.

    Raises: ValueError: a named one is not here; says why, and what it is.
    """
    wanted = {name: one for name, one in known.items() if names is None or name in names}
    reasons = {name: against(one) for name, one in wanted.items()}
    for name, reason in reasons.items() if names else ():
        if reason:
            raise ValueError(f"{what} {name} {reason}")
    return [one for name, one in wanted.items() if reasons[name] is None]


def chosen(names: tuple[str, ...] | None, device_type: str, dtype: str) -> list[Implementation]:
    """Return the named implementations, or with None all that run here, the baseline first.

    Raises: ValueError: a named one does not run with this device type and dtype, or here at all; says why.
    """
    return here(IMPLEMENTATIONS, names, "implementation", lambda known: known.reason_against(device_type, dtype))
