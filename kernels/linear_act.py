"""Compute Linear1's shard, its bias and the activation in one kernel.

    x        [M, K]  fp32|bf16|fp16, last dim contiguous; M tokens, K = H
    weight   [N, K]  same dtype; this rank's output features, N = F / P
    bias     [N]     same dtype, or None
    act      [M, N]  same dtype: act(x @ weight.T + bias)
    pre_act  [M, N]  same dtype: x @ weight.T + bias, for backward; only with save_pre_act

fp32 accumulation; bias and activation are applied to the fp32 accumulator; one rounding per stored tensor.

Source: epilogue fusion as in CUTLASS's "linear combination + activation" epilogues.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _launch
from ._tiles import add_row_vector, column_halves, gemm_tile, grouped_tile, store_tile
from .activations import activate


@triton.jit
def _bias_act_store(
    acc,
    bias_ptr,
    act,
    pre_act,
    row,
    col,
    M,
    N,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    if HAS_BIAS:
        acc = add_row_vector(acc, bias_ptr, col, N, BLOCK_N)
    if SAVE_PRE_ACT:
        store_tile(pre_act, acc, row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)
    store_tile(act, activate(acc, ACTIVATION), row, col, M, N, N, BLOCK_M, BLOCK_N, USE_TMA)


@triton.jit(do_not_specialize=["M"])
def linear_act_kernel(
    x,
    weight,
    bias_ptr,
    act,
    pre_act,
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
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act = activation(x @ weight.T + bias); x, weight, act, pre_act are pointers or descriptors (see _tiles)."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        x, weight, tile_m, tile_n, M, N, K, stride_x, stride_weight,
        False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    if SPLIT_EPILOGUE:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        _bias_act_store(
            left, bias_ptr, act, pre_act, row, col, M, N,
            ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, HALF_N, USE_TMA,
        )  # fmt: skip
        _bias_act_store(
            right, bias_ptr, act, pre_act, row, col + HALF_N, M, N,
            ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, HALF_N, USE_TMA,
        )  # fmt: skip
    else:
        _bias_act_store(
            acc, bias_ptr, act, pre_act, row, col, M, N,
            ACTIVATION, HAS_BIAS, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, USE_TMA,
        )  # fmt: skip


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    save_pre_act: bool,
    config: _configs.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `linear_act_kernel`; shapes as in the module docstring.

    Returns (act, pre_act); pre_act is an empty [0] tensor unless save_pre_act. `config` overrides the table.

    Raises: ValueError: shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    M, N, K = _launch.check_operands("linear_act", x, weight, trans_b=True)
    _launch.check_vector("linear_act bias", bias, N, like=x)
    act = x.new_empty((M, N))
    pre_act = x.new_empty((M, N) if save_pre_act else (0,))
    if M == 0:
        return act, pre_act
    config = config or _configs.select("linear_act", x, M, N, _launch.aligned(x, weight, act))
    tile_n = config.BLOCK_N // 2 if config.SPLIT_EPILOGUE else config.BLOCK_N
    operands = _launch.operands(
        config.USE_TMA,
        (x, (config.BLOCK_M, config.BLOCK_K)),
        (weight, (config.BLOCK_N, config.BLOCK_K)),
        (act, (config.BLOCK_M, tile_n)),
        (pre_act if save_pre_act else act, (config.BLOCK_M, tile_n)),
    )
    with _launch.on_device(x):
        linear_act_kernel[_launch.grid(config, M, N)](
            operands[0], operands[1], x if bias is None else bias, operands[2], operands[3],
            M, N, K, x.stride(0), weight.stride(0),
            ACTIVATION=activation, HAS_BIAS=bias is not None, SAVE_PRE_ACT=save_pre_act,
            PRECISION=_launch.precision(x.dtype), **config.meta,
        )  # fmt: skip
    return act, pre_act
