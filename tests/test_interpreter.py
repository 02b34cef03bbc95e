"""The interpreter's bf16, after our repair: products, rounding, constants and arithmetic as on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from tpffn_triton import interpreter

pytestmark = pytest.mark.cpu_only
interpreter.install()


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs[:, None]) * N + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + offs[:, None] * N + offs[None, :], acc)


@triton.jit
def inline_kernel(x_ptr, ASM: tl.constexpr):
    tl.inline_asm_elementwise(ASM, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(x_ptr, 1.0)


@triton.jit
def round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, tl.where(x > y, x + y, x * y))
    tl.store(out_ptr + N + offs, tl.full((N,), 3.0, tl.bfloat16) * x - y)


def test_this_process_interprets():
    assert interpreter.interpreting()


def test_a_launch_inside_of_another():
    """Each patches triton's language, and takes its own patches back alone."""
    x, y, inner = torch.ones(16), torch.empty(16), torch.empty(16)

    def grid(_):
        round_kernel[(1,)](x, inner, 16)
        return (1,)

    for _ in range(2):
        round_kernel[grid](x, y.zero_(), 16)
        assert torch.equal(y, x)
        assert torch.equal(inner, x)
        inner.zero_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype):
    a, b, out = torch.randn(16, 48).to(dtype), torch.randn(48, 16).to(dtype), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 48, 16, "ieee")
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_loses_bits_and_ieee_does_not():
    a, b = torch.full((16, 16), 1 + 2**-12), torch.eye(16)
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16, 16, "ieee")
    assert torch.equal(out, a)
    dot_kernel[(1,)](a, b, out, 16, 16, "tf32")
    assert torch.equal(out, torch.ones(16, 16))


def test_rounding_is_to_nearest_even():
    """Ties, subnormals, overflow to infinity and NaN, all as torch rounds."""
    x = torch.randn(1024) * torch.logspace(-40, 38, 1024, dtype=torch.float64).float()
    x[:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, float("inf"), float("nan"), 1e-40])
    y = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, 1024)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(1024)
    round_kernel[(1,)](y, back, 1024)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_and_constants():
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.empty(128, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, 64)
    assert torch.equal(out[:64], torch.where(x > y, x + y, x * y))
    assert torch.equal(out[64:], 3 * x - y)


def test_inline_ptx_that_only_orders_memory_is_passed_over():
    x = torch.zeros(1)
    inline_kernel[(1,)](x, "fence.proxy.async; // dummy $0")
    assert x.item() == 1
    x.zero_()
    with pytest.raises(Exception, match="inline_asm not supported"):
        inline_kernel[(1,)](x, "mov.u32 $0, 7;")
    assert x.item() == 0
