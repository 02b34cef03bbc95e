"""Compute the gradient at the pre-activation, and everything that is cheap beside it, in one kernel.

    dy          [M, K]  fp32|bf16|fp16, last dim contiguous; K = H
    weight      [K, N]  same dtype; this rank's input features of Linear2, N = F / P
    pre_act     [M, W]  same dtype, contiguous, as linear_act stored it; W = N, or 2N: gate and up columns
    d_pre       [M, W]  same dtype: (dy @ weight) ⊙ act'(pre_act)
    act         [M, N]  same dtype: act(pre_act), recomputed for Linear2's weight gradient
    db_partial  [cdiv(M, PARTIAL_ROWS), W] fp32: sums of each PARTIAL_ROWS rows of the unrounded d_pre

    gated       d_gate = (dy @ weight) ⊙ up ⊙ f'(gate)    d_up = (dy @ weight) ⊙ f(gate)    act = f(gate) ⊙ up

fp32 accumulation, one rounding per stored tensor. The partials are summed afterwards in a fixed order (weight_grads.py,
column_sum.py): no atomics, so the bias gradient has the same bits in every run. Their shape does not depend on the
configuration, for tracing has none.

Source: chain rule; recomputing act from pre_act is the memory trade Megatron-LM makes with activation recomputation.
"""

import torch
import triton
import triton.language as tl

