"""What the tests of kernels share: values to draw, and every configuration row there is."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from acceptance import assert_exact

from tpffn_triton.kernels._configs import TABLES, Config, odd_strides


def randn(*shape, dtype, device, seed=0):
    """Draw standard normal values that do not depend on the device."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31 + seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def integers(*shape, dtype, device, seed=0):
    """Draw from -5 ... 5: sums of their products are exact in fp32 and, mostly, not in 16 bits."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31 + seed)
    return torch.randint(-5, 6, shape, generator=generator).to(device, dtype)


def compare_exact(name, ours, eager, exact, noise=None):
    """Do what acceptance.assert_accurate does, for small integers."""
    assert_exact(name, ours, exact)


def rows_of(*kernels: str) -> list:
    """Return (kernel, arithmetic, config) of every row of these kernels, once where sm_80 and sm_90 share it."""
    found = {}
    for arch in ("sm_80", "sm_90"):
        for (kernel, arithmetic), rows in TABLES[arch].items():
            for config in (*rows, odd_strides(kernel, arithmetic)) if kernel in kernels else ():
                tile = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"
                name = f"{kernel}-{arithmetic}-{tile}-{'tma' if config.USE_TMA else 'ptr'}-w{config.num_warps}"
                found[kernel, arithmetic, config] = pytest.param(kernel, arithmetic, config, id=name)
    return [*found.values()]


@contextlib.contextmanager
def running(config: Config, arithmetic: str, device: str) -> Iterator[torch.dtype]:
    """Yield the dtype to try a row with, fp32 GEMMs set to its arithmetic; skips what this GPU cannot run."""
    if config.USE_TMA and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs compute capability 9.0")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield torch.bfloat16 if arithmetic == "16bit" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)
