"""Evaluate each activation, and its derivative, on an fp32 accumulator.

    z    any block shape, fp32: the pre-activation x @ w1.T + b1
    act  same shape, fp32: act(z)
    d    same shape, fp32: act'(z)

    name        act(z)                               act'(z)
    gelu        z Φ(z), Φ the normal CDF by erf      Φ(z) + z φ(z)
    gelu_tanh   z σ(2u), u = √(2/π)(z + 0.044715 z³) σ + 2 z σ(1 − σ) √(2/π)(1 + 3·0.044715 z²)
    silu        z σ(z)                               σ + z σ(1 − σ)
    relu        max(z, 0)                            1 where z > 0, else 0
    relu2       max(z, 0)²                           2 max(z, 0)

`gelu` and `gelu_tanh` are what `torch.nn.functional.gelu` calls approximate="none" and "tanh"; 0.5(1 + tanh u) is
written σ(2u), which needs one exponential and no tanh.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (gelu); So et al., "Primer" (relu2).
"""

import triton
import triton.language as tl

PLAIN_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu2")


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))


@triton.jit
def _tanh_gate(z):
    return tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return act(z)."""
    tl.static_assert(
        ACTIVATION == "gelu"
        or ACTIVATION == "gelu_tanh"
        or ACTIVATION == "silu"
        or ACTIVATION == "relu"
        or ACTIVATION == "relu2"
    )
    if ACTIVATION == "gelu":
        act = z * _normal_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        act = z * _tanh_gate(z)
    elif ACTIVATION == "silu":
        act = z * tl.sigmoid(z)
    else:
        act = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu2":
            act = act * act
    return act


@triton.jit
def activate_with_derivative(z, ACTIVATION: tl.constexpr):
    """Return (act(z), act'(z)); the two share their transcendental part.

    Explicit fma: left to the compiler, which products fuse depends on whether the caller also stores act, and so would
    the bits of the derivative.
    """
    if ACTIVATION == "gelu":
        cdf = _normal_cdf(z)
        act = z * cdf
        # φ(z) through exp2: −z²/2 · log2(e)
        d = tl.fma(z * 0.3989422804014327, tl.exp2(z * z * -0.7213475204444817), cdf)
    elif ACTIVATION == "gelu_tanh":
        z2 = z * z
        gate = _tanh_gate(z)
        act = z * gate
        d = tl.fma(act * (1.0 - gate) * 1.5957691216057308, tl.fma(z2, 0.134145, 1.0), gate)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        act = z * gate
        d = tl.fma(act, 1.0 - gate, gate)
    else:
        act = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu2":
            d = 2.0 * act
            act = act * act
        else:
            d = tl.where(z <= 0.0, 0.0, 1.0)
    return act, d
