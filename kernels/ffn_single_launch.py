"""Compute both GEMMs, their biases and the activation in one launch; act passes from one GEMM to the other through L2.

    x        [M, K]  fp32|bf16|fp16, last dim contiguous; M tokens, K = H
    w1       [W, K]  same dtype; W = N = F / P, or 2N where the activation is gated: N gate rows above N up rows
    b1       [W]     same dtype, or None
    w2, b2   [H, N]  same dtype; [H], or None
    act      [M, N]  same dtype: act(x @ w1.T + b1)
    pre_act  [M, W]  same dtype: x @ w1.T + b1; only with save_pre_act
    y        [M, H]  out_dtype: act @ w2.T + b2

Stage 1 is the tiles of act, stage 2 those of y; a row block is BLOCK_M rows. A program takes one ticket, and with it
one tile, in an order in which a row block's tiles of stage 1 come before those of stage 2. So whoever waits, waits for
programs that have started and that wait for nobody: there is no deadlock, however few programs run at once.

    counters[0]        tickets taken
    counters[1 + m]    of row block m: tiles of act that are visible; then, beyond those, tiles of y that are done

    stage 1   store the tile; barrier; counters[1 + m] += 1 (release)
    stage 2   until counters[1 + m] (acquire) ≥ tiles of act in a row block: read again
              compute the tile; counters[1 + m] += 1

All counters are zero before a launch, and again after it: who takes the last ticket, and who is the last out of a row
block, sets that counter back. What is stored is what linear_act and linear store with the same tiles, bit for bit.

Source: dependency-ordered tickets as in stream-K's and look-back scans' (Merrill and Garland, "Single-pass Parallel
Prefix Scan with Decoupled Look-back"); release and acquire as in the PTX memory model.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import _configs, _counters
from ._inline_ptx import fence_async_proxy
from ._launch import (
    Launch,
    Operand,
    check_contiguous,
    check_dtype,
    check_operands,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
from ._tiles import grouped_tile
from .activations import GATED_ACTIVATIONS, features, kernel_activation
from .linear_act import act_tile, gated_act_tile
from .matmul import matmul_tile


@triton.jit
def tile_of_ticket(ticket, M, N, H, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Map a ticket to (stage, tile_m, tile_n): GROUP_M row blocks at a time, and stage 2 of a group after stage 1 of
    the next one, so that what it waits for is done, and act still in L2."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    act_tiles = tl.cdiv(N, BLOCK_N)
    y_tiles = tl.cdiv(H, BLOCK_N)
    # After stage 1 of group 0 come rounds: stage 1 of group g + 1, stage 2 of group g. The last round ends with stage 2
    # of its both groups.
    i = ticket - tl.minimum(row_blocks, GROUP_M) * act_tiles
    tiles_of_round = GROUP_M * (act_tiles + y_tiles)
    last_round = tl.maximum(tl.cdiv(row_blocks, GROUP_M) - 2, 0)
    g = tl.minimum(tl.maximum(i, 0) // tiles_of_round, last_round)
    i -= g * tiles_of_round
    next_rows = tl.minimum(tl.maximum(row_blocks - (g + 1) * GROUP_M, 0), GROUP_M)
    if i < next_rows * act_tiles:
        stage = 1
        # Negative: before the rounds.
        pid = tl.where(i < 0, ticket, (g + 1) * GROUP_M * act_tiles + i)
        tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    else:
        stage = 2
        pid = g * GROUP_M * y_tiles + i - next_rows * act_tiles
        tile_m, tile_n = grouped_tile(pid, M, H, BLOCK_M, BLOCK_N, GROUP_M)
    return stage, tile_m, tile_n


@triton.jit
def publish(counter_ptr, USE_TMA: tl.constexpr):
    """Count a tile that this program has stored, once all of its threads have."""
    if USE_TMA:
        # It is read by TMA.
        fence_async_proxy()
    # Triton 3.6 puts no barrier between other threads' stores and one thread's release.
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_tiles(counter_ptr, act_tiles, USE_TMA: tl.constexpr):
    """Wait for all tiles of a row block of act."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < act_tiles:
        pass
    if USE_TMA:
        fence_async_proxy()


@triton.jit
def leave(counter_ptr, act_tiles, y_tiles):
    """Count a tile of y; the last of a row block sets its counter back. Nobody waits for it any more."""
    before = tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
    if before == act_tiles + y_tiles - 1:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=["M"])
