"""Compute the gradient at the pre-activation, and everything that is cheap beside it, in one kernel.

    dy          [M, K]  fp32|bf16|fp16, last dim contiguous; K = H
    weight      [K, N]  same dtype; this rank's input features of Linear2, N = F / P
    pre_act     [M, N]  same dtype, contiguous, as linear_act stored it
    d_pre       [M, N]  same dtype: (dy @ weight) ⊙ act'(pre_act)
    act         [M, N]  same dtype: act(pre_act), recomputed for Linear2's weight gradient
    db_partial  [cdiv(M, BLOCK_M), N] fp32: column sums of the unrounded d_pre, one row per row of tiles

fp32 accumulation, one rounding per stored tensor. The partials are summed afterwards in a fixed order
(column_sum.py): no atomics, so the bias gradient has the same bits in every run.

Source: chain rule; recomputing act from pre_act is the memory trade Megatron-LM makes with activation recomputation.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _launch
from ._tiles import column_halves, gemm_tile, grouped_tile, load_tile, store_tile
from .activations import activate_with_derivative
from .column_sum import column_sum


@triton.jit
def _dact_store(
    acc,
    pre_act,
    d_pre,
    act,
    db_partial_ptr,
    tile_m,
    col,
    M,
    N,
    ACTIVATION: tl.constexpr,
    STORE_ACT: tl.constexpr,
    STORE_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    row = tile_m * BLOCK_M
    z = load_tile(pre_act, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA).to(tl.float32)
    value, derivative = activate_with_derivative(z, ACTIVATION)
    if STORE_ACT:
        store_tile(act, value, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)
    grad = acc * derivative
    store_tile(d_pre, grad, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)
    if STORE_DB:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        # Rows past M hold another row's product on the pointer path: they must not reach the sum.
        rows = tl.where(offs_m[:, None] < M, grad, 0.0)
        tl.store(db_partial_ptr + tile_m.to(tl.int64) * N + offs_n, tl.sum(rows, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M"])
def linear_dact_kernel(
    dy,
    weight,
    pre_act,
    d_pre,
    act,
    db_partial_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_weight,
    ACTIVATION: tl.constexpr,
    STORE_ACT: tl.constexpr,
    STORE_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_pre = (dy @ weight) ⊙ act'(pre_act); tensors are pointers or descriptors (see _tiles)."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        dy, weight, tile_m, tile_n, M, N, K, stride_dy, stride_weight,
        False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    col = tile_n * BLOCK_N
    if SPLIT_EPILOGUE:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        _dact_store(
            left, pre_act, d_pre, act, db_partial_ptr, tile_m, col, M, N,
            ACTIVATION, STORE_ACT, STORE_DB, BLOCK_M, HALF_N, USE_TMA,
        )  # fmt: skip
        _dact_store(
            right, pre_act, d_pre, act, db_partial_ptr, tile_m, col + HALF_N, M, N,
            ACTIVATION, STORE_ACT, STORE_DB, BLOCK_M, HALF_N, USE_TMA,
        )  # fmt: skip
    else:
        _dact_store(
            acc, pre_act, d_pre, act, db_partial_ptr, tile_m, col, M, N,
            ACTIVATION, STORE_ACT, STORE_DB, BLOCK_M, BLOCK_N, USE_TMA,
        )  # fmt: skip


def linear_dact(
    dy: torch.Tensor,
    weight: torch.Tensor,
    pre_act: torch.Tensor,
    activation: str,
    need_act: bool,
    need_db: bool,
    config: _configs.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `linear_dact_kernel` and the second pass of the bias gradient; shapes as in the module docstring.

    Returns (d_pre [M, N], act [M, N] or [0], db [N] or [0]), all in dy's dtype. `config` overrides the table.

    Raises: ValueError: shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    M, N, K = _launch.check_operands("linear_dact", dy, weight, trans_b=False)
    _launch.check_like("linear_dact pre_act", pre_act, (M, N), like=dy)
    d_pre = dy.new_empty((M, N))
    act = dy.new_empty((M, N) if need_act else (0,))
    if M == 0:
        return d_pre, act, dy.new_zeros((N if need_db else 0,))
    config = config or _configs.select("linear_dact", dy, M, N, _launch.aligned(dy, weight, pre_act, d_pre))
    db_partial = dy.new_empty((triton.cdiv(M, config.BLOCK_M), N) if need_db else (0, N), dtype=torch.float32)
    tile_n = config.BLOCK_N // 2 if config.SPLIT_EPILOGUE else config.BLOCK_N
    operands = _launch.operands(
        config.USE_TMA,
        (dy, (config.BLOCK_M, config.BLOCK_K)),
        (weight, (config.BLOCK_K, config.BLOCK_N)),
        (pre_act, (config.BLOCK_M, tile_n)),
        (d_pre, (config.BLOCK_M, tile_n)),
        (act if need_act else d_pre, (config.BLOCK_M, tile_n)),
    )
    with _launch.on_device(dy):
        linear_dact_kernel[_launch.grid(config, M, N)](
            *operands, db_partial, M, N, K, dy.stride(0), weight.stride(0),
            ACTIVATION=activation, STORE_ACT=need_act, STORE_DB=need_db,
            PRECISION=_launch.precision(dy.dtype), **config.meta,
        )  # fmt: skip
    db = column_sum(db_partial, dy.dtype) if need_db else dy.new_empty((0,))
    return d_pre, act, db
