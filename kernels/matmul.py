"""The three GEMMs that need no activation: Linear2's shard, dgrad and wgrad.

    linear  y  [M, N] = a [M, K] @ weight [N, K].T + bias [N]   Linear2: a = hidden, K = F / P, N = H
    dgrad   dx [M, N] = dy [M, K] @ weight [K, N]               dx = d_pre @ w1
    wgrad   dw [N, K] = dy [M, N].T @ x [M, K]                  dw1 = d_pre.T @ x, dw2 = dy.T @ hidden

fp32|bf16|fp16, one dtype throughout, last dims contiguous, M tokens; fp32 accumulation, one rounding at the store.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _launch
from ._tiles import add_row_vector, column_halves, gemm_tile, grouped_tile, store_tile


@triton.jit
def _store(
    acc,
    bias_ptr,
    out,
    tile_m,
    tile_n,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    if HAS_BIAS:
        acc = add_row_vector(acc, bias_ptr, col, N, BLOCK_N)
    if SPLIT_EPILOGUE:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        store_tile(out, left, row, col, M, N, N, BLOCK_M, HALF_N, USE_TMA)
        store_tile(out, right, row, col + HALF_N, M, N, N, BLOCK_M, HALF_N, USE_TMA)
    else:
        store_tile(out, acc, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    a,
    b,
    bias_ptr,
    out,
    M,
    N,
    K,
    stride_a,
    stride_b,
    TRANS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [M, N] = a [M, K] @ b [K, N] (or [N, K].T with TRANS_B) + bias [N]; M is the tokens."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        a, b, tile_m, tile_n, M, N, K, stride_a, stride_b,
        False, TRANS_B, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    _store(
        acc, bias_ptr, out, tile_m, tile_n, M, N,
        HAS_BIAS, BLOCK_M, BLOCK_N, SPLIT_EPILOGUE, USE_TMA,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def wgrad_kernel(
    dy,
    x,
    dw,
    M,
    N,
    K,
    stride_dy,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw [N, K] = dy [M, N].T @ x [M, K]: the tokens are the reduction, so BLOCK_M × BLOCK_N tiles cover [N, K] and
    BLOCK_K steps through M."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), N, K, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        dy, x, tile_m, tile_n, N, K, M, stride_dy, stride_x,
        True, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    _store(
        acc, dw, dw, tile_m, tile_n, N, K,
        False, BLOCK_M, BLOCK_N, SPLIT_EPILOGUE, USE_TMA,
    )  # fmt: skip


def _matmul(name, a, b, bias, trans_b, config):
    M, N, K = _launch.check_operands(name, a, b, trans_b=trans_b)
    _launch.check_vector(f"{name} bias", bias, N, like=a)
    out = a.new_empty((M, N))
    if M == 0:
        return out
    config = config or _configs.select(name, a, M, N, _launch.aligned(a, b, out))
    b_block = (config.BLOCK_N, config.BLOCK_K) if trans_b else (config.BLOCK_K, config.BLOCK_N)
    operands = _launch.operands(
        config.USE_TMA,
        (a, (config.BLOCK_M, config.BLOCK_K)),
        (b, b_block),
        (out, (config.BLOCK_M, config.BLOCK_N // 2 if config.SPLIT_EPILOGUE else config.BLOCK_N)),
    )
    with _launch.on_device(a):
        matmul_kernel[_launch.grid(config, M, N)](
            operands[0], operands[1], a if bias is None else bias, operands[2],
            M, N, K, a.stride(0), b.stride(0), TRANS_B=trans_b, HAS_BIAS=bias is not None,
            PRECISION=_launch.precision(a.dtype), **config.meta,
        )  # fmt: skip
    return out


def linear(
    a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: _configs.Config | None = None
) -> torch.Tensor:
    """Return a [M, K] @ weight [N, K].T + bias [N] (None: no bias) as [M, N].

    Raises: ValueError: shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    return _matmul("linear", a, weight, bias, True, config)


def dgrad(dy: torch.Tensor, weight: torch.Tensor, config: _configs.Config | None = None) -> torch.Tensor:
    """Return dy [M, K] @ weight [K, N] as [M, N].

    Raises: ValueError: shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    return _matmul("dgrad", dy, weight, None, False, config)


def wgrad(dy: torch.Tensor, x: torch.Tensor, config: _configs.Config | None = None) -> torch.Tensor:
    """Return dy [M, N].T @ x [M, K] as [N, K].

    Raises: ValueError: shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    _launch.check_matrix("wgrad dy", dy)
    _launch.check_matrix("wgrad x", x, like=dy)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"wgrad: dy {tuple(dy.shape)} and x {tuple(x.shape)} differ in tokens (dim 0)")
    (M, N), K = dy.shape, x.shape[1]
    if M == 0:
        return dy.new_zeros((N, K))
    dw = dy.new_empty((N, K))
    config = config or _configs.select("wgrad", dy, N, K, _launch.aligned(dy, x, dw))
    operands = _launch.operands(
        config.USE_TMA,
        (dy, (config.BLOCK_K, config.BLOCK_M)),
        (x, (config.BLOCK_K, config.BLOCK_N)),
        (dw, (config.BLOCK_M, config.BLOCK_N // 2 if config.SPLIT_EPILOGUE else config.BLOCK_N)),
    )
    with _launch.on_device(dy):
        wgrad_kernel[_launch.grid(config, N, K)](
            *operands, M, N, K, dy.stride(0), x.stride(0),
            PRECISION=_launch.precision(dy.dtype), **config.meta,
        )  # fmt: skip
    return dw