def ffn_kernel(
    x,
    w1,
    w2,
    act,
    y,
    pre_act,
    up,
    act_ptr,
    b1_ptr,
    b2_ptr,
    counters_ptr,
    M,
    N,
    K,
    H,
    stride_x,
    stride_w1,
    stride_w2,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    SAVE_PRE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = act @ w2.T + b2, act = activation(x @ w1.T + b1). The tensors up to `up` are pointers or descriptors (see
    _tiles); act_ptr is act; pre_act and up are the two halves of pre_act's columns, or, where nothing is gated, pre_act
    the whole and up unused."""
    act_tiles = tl.cdiv(N, BLOCK_N)
    y_tiles = tl.cdiv(H, BLOCK_N)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.cdiv(M, BLOCK_M) * (act_tiles + y_tiles) - 1:
        tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")
    stage, tile_m, tile_n = tile_of_ticket(ticket, M, N, H, BLOCK_M, BLOCK_N, GROUP_M)
    counter_ptr = counters_ptr + 1 + tile_m
    if stage == 1:
        # Not stored by TMA: such a store is not visible to others before the kernel ends.
        if GATED:
            gated_act_tile(
                x, w1, act_ptr, pre_act, up, b1_ptr, tile_m, tile_n, M, N, K, stride_x, stride_w1,
                ACTIVATION, HAS_B1, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, False, PRECISION,
            )  # fmt: skip
        else:
            act_tile(
                x, w1, act_ptr, pre_act, b1_ptr, tile_m, tile_n, M, N, K, stride_x, stride_w1,
                ACTIVATION, HAS_B1, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_EPILOGUE, USE_TMA, False, PRECISION,
            )  # fmt: skip
        publish(counter_ptr, USE_TMA)
    else:
        wait_for_tiles(counter_ptr, act_tiles, USE_TMA)
        matmul_tile(
            act, w2, y, b2_ptr, tile_m, tile_n, M, H, N, N, stride_w2,
            True, HAS_B2, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_EPILOGUE, USE_TMA, PRECISION,
        )  # fmt: skip
        leave(counter_ptr, act_tiles, y_tiles)


def check_ffn(
    x: Operand, w1: Operand, b1: tuple | None, w2: Operand, b2: tuple | None, activation: str, out_dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Return M, N, W, K, H of these operands; biases: signatures.

    Raises: ValueError: what does not fit, an unknown activation, a dim of size 0 (the message shows them).
    """
    M, W, K = check_operands("ffn Linear1", x, w1, trans_b=True)
    N = features("ffn w1", activation, w1.shape)
    _, H, _ = check_operands("ffn Linear2", fresh(M, N, x), w2, trans_b=True)
    for name, bias, width in (("b1", b1, W), ("b2", b2, H)):
        if bias is not None:
            check_contiguous(f"ffn {name}", Operand(*bias), (width,), like=x)
    check_dtype("ffn out", out_dtype)
    if 0 in (M, N, H):
        raise ValueError(f"ffn: nothing to launch with {M} tokens, {N} features and {H} outputs")
    kernel_activation(activation, x.dtype.itemsize)
    return M, N, W, K, H


def launch_of_both(
    kernel: Any,
    programs: int,
    config: _configs.Config,
    matrices: tuple[Operand, ...],
    biases: tuple[Any, Any],
    activation: str,
    save_pre_act: bool,
    arithmetic: str,
) -> Launch:
    """Return the launch of a kernel that computes both GEMMs: its tensors are x, w1, w2, act, y (`matrices`), pre_act
    and up, then pointers; its integers M, N, K, H and the row strides of x, w1 and w2."""
    x, w1, w2, act, y = matrices
    weight_tile, stored_tile = (config.BLOCK_N, config.BLOCK_K), (config.BLOCK_M, config.STORED_N)
    half = Operand(act.shape, (w1.shape[0], 1), x.dtype, x.device, 0) if save_pre_act else act
    return Launch(
        kernel,
        (programs, 1, 1),
        views=(
            (x, (config.BLOCK_M, config.BLOCK_K)),
            (w1, weight_tile),
            (w2, weight_tile),
            (act, (config.BLOCK_M, config.BLOCK_K)),
            (y, stored_tile),
            (half, stored_tile),
            (half, stored_tile),
        ),
        scalars=(*act.shape, x.shape[1], y.shape[1], x.strides[0], w1.strides[0], w2.strides[0]),
        constants=config.meta
        | {
            "ACTIVATION": kernel_activation(activation, x.dtype.itemsize),
            "GATED": activation in GATED_ACTIVATIONS,
            "HAS_B1": biases[0] is not None,
            "HAS_B2": biases[1] is not None,
            "SAVE_PRE_ACT": save_pre_act,
            "PRECISION": _configs.PRECISION[arithmetic],
        },
    )


@prepared_once
def _prepare(x, w1, b1, w2, b2, activation, save_pre_act, out_dtype, arithmetic, config) -> tuple:
    """Return M, N, W, H, the number of counters, and the launch."""
    x, w1, w2 = Operand(*x), Operand(*w1), Operand(*w2)
    M, N, W, K, H = check_ffn(x, w1, b1, w2, b2, activation, out_dtype)
    gated = activation in GATED_ACTIVATIONS
    matrices = x, w1, w2, fresh(M, N, x), fresh(M, H, x, out_dtype)
    config = configuration("gated_ffn" if gated else "ffn", config, M, N, K, *matrices)
    if gated and config.SPLIT_EPILOGUE:
        raise ValueError(f"ffn: no split epilogue with {activation}, got {config}")
    programs = grid(config, M, N)[0] + grid(config, M, H)[0]
    launch = launch_of_both(ffn_kernel, programs, config, matrices, (b1, b2), activation, save_pre_act, arithmetic)
    return M, N, W, H, 1 + triton.cdiv(M, config.BLOCK_M), launch


def ffn_single_launch(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    save_pre_act: bool,
    out_dtype: torch.dtype | None = None,
    config: _configs.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch `ffn_kernel`; shapes as in the module docstring. out_dtype: of y; None: x's.

    Returns (y, act, pre_act); pre_act is None unless save_pre_act. `config` overrides the table.

    Raises: ValueError: an unknown activation; shapes, dtypes, devices, strides or a `config` that do not fit, or a
    dim of size 0 (the message shows them).
    """
    out_dtype = out_dtype or x.dtype
    M, N, W, H, count, launch = _prepare(
        signature(x), signature(w1), signature(b1), signature(w2), signature(b2), activation, save_pre_act, out_dtype,
        _configs.arithmetic_of(x.dtype), config,
    )  # fmt: skip
    act = x.new_empty((M, N))
    pre_act = x.new_empty((M, W)) if save_pre_act else None
    y = x.new_empty((M, H), dtype=out_dtype)
    stored = act if pre_act is None else pre_act  # a launch has no argument that is absent
    up = stored if W == N or pre_act is None else pre_act[:, N:]
    biases = (x if bias is None else bias for bias in (b1, b2))
    _counters.launch_counting(launch, count, x, w1, w2, act, y, stored, up, act, *biases)
    return y, act, pre_act
