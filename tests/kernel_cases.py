"""What tests of single kernels share: shapes, configurations, random operands."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from acceptance import assert_exact

from tpffn_triton.kernels._configs import TABLES, Config, odd_strides
from tpffn_triton.kernels.activations import halves
from tpffn_triton.reference import ACTIVATIONS as REFERENCE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# M, N, K: inside one tile of the smallest row, over several, and at odd strides that neither TMA nor cp.async takes.
SHAPES = {"smoke": (24, 40, 32), "tiles": (130, 152, 200), "odd": (67, 71, 45)}
# A pointer tile small enough that the shapes above need several in every direction.
TINY = Config(32, 32, 32, 4, 2)
TMA, SPLIT = replace(TINY, USE_TMA=True), replace(TINY, SPLIT_EPILOGUE=True)


def randn(*shape, dtype, device, seed=0):
    """Draw standard normal values that do not depend on the device."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31 + seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def integers(*shape, dtype, device, seed=0):
    """Draw from -5 ... 5: sums of their products are exact in fp32 and, mostly, not in 16 bits."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31 + seed)
    return torch.randint(-5, 6, shape, generator=generator).to(device, dtype)


def saturate_gates(t):
    """Move the gate columns of a tensor of signs, products of signs or zeros to ±64 and around, where gelu is exactly
    the identity or zero, so that geglu is exact too."""
    N = t.shape[-1] // 2
    t[..., :N] += 64 * (1 - 2 * (torch.arange(N, device=t.device) % 2)).to(t.dtype)


def compare_exact(name, ours, eager, exact, noise=None):
    """Do what acceptance.assert_accurate does, for small integers."""
    assert_exact(name, ours, exact)


def rows_of(*kernels: str) -> list:
    """Return (kernel, arithmetic, config) of every row of these kernels, once where sm_80 and sm_90 share it."""
    found = {}
    for arch in ("sm_80", "sm_90"):
        for (kernel, arithmetic), rows in TABLES[arch].items():
            odd = () if kernel.endswith("few_tokens") else (odd_strides(kernel, arithmetic),)
            for config in (*rows, *odd) if kernel in kernels else ():
                tile = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"
                name = f"{kernel}-{arithmetic}-{tile}-{'tma' if config.USE_TMA else 'ptr'}-w{config.num_warps}"
                name += f"-{config.SPLIT_K}_slices" if config.SPLIT_K > 1 else ""
                found[kernel, arithmetic, config] = pytest.param(kernel, arithmetic, config, id=name)
    return [*found.values()]


def need_sm_90(device: str, what: str) -> None:
    """Skip a test of `what` on an older GPU; the interpreter has everything."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip(f"{what}: needs compute capability 9.0")


@contextlib.contextmanager
def running(config: Config, arithmetic: str, device: str) -> Iterator[torch.dtype]:
    """Yield the dtype to try a row with, fp32 GEMMs set to its arithmetic; skips what this GPU cannot run."""
    if config.USE_TMA:
        need_sm_90(device, "TMA")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield torch.bfloat16 if arithmetic == "16bit" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


# M, K, N, H: one tile; several; and at odd strides.
FFN_SHAPES = {"smoke": (24, 32, 40, 32), "tiles": (130, 96, 152, 104), "odd": (67, 45, 71, 37)}
# Few tokens, several tiles of features and of outputs, in strides that TMA and cp.async take.
FEW_TOKENS = (24, 96, 160, 112)


def ffn_operands(draw, shape, activation, dtype, device) -> list:
    """Return x, w1, b1, w2, b2; integers are such that gated activations are exact too."""
    M, K, N, H = shape
    W = halves(activation) * N
    shapes = ((M, K), (W, K), (W,), (H, N), (H,))
    args = [draw(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]
    if draw is randn:
        args[1] /= K**0.5
        args[3] /= N**0.5
    elif W > N:
        args = [t.sign() for t in args]
        saturate_gates(args[2])
    return args


def ffn_results(args, activation) -> tuple:
    """Return (y, act, pre_act) by separate torch operations."""
    x, w1, b1, w2, b2 = args
    pre_act = F.linear(x, w1, b1)
    act = REFERENCE[activation](pre_act)
    return F.linear(act, w2, b2), act, pre_act


def assert_same(ours, others) -> None:
    """Require the same bits of every tensor; None is None."""
    for a, b in zip(ours, others, strict=True):
        assert a is b is None or torch.equal(a, b)
