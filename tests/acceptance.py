"""When is a result accepted? One metric is never enough: a norm misses one wrong element, a maximum misses a small
error everywhere.

    Frobenius error against fp64   at most 1.1 × that of eager PyTorch in the same dtype (and at the same P)
    largest error against fp64     at most 2 × eager's
    NaN, shape, dtype              none, the same, the same
    small integers                 exactly the fp64 result, rounded once

Errors below rounding noise are not compared, for eager may be exact by luck: a quarter of the dtype's epsilon for the
store, and one of fp32's for the arithmetic, relative to the result or, where terms cancel, to the `noise` given. Four
of fp32's on a GPU: there an IEEE dot is one chain of K fused multiply-adds, and cuBLAS may cut K into slices, whose
shorter chains round less.
"""

import torch
from torch import Tensor

FP32_EPS = torch.finfo(torch.float32).eps


def assert_accurate(name: str, ours: Tensor, eager: Tensor, exact: Tensor, noise: Tensor | None = None) -> None:
    """Compare one tensor of any dtype with eager's in the same dtype and with the fp64 result.

    noise: for sums, √Σ term² of each element: the size at which a sum's roundings happen, whatever cancels in the end.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, expected {eager.dtype}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: {(~torch.isfinite(ours)).sum()} elements are not finite"
    eps = torch.finfo(ours.dtype).eps
    arithmetic = (4 if ours.is_cuda else 1) * FP32_EPS
    noise = exact.abs() if noise is None else noise
    error, eager_error = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    frobenius, eager_frobenius = error.norm().item(), eager_error.norm().item()
    limit = max(1.1 * eager_frobenius, 0.25 * eps * exact.norm().item() + arithmetic * noise.norm().item())
    assert frobenius <= limit, (
        f"{name}: Frobenius error {frobenius:.3e} exceeds {limit:.3e} (eager {eager_frobenius:.3e})"
    )
    largest, eager_largest = error.max().item(), eager_error.max().item()
    limit = max(2 * eager_largest, eps * exact.abs().max().item() + 4 * arithmetic * noise.max().item())
    assert largest <= limit, f"{name}: largest error {largest:.3e} exceeds {limit:.3e} (eager {eager_largest:.3e})"


def assert_exact(name: str, ours: Tensor, exact: Tensor) -> None:
    """Require the fp64 result rounded once to ours' dtype, bit for bit: for inputs whose fp32 sums do not round."""
    wrong = ours != exact.to(ours.dtype)
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, first at {wrong.nonzero()[0].tolist()}"
    )
