"""Compute Linear1's shard, its bias and the activation in one kernel.

    x        [M, K]  fp32|bf16|fp16, last dim contiguous; M tokens, K = H
    weight   [W, K]  same dtype; this rank's output features; W = N = F / P, or 2N where the activation is gated:
                     N gate rows above N up rows
    bias     [W]     same dtype, or None
    act      [M, N]  same dtype: act(x @ weight.T + bias); gated: f(gate) · up
    pre_act  [M, W]  same dtype: x @ weight.T + bias, for backward; only with save_pre_act

fp32 accumulation; bias and activation are applied to the fp32 accumulator; one rounding per stored tensor. A gated
program holds two accumulators, for the same N columns of gate and up, and loads each tile of x once for both.

Source: epilogue fusion as in CUTLASS's "linear combination + activation" epilogues.
"""

import torch
import triton
import triton.language as tl

from . import _configs
from ._inline_ptx import launch_dependents
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
from ._tiles import add_row_vector, column_parts, gemm_gate_and_up, gemm_tile, grouped_tile, store_tile
from .activations import GATED_ACTIVATIONS, activate, features, kernel_activation


@triton.jit
def act_tile(
    x,
    weight,
    act,
    pre_act,
    bias_ptr,
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute and store one tile of act = activation(x @ weight.T + bias), and of pre_act. STORE_BY_TMA: act is a
    descriptor; everything else is one with USE_TMA."""
    acc = gemm_tile(
        x, weight, tile_m, tile_n, M, N, 0, K, stride_x, stride_weight,
        False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    store_act(
        acc, act, pre_act, bias_ptr, tile_m, tile_n, M, N,
        ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, SPLIT_EPILOGUE, USE_TMA, STORE_BY_TMA,
    )  # fmt: skip


@triton.jit
def store_act(
    acc,
    act,
    pre_act,
    bias_ptr,
    tile_m,
    tile_n,
    M,
    N,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
):
    """Add the bias to a tile of x @ weight.T; store it as pre_act's, and activated as act's."""
    row = tile_m * BLOCK_M
    PARTS: tl.constexpr = 2 if SPLIT_EPILOGUE else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for i in tl.static_range(PARTS):
        part = parts[i]
        col = tile_n * BLOCK_N + i * PART_N
        if HAS_BIAS:
            part = add_row_vector(part, bias_ptr, col, N, PART_N)
        if SAVE_PRE_ACT:
            store_tile(pre_act, part, row, col, M, N, N, BLOCK_M, PART_N, USE_TMA)
        store_tile(act, activate(part, ACTIVATION), row, col, M, N, N, BLOCK_M, PART_N, STORE_BY_TMA)


@triton.jit
def gated_act_tile(
    x,
    weight,
    act,
    gate,
    up,
    bias_ptr,
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute and store one tile of act = f(x @ weight[:N].T + bias[:N]) · (x @ weight[N:].T + bias[N:]), and those of
    gate and up, the two halves of pre_act's columns; the rest is as in act_tile."""
    gate_acc, up_acc = gemm_gate_and_up(
        x, weight, tile_m, tile_n, M, N, 0, K, stride_x, stride_weight, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION
    )
    store_gated_act(
        gate_acc, up_acc, act, gate, up, bias_ptr, tile_m, tile_n, M, N,
        ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, USE_TMA, STORE_BY_TMA,
    )  # fmt: skip


@triton.jit
def store_gated_act(
    gate_acc,
    up_acc,
    act,
    gate,
    up,
    bias_ptr,
    tile_m,
    tile_n,
    M,
    N,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
):
    """Do with tiles of gate and up what store_act does with one."""
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    if HAS_BIAS:
        gate_acc = add_row_vector(gate_acc, bias_ptr, col, N, BLOCK_N)
        up_acc = add_row_vector(up_acc, bias_ptr + N, col, N, BLOCK_N)
    if SAVE_PRE_ACT:
        store_tile(gate, gate_acc, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA)
        store_tile(up, up_acc, row, col, M, N, 2 * N, BLOCK_M, BLOCK_N, USE_TMA)
    store_tile(act, activate(gate_acc, ACTIVATION) * up_acc, row, col, M, N, N, BLOCK_M, BLOCK_N, STORE_BY_TMA)


@triton.jit(do_not_specialize=["M"])
def linear_act_kernel(
    x,
    weight,
    act,
    pre_act,
    bias_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    HAS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act = activation(x @ weight.T + bias); x, weight, act, pre_act are pointers or descriptors (see _tiles)."""
    if HAS_DEPENDENT:
        launch_dependents()
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    act_tile(
        x, weight, act, pre_act, bias_ptr, tile_m, tile_n, M, N, K, stride_x, stride_weight,
        ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_EPILOGUE, USE_TMA, USE_TMA, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gated_linear_act_kernel(
    x,
    weight,
    act,
    gate,
    up,
    bias_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    HAS_DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act = f(gate) · up; gate and up are the two halves of pre_act's columns, each by itself: a tile of gate that
    reaches past N must not be stored over up."""
    if HAS_DEPENDENT:
        launch_dependents()
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    gated_act_tile(
        x, weight, act, gate, up, bias_ptr, tile_m, tile_n, M, N, K, stride_x, stride_weight,
        ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, USE_TMA, PRECISION,
    )  # fmt: skip


@prepared_once
def _prepare(x, weight, bias, activation, save_pre_act, has_dependent, arithmetic, config) -> tuple:
    """Return M, N, the width of pre_act, and the launch, if there is anything to compute."""
    x, weight = Operand(*x), Operand(*weight)
    M, width, K = check_operands("linear_act", x, weight, trans_b=True)
    if bias is not None:
        check_contiguous("linear_act bias", Operand(*bias), (width,), like=x)
    gated, N = activation in GATED_ACTIVATIONS, features("linear_act", activation, weight.shape)
    constant = kernel_activation(activation, x.dtype.itemsize)
    if M == 0 or N == 0:
        return M, N, width, None
    act = fresh(M, N, x)
    name = "gated_linear_act" if gated else "linear_act"
    config = configuration(name, config, M, N, K, x, weight, act)
    if gated and config.SPLIT_EPILOGUE:
        raise ValueError(f"linear_act: no split epilogue with {activation}, got {config}")
    half = Operand((M, N), (width, 1), x.dtype, x.device, 0)
    stored = (config.BLOCK_M, config.STORED_N)
    launch = Launch(
        gated_linear_act_kernel if gated else linear_act_kernel,
        grid(config, M, N),
        views=(
            (x, (config.BLOCK_M, config.BLOCK_K)),
            (weight, (config.BLOCK_N, config.BLOCK_K)),
            *((view, stored) for view in (act, *([half if save_pre_act else act] * (1 + gated)))),
        ),
        scalars=(M, N, K, x.strides[0], weight.strides[0]),
        constants=config.meta
        | {
            "ACTIVATION": constant,
            "HAS_BIAS": bias is not None,
            "SAVE_PRE_ACT": save_pre_act,
            "HAS_DEPENDENT": has_dependent,
            "PRECISION": _configs.PRECISION[arithmetic],
        },
    )
    return M, N, width, launch


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    save_pre_act: bool,
    config: _configs.Config | None = None,
    *,
    has_dependent: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch `linear_act_kernel` or `gated_linear_act_kernel`; shapes as in the module docstring.

    Returns (act, pre_act); pre_act is None unless save_pre_act. `config` overrides the table. has_dependent: the next
    launch may start before this one has ended (matmul.py's `dependent`).

    Raises: ValueError: an unknown activation; shapes, dtypes, devices, strides or a `config` that do not fit (the
    message shows them).
    """
    M, N, width, launch = _prepare(
        signature(x), signature(weight), signature(bias), activation, save_pre_act, has_dependent,
        _configs.arithmetic_of(x.dtype), config,
    )  # fmt: skip
    act = x.new_empty((M, N))
    pre_act = x.new_empty((M, width)) if save_pre_act else None
    if launch is not None:
        stored = act if pre_act is None else pre_act  # a launch has no argument that is absent
        up = () if width == N else (stored if pre_act is None else pre_act[:, N:],)
        launch(x, weight, act, stored, *up, x if bias is None else bias)
    return act, pre_act