from . import _configs
from ._launch import (
    Launch,
    Operand,
    check_contiguous,
    check_operands,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
from ._tiles import column_parts, gemm_tile, grouped_tile, load_tile, store_tile
from .activations import GATED_ACTIVATIONS, activate_with_derivative, kernel_activation

# Rows of d_pre that one row of db_partial sums; divides every BLOCK_M.
PARTIAL_ROWS = 32
_PARTIAL_ROWS = tl.constexpr(PARTIAL_ROWS)  # the same, for kernels


@triton.jit
def _store_partial_sums(tile, dst, row, col, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the sums of each PARTIAL_ROWS rows of the fp32 tile at (row, col) to dst, a pointer to N columns."""
    offs_m = row + tl.arange(0, BLOCK_M)
    # Rows past M hold another row's product on the pointer path: they must not reach the sum.
    rows = tl.where(offs_m[:, None] < M, tile, 0.0)
    PARTIALS: tl.constexpr = BLOCK_M // _PARTIAL_ROWS
    sums = tl.sum(tl.reshape(rows, (PARTIALS, _PARTIAL_ROWS, BLOCK_N)), axis=1)
    partials = tl.cdiv(M, _PARTIAL_ROWS)
    store_tile(dst, sums, row // _PARTIAL_ROWS, col, partials, N, stride, PARTIALS, BLOCK_N, False)


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
        _store_partial_sums(grad, db_partial_ptr, row, col, M, N, N, BLOCK_M, BLOCK_N)


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
        dy, weight, tile_m, tile_n, M, N, 0, K, stride_dy, stride_weight,
        False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    col = tile_n * BLOCK_N
    PARTS: tl.constexpr = 2 if SPLIT_EPILOGUE else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for i in tl.static_range(PARTS):
        _dact_store(
            parts[i], pre_act, d_pre, act, db_partial_ptr, tile_m, col + i * PART_N, M, N,
            ACTIVATION, STORE_ACT, STORE_DB, BLOCK_M, PART_N, USE_TMA,
        )  # fmt: skip


@triton.jit
def _gated_dact_store(
    acc,
    gate,
    up,
    d_gate,
    d_up,
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
    z = load_tile(gate, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA).to(tl.float32)
    value, derivative = activate_with_derivative(z, ACTIVATION)
    # First what does not need up: fewer tiles are alive at once.
    grad = acc * value
    acc *= derivative
    store_tile(d_up, grad, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA)
    if STORE_DB:
        _store_partial_sums(grad, db_partial_ptr + N, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N)
    factor = load_tile(up, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA).to(tl.float32)
    if STORE_ACT:
        store_tile(act, value * factor, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)
    grad = acc * factor
    store_tile(d_gate, grad, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA)
    if STORE_DB:
        _store_partial_sums(grad, db_partial_ptr, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def gated_linear_dact_kernel(
    dy,
    weight,
    gate,
    up,
    d_gate,
    d_up,
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
    """d_gate, d_up: the two halves of d_pre's columns, as gate and up are pre_act's (see linear_act)."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        dy, weight, tile_m, tile_n, M, N, 0, K, stride_dy, stride_weight,
        False, False, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    col = tile_n * BLOCK_N
    PARTS: tl.constexpr = 2 if SPLIT_EPILOGUE else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for i in tl.static_range(PARTS):
        _gated_dact_store(
            parts[i], gate, up, d_gate, d_up, act, db_partial_ptr, tile_m, col + i * PART_N, M, N,
            ACTIVATION, STORE_ACT, STORE_DB, BLOCK_M, PART_N, USE_TMA,
        )  # fmt: skip


@prepared_once
def _prepare(dy, weight, pre_act, activation, need_act, need_db, arithmetic, config) -> tuple:
    """Return M, N, the width of pre_act, and the launch, if there is anything to compute."""
    dy, weight, pre_act = Operand(*dy), Operand(*weight), Operand(*pre_act)
    M, N, K = check_operands("linear_dact", dy, weight, trans_b=False)
    gated = activation in GATED_ACTIVATIONS
    width = 2 * N if gated else N
    check_contiguous("linear_dact pre_act", pre_act, (M, width), like=dy)
    constant = kernel_activation(activation, dy.dtype.itemsize)
    if M == 0 or N == 0:
        return M, N, width, None
    act = fresh(M, N, dy)
    name = "gated_linear_dact" if gated else "linear_dact"
    config = configuration(name, config, M, N, K, dy, weight, pre_act, act)
    if config.BLOCK_M % PARTIAL_ROWS:
        raise ValueError(f"{name}: BLOCK_M must be a multiple of {PARTIAL_ROWS}, got {config.BLOCK_M}")
    half = Operand((M, N), (width, 1), dy.dtype, dy.device, 0)
    stored = (config.BLOCK_M, config.STORED_N)
    launch = Launch(
        gated_linear_dact_kernel if gated else linear_dact_kernel,
        grid(config, M, N),
        views=(
            (dy, (config.BLOCK_M, config.BLOCK_K)),
            (weight, (config.BLOCK_K, config.BLOCK_N)),
            *[(half, stored)] * (4 if gated else 2),
            (act if need_act else half, stored),
        ),
        scalars=(M, N, K, dy.strides[0], weight.strides[0]),
        constants=config.meta
        | {
            "ACTIVATION": constant,
            "STORE_ACT": need_act,
            "STORE_DB": need_db,
            "PRECISION": _configs.PRECISION[arithmetic],
        },
    )
    return M, N, width, launch


def linear_dact(
    dy: torch.Tensor,
    weight: torch.Tensor,
    pre_act: torch.Tensor,
    activation: str,
    need_act: bool,
    need_db: bool,
    config: _configs.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch `linear_dact_kernel` or `gated_linear_dact_kernel`; shapes as in the module docstring.

    Returns (d_pre [M, W], act [M, N] or None, db_partial [cdiv(M, PARTIAL_ROWS), W] or None). `config` overrides the
    table.

    Raises: ValueError: an unknown activation; shapes, dtypes, devices, strides or a `config` that do not fit (the
    message shows them).
    """
    M, N, width, launch = _prepare(
        signature(dy), signature(weight), signature(pre_act), activation, need_act, need_db,
        _configs.arithmetic_of(dy.dtype), config,
    )  # fmt: skip
    d_pre = dy.new_empty((M, width))
    act = dy.new_empty((M, N)) if need_act else None
    db_partial = dy.new_empty((triton.cdiv(M, PARTIAL_ROWS), width), dtype=torch.float32) if need_db else None
    if launch is not None:
        halves = (pre_act, d_pre) if width == N else (pre_act, pre_act[:, N:], d_pre, d_pre[:, N:])
        # A launch has no argument that is absent.
        launch(dy, weight, *halves, d_pre if act is None else act, dy if db_partial is None else db_partial)
    return d_pre, act, db_partial
