"""Evaluate each activation, and its derivative, on an fp32 accumulator.

    z    any block shape, fp32: the pre-activation x @ w1.T + b1, or its gate columns
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

A gated activation takes twice the columns, gate and up, and returns f(gate) · up with f one of the above: geglu (gelu),
geglu_tanh (gelu_tanh), swiglu (silu).

In kernels gelu has a second form, "gelu_16bit", for results stored in bf16 or fp16: Φ by formula 7.1.26, within 3e-7 of
the true value, rounding in fp32 included; far below zero it is closer than 0.5(1 + erf), which cancels there. It costs
one reciprocal and the exponential that the derivative needs anyway, where erf is two polynomials and a branch.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (gelu); So et al., "Primer" (relu2); Shazeer, "GLU Variants
Improve Transformer" (gated); Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26.
"""

import triton
import triton.language as tl

PLAIN_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu2")
# Name of each gated activation, and of the plain one that its gate goes through.
GATED_ACTIVATIONS = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}
ACTIVATIONS = (*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS)


def halves(activation: str) -> int:
    """Return how many stacks of F rows w1 has: 2 (gate and up) where the activation is gated, else 1."""
    return 2 if activation in GATED_ACTIVATIONS else 1


def features(name: str, activation: str, weight: tuple[int, ...]) -> int:
    """Return the features of act where Linear1's weight has this shape, [W, K]; name: what the message calls it.

    Raises: ValueError: an odd number of rows where the activation is gated.
    """
    stacks = halves(activation)
    if weight[0] % stacks:
        raise ValueError(f"{name}: {activation} takes gate and up rows, got an odd number: {tuple(weight)}")
    return weight[0] // stacks


def kernel_activation(activation: str, itemsize: int) -> str:
    """Return the ACTIVATION constant of a kernel that stores elements of `itemsize` bytes: the gate's, if gated.

    Raises: ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    plain = GATED_ACTIVATIONS.get(activation, activation)
    return "gelu_16bit" if plain == "gelu" and itemsize == 2 else plain


@triton.jit
def _normal_cdf(z, ACTIVATION: tl.constexpr):
    """Return Φ(z) and exp(−z²/2)."""
    # −z²/2 · log2(e)
    exp = tl.exp2(z * z * -0.7213475204444817)
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
    else:
        # The formula's p divided by √2 and its coefficients by 2: erf's argument is z/√2, and Φ is half of 1 + erf.
        t = 1.0 / tl.fma(tl.abs(z), 0.231641888, 1.0)
        poly = tl.fma(t, 0.5307027145, -0.7265760135)
        poly = tl.fma(t, poly, 0.7107068705)
        poly = tl.fma(t, poly, -0.142248368)
        poly = tl.fma(t, poly, 0.127414796)
        upper = t * poly * exp
        cdf = tl.where(z >= 0.0, 1.0 - upper, upper)
    return cdf, exp


@triton.jit
def _tanh_gate(z):
    return tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return act(z)."""
    if ACTIVATION == "gelu" or ACTIVATION == "gelu_16bit":
        cdf, _ = _normal_cdf(z, ACTIVATION)
        act = z * cdf
    elif ACTIVATION == "gelu_tanh":
        act = z * _tanh_gate(z)
    elif ACTIVATION == "silu":
        act = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
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
    if ACTIVATION == "gelu" or ACTIVATION == "gelu_16bit":
        cdf, exp = _normal_cdf(z, ACTIVATION)
        act = z * cdf
        d = tl.fma(z * 0.3989422804014327, exp, cdf)
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
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        act = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "relu2":
            d = 2.0 * act
            act = act * act
        else:
            d = tl.where(z <= 0.0, 0.0, 1.0)
    return act, d
