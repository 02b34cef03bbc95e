"""The three GEMMs that need no activation: Linear2's shard, dgrad and wgrad.

    linear  y  [M, N] = a [M, K] @ weight [N, K].T + bias [N]   Linear2: a = hidden, K = F / P, N = H
    dgrad   dx [M, N] = dy [M, K] @ weight [K, N]               dx = d_pre @ w1
    wgrad   dw [N, K] = dy [M, N].T @ x [M, K]                  dw1 = d_pre.T @ x, dw2 = dy.T @ hidden
            or dw += dy.T @ x, with dw in fp32                  into a main_grad

fp32|bf16|fp16, one dtype throughout (but for the result, where asked for), last dims contiguous, M tokens; fp32
accumulation, one rounding at the store.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import _configs
from ._inline_ptx import wait_for_launch
from ._launch import (
    Launch,
    Operand,
    check_contiguous,
    check_dtype,
    check_matrix,
    check_operands,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
from ._tiles import add_row_vector, column_parts, gemm_tile, grouped_tile, load_tile, store_tile


@triton.jit
def _store(
    acc,
    out,
    row,
    col,
    M,
    N,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    PARTS: tl.constexpr = 2 if SPLIT_EPILOGUE else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for i in tl.static_range(PARTS):
        tile = parts[i]
        if ACCUMULATE:
            tile += load_tile(out, row, col + i * PART_N, M, N, N, BLOCK_M, PART_N, USE_TMA)
        store_tile(out, tile, row, col + i * PART_N, M, N, N, BLOCK_M, PART_N, USE_TMA)


@triton.jit
def matmul_tile(
    a,
    b,
    out,
    bias_ptr,
    tile_m,
    tile_n,
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
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute and store one tile of out [M, N] = a [M, K] @ b [K, N] (or [N, K].T with TRANS_B) + bias [N]."""
    acc = gemm_tile(
        a, b, tile_m, tile_n, M, N, 0, K, stride_a, stride_b,
        False, TRANS_B, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    col = tile_n * BLOCK_N
    if HAS_BIAS:
        acc = add_row_vector(acc, bias_ptr, col, N, BLOCK_N)
    _store(acc, out, tile_m * BLOCK_M, col, M, N, False, BLOCK_M, BLOCK_N, SPLIT_EPILOGUE, USE_TMA)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    a,
    b,
    out,
    bias_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    TRANS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [M, N] = a [M, K] @ b [K, N] (or [N, K].T with TRANS_B) + bias [N]; M is the tokens."""
    if IS_DEPENDENT:
        wait_for_launch()
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    matmul_tile(
        a, b, out, bias_ptr, tile_m, tile_n, M, N, K, stride_a, stride_b,
        TRANS_B, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_EPILOGUE, USE_TMA, PRECISION,
    )  # fmt: skip


@triton.jit
def wgrad_tile(
    tile,
    dy,
    x,
    dw,
    M,
    N,
    K,
    stride_dy,
    stride_x,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dw [N, K] = dy [M, N].T @ x [M, K], or += with ACCUMULATE: the tokens are the reduction, so
    BLOCK_M × BLOCK_N tiles cover [N, K] and BLOCK_K steps through M."""
    tile_m, tile_n = grouped_tile(tile, N, K, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        dy, x, tile_m, tile_n, N, K, 0, M, stride_dy, stride_x,
        True, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    _store(acc, dw, tile_m * BLOCK_M, tile_n * BLOCK_N, N, K, ACCUMULATE, BLOCK_M, BLOCK_N, SPLIT_EPILOGUE, USE_TMA)


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
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw [N, K] = dy [M, N].T @ x [M, K], or += with ACCUMULATE."""
    wgrad_tile(
        tl.program_id(0), dy, x, dw, M, N, K, stride_dy, stride_x,
        ACCUMULATE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_EPILOGUE, USE_TMA, PRECISION,
    )  # fmt: skip


class TorchGEMM:
    """torch's own GEMM (cuBLAS), where it was measured to be faster: called as a `Launch` of matmul_kernel or, with
    trans_a, of wgrad_kernel is. How it sums is cuBLAS's and torch.backends.cuda.matmul's affair."""

    def __init__(self, trans_a: bool, trans_b: bool, has_bias: bool = False) -> None:
        self.trans_a, self.trans_b, self.has_bias = trans_a, trans_b, has_bias

    def __call__(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: Any = None) -> None:
        """Write a @ b (+ bias) to out."""
        a, b = a.t() if self.trans_a else a, b.t() if self.trans_b else b
        with torch.no_grad():  # for out=
            if self.has_bias:
                torch.addmm(bias, a, b, out=out)
            else:
                torch.mm(a, b, out=out)


@prepared_once
def _prepare_matmul(name, a, b, bias, out, out_dtype, trans_b, dependent, arithmetic, config, by_torch) -> tuple:
    """Return M, N, and the launch, if there is anything to compute; out: where to, or None."""
    a, b = Operand(*a), Operand(*b)
    M, N, K = check_operands(name, a, b, trans_b=trans_b)
    if bias is not None:
        check_contiguous(f"{name} bias", Operand(*bias), (N,), like=a)
    check_dtype(f"{name} out", out_dtype)
    result = fresh(M, N, a, out_dtype)
    if out is not None:
        check_contiguous(f"{name} out", Operand(*out), (M, N), like=result)
        result = Operand(*out)
    if M == 0 or N == 0:
        return M, N, None
    by_torch = by_torch and config is None and out_dtype == a.dtype and not dependent
    if by_torch and _configs.faster_by_torch(name, a, M, N, K) is not None:
        return M, N, TorchGEMM(False, trans_b, bias is not None)
    config = configuration(name, config, M, N, K, a, b, result)
    launch = Launch(
        matmul_kernel,
        grid(config, M, N),
        views=(
            (a, (config.BLOCK_M, config.BLOCK_K)),
            (b, (config.BLOCK_N, config.BLOCK_K) if trans_b else (config.BLOCK_K, config.BLOCK_N)),
            (result, (config.BLOCK_M, config.STORED_N)),
        ),
        scalars=(M, N, K, a.strides[0], b.strides[0]),
        constants=config.meta
        | {
            "TRANS_B": trans_b,
            "HAS_BIAS": bias is not None,
            "IS_DEPENDENT": dependent,
            "PRECISION": _configs.PRECISION[arithmetic],
        }
        | ({"launch_pdl": True} if dependent else {}),  # an option on NVIDIA alone
    )
    return M, N, launch


def _matmul(name, a, b, bias, out, out_dtype, trans_b, config, by_torch, dependent=False):
    M, N, launch = _prepare_matmul(
        name,
        signature(a),
        signature(b),
        signature(bias),
        signature(out),
        out_dtype,
        trans_b,
        dependent,
        _configs.arithmetic_of(a.dtype),
        config,
        by_torch,
    )
    if out is None:
        out = a.new_empty((M, N), dtype=out_dtype)
    if launch is not None:
        launch(a, b, out, a if bias is None else bias)
    return out


def linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
    config: _configs.Config | None = None,
    *,
    by_torch: bool = True,
    dependent: bool = False,
) -> torch.Tensor:
    """Return a [M, K] @ weight [N, K].T + bias [N] (None: no bias) as [M, N] in out_dtype (None: a's).

    by_torch: torch's own GEMM takes its place where it was measured to be faster (_tuned.py).
    dependent: programmatic dependent launch: it may start before the previous launch of the stream, which must have
    been told so (linear_act's `has_dependent`), has ended, and waits for that before it reads anything.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    return _matmul("linear", a, weight, bias, None, out_dtype or a.dtype, True, config, by_torch, dependent)


def linear_into(
    out: torch.Tensor,
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: _configs.Config | None = None,
    *,
    by_torch: bool = True,
) -> None:
    """Write what `linear` returns to out, contiguous [M, N]; by_torch: as there.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    _matmul("linear", a, weight, bias, out, out.dtype, True, config, by_torch)


def dgrad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    config: _configs.Config | None = None,
    *,
    by_torch: bool = True,
) -> torch.Tensor:
    """Return dy [M, K] @ weight [K, N] as [M, N] in out_dtype (None: dy's); by_torch: as of `linear`.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    return _matmul("dgrad", dy, weight, None, None, out_dtype or dy.dtype, False, config, by_torch)


@prepared_once
def _prepare_wgrad(dy, x, dw, out_dtype, arithmetic, config, by_torch=False) -> tuple:
    """Return N, K, and the launch, if there is anything to compute; dw: what to add to, or None."""
    dy, x = Operand(*dy), Operand(*x)
    check_matrix("wgrad dy", dy)
    check_matrix("wgrad x", x, like=dy)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"wgrad: dy {tuple(dy.shape)} and x {tuple(x.shape)} differ in tokens (dim 0)")
    check_dtype("wgrad dw", out_dtype)
    (M, N), K = dy.shape, x.shape[1]
    out = fresh(N, K, dy, out_dtype)
    if dw is not None:
        check_contiguous("wgrad dw", Operand(*dw), (N, K), like=out._replace(dtype=torch.float32))
        out = Operand(*dw)
    if 0 in (M, N, K):
        return N, K, None
    by_torch = by_torch and config is None and out_dtype == dy.dtype
    if by_torch and _configs.faster_by_torch("wgrad", dy, N, K, M) is not None:
        return N, K, TorchGEMM(True, False)
    config = configuration("wgrad", config, N, K, M, dy, x, out)
    launch = Launch(
        wgrad_kernel,
        grid(config, N, K),
        views=(
            (dy, (config.BLOCK_K, config.BLOCK_M)),
            (x, (config.BLOCK_K, config.BLOCK_N)),
            (out, (config.BLOCK_M, config.STORED_N)),
        ),
        scalars=(M, N, K, dy.strides[0], x.strides[0]),
        constants=config.meta | {"ACCUMULATE": dw is not None, "PRECISION": _configs.PRECISION[arithmetic]},
    )
    return N, K, launch


def wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    config: _configs.Config | None = None,
    *,
    by_torch: bool = True,
) -> torch.Tensor:
    """Return dy [M, N].T @ x [M, K] as [N, K] in out_dtype (None: dy's); by_torch: as of `linear`.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    out_dtype = out_dtype or dy.dtype
    N, K, launch = _prepare_wgrad(
        signature(dy), signature(x), None, out_dtype, _configs.arithmetic_of(dy.dtype), config, by_torch
    )
    if launch is None:
        return dy.new_zeros((N, K), dtype=out_dtype)
    dw = dy.new_empty((N, K), dtype=out_dtype)
    launch(dy, x, dw)
    return dw


def wgrad_accumulate(
    dw: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, config: _configs.Config | None = None
) -> None:
    """Add dy [M, N].T @ x [M, K] to dw [N, K], contiguous fp32, in place.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    _, _, launch = _prepare_wgrad(
        signature(dy), signature(x), signature(dw), dw.dtype, _configs.arithmetic_of(dy.dtype), config
    )
    if launch is not None:
        launch(dy, x, dw)
