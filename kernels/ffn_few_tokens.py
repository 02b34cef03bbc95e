"""Compute both GEMMs of at most a tile of tokens in one launch: the weights stream, and nothing else should take time.

Shapes, dtypes, results and the two stages are ffn_single_launch.py's, for M ≤ BLOCK_M: all tokens are one row block.
There the weights' bytes are the floor (117 MB for w1 and w2 of [3584, 8192] in bf16: 39 µs at 3 TB/s), so

    SPLIT_K      a tile's reduction is cut into so many slices, a program each, where tiles alone are too few to keep
                 every processor loading: wide tiles, which load x less often, fill the GPU as well as narrow ones
    PREFETCH_K   a program of stage 2 begins to bring so many columns of its rows of w2 into L2 before it waits for
                 act, so that memory is busy while stage 1 drains

Programs take tickets in the order of tiles, the slices of one next to each other, stage 1 first. A program that waits,
as those of stage 2 do for act, holds a later ticket than all it waits for: there is no deadlock.

    counters[0]        tickets taken
    counters[1]        tiles of act that are visible; then, beyond those, programs of stage 2 that are done with act
    counters[2 + t]    with slices, of tile t (those of act, then those of y): slices that are stored

    a slice       store it in fp32; barrier; counters[2 + t] += 1 (acquire, release)
                  whoever is last sets that back, adds the slices from the first to the last, and stores the tile
    stage 1       barrier; counters[1] += 1 (release), by whoever stored the tile
    stage 2       until counters[1] (acquire) ≥ tiles of act: read again; multiply; counters[1] += 1, last one out: = 0

No program waits for a slice, and slices are added in one order, whoever is last: the same bits in every run.

Source: split-K with the last block as in CUTLASS's "serial" and "parallel" split-K, here without its second launch or
its order of arrival; tickets as in ffn_single_launch.py.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _counters
from ._inline_ptx import fence_async_proxy, prefetch_to_l2
from ._launch import (
    Operand,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
from ._tiles import add_row_vector, gemm_gate_and_up, gemm_tile, store_tile
from .activations import GATED_ACTIVATIONS
from .ffn_single_launch import check_ffn, launch_of_both, leave, publish, wait_for_tiles
from .linear_act import store_act, store_gated_act

_LINE = tl.constexpr(128)  # bytes that a prefetch brings


@triton.jit
def slice_of(part, K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Return where the part-th of SPLIT_K slices of a reduction over K begins and ends. They end where blocks do, for a
    descriptor knows the end of a row alone; the last ones may be empty."""
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first_k = part * length
    return first_k, tl.minimum(first_k + length, K)


@triton.jit
def prefetch_rows(ptr, row, rows, col, cols, stride, BLOCK_N: tl.constexpr, COLS: tl.constexpr):
    """Prefetch [BLOCK_N, COLS] from (row, col) on of a row-major [rows, cols] matrix; past its edges, the edge."""
    STEP: tl.constexpr = _LINE // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    offs_n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1)
    offs_k = tl.minimum(col + tl.arange(0, COLS // STEP) * STEP, cols - 1)
    prefetch_to_l2(ptr + offs_n[:, None].to(tl.int64) * stride + offs_k[None, :])


@triton.jit
def store_slice(acc, partial_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a slice's fp32 tile, whole: rows and columns past the edges are added and then not stored."""
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial_ptr + offs, acc)


@triton.jit
def is_last_slice(counter_ptr, SPLIT_K: tl.constexpr, USE_TMA: tl.constexpr):
    """Count a slice that this program has stored, once all of its threads have; say whether all are stored, and
    visible. The last sets the counter back."""
    if USE_TMA:
        # Slices are read through pointers and need none; but the lint of the PTX cannot tell them from act.
        fence_async_proxy()
    # Triton 3.6 and 3.7 put one before acq_rel by themselves, and 3.6 none before a release: not to be relied on.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == SPLIT_K - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def sum_of_slices(partial_ptr, stride, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the tiles of all slices, `stride` elements apart, from the first to the last."""
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.load(partial_ptr + offs)
    for i in tl.static_range(1, SPLIT_K):
        acc += tl.load(partial_ptr + i * stride + offs)
    return acc


@triton.jit
def sum_if_last(
    acc, own_ptr, partial_ptr, stride, counter_ptr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Return a tile, and whether it is whole: of one slice acc; of several the sum, in the last program alone."""
    last = True
    if SPLIT_K > 1:
        store_slice(acc, own_ptr, BLOCK_M, BLOCK_N)
        last = is_last_slice(counter_ptr, SPLIT_K, USE_TMA)
        if last:
            acc = sum_of_slices(partial_ptr, stride, SPLIT_K, BLOCK_M, BLOCK_N)
    return acc, last


@triton.jit(do_not_specialize=["M"])
def few_tokens_kernel(
    x,
    w1,
    w2,
    act,
    y,
    pre_act,
    up,
    act_ptr,
    w2_ptr,
    b1_ptr,
    b2_ptr,
    partial_ptr,
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
    SPLIT_K: tl.constexpr,
    PREFETCH_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = act @ w2.T + b2, act = activation(x @ w1.T + b1), M ≤ BLOCK_M. The tensors up to `up` are pointers or
    descriptors (see _tiles); act_ptr and w2_ptr are act and w2; partial_ptr: SPLIT_K tiles in fp32 for each tile of
    both stages, or twice as many where the activation is gated."""
    act_tiles = tl.cdiv(N, BLOCK_N)
    y_tiles = tl.cdiv(H, BLOCK_N)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == (act_tiles + y_tiles) * SPLIT_K - 1:
        tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")
    tile = ticket // SPLIT_K
    part = ticket % SPLIT_K
    ready_ptr = counters_ptr + 1
    stored_ptr = counters_ptr + 2 + tile
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    SLICE: tl.constexpr = 2 * TILE if GATED else TILE
    partial_ptr += tile.to(tl.int64) * (SPLIT_K * SLICE)
    own_ptr = partial_ptr + part * SLICE
    if tile < act_tiles:
        first_k, end_k = slice_of(part, K, BLOCK_K, SPLIT_K)
        if GATED:
            gate_acc, up_acc = gemm_gate_and_up(
                x, w1, 0, tile, M, N, first_k, end_k, stride_x, stride_w1, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION
            )
            last = True
            if SPLIT_K > 1:
                store_slice(gate_acc, own_ptr, BLOCK_M, BLOCK_N)
                store_slice(up_acc, own_ptr + TILE, BLOCK_M, BLOCK_N)
                last = is_last_slice(stored_ptr, SPLIT_K, USE_TMA)
            if last:
                if SPLIT_K > 1:
                    gate_acc = sum_of_slices(partial_ptr, SLICE, SPLIT_K, BLOCK_M, BLOCK_N)
                    up_acc = sum_of_slices(partial_ptr + TILE, SLICE, SPLIT_K, BLOCK_M, BLOCK_N)
                store_gated_act(
                    gate_acc, up_acc, act_ptr, pre_act, up, b1_ptr, 0, tile, M, N,
                    ACTIVATION, HAS_B1, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, USE_TMA, False,
                )  # fmt: skip
                publish(ready_ptr, USE_TMA)
        else:
            acc = gemm_tile(
                x, w1, 0, tile, M, N, first_k, end_k, stride_x, stride_w1,
                False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
            )  # fmt: skip
            acc, last = sum_if_last(acc, own_ptr, partial_ptr, SLICE, stored_ptr, SPLIT_K, BLOCK_M, BLOCK_N, USE_TMA)
            if last:
                store_act(
                    acc, act_ptr, pre_act, b1_ptr, 0, tile, M, N,
                    ACTIVATION, HAS_B1, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, False, USE_TMA, False,
                )  # fmt: skip
                publish(ready_ptr, USE_TMA)
    else:
        tile_n = tile - act_tiles
        first_k, end_k = slice_of(part, N, BLOCK_K, SPLIT_K)
        if PREFETCH_K > 0:
            prefetch_rows(w2_ptr, tile_n * BLOCK_N, H, first_k, end_k, stride_w2, BLOCK_N, PREFETCH_K)
        wait_for_tiles(ready_ptr, act_tiles, USE_TMA)
        acc = gemm_tile(
            act, w2, 0, tile_n, M, H, first_k, end_k, N, stride_w2,
            False, True, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
        leave(ready_ptr, act_tiles, y_tiles * SPLIT_K)
        acc, last = sum_if_last(acc, own_ptr, partial_ptr, SLICE, stored_ptr, SPLIT_K, BLOCK_M, BLOCK_N, USE_TMA)
        if last:
            if HAS_B2:
                acc = add_row_vector(acc, b2_ptr, tile_n * BLOCK_N, H, BLOCK_N)
            store_tile(y, acc, 0, tile_n * BLOCK_N, M, H, H, BLOCK_M, BLOCK_N, USE_TMA)


@prepared_once
def _prepare(x, w1, b1, w2, b2, activation, save_pre_act, out_dtype, arithmetic, config) -> tuple:
    """Return M, N, W, H, elements of partial sums, the number of counters, and the launch."""
    x, w1, w2 = Operand(*x), Operand(*w1), Operand(*w2)
    M, N, W, K, H = check_ffn(x, w1, b1, w2, b2, activation, out_dtype)
    gated = activation in GATED_ACTIVATIONS
    if config.BLOCK_M < M:
        raise ValueError(f"ffn: {M} tokens do not fit into one tile of {config}")
    if config.SPLIT_EPILOGUE:
        raise ValueError(f"ffn: no split epilogue for few tokens, got {config}")
    matrices = x, w1, w2, fresh(M, N, x), fresh(M, H, x, out_dtype)
    config = configuration("gated_few_tokens" if gated else "few_tokens", config, M, N, K, *matrices)
    tiles = grid(config, M, N)[0] + grid(config, M, H)[0]
    launch = launch_of_both(
        few_tokens_kernel, tiles * config.SPLIT_K, config, matrices, (b1, b2), activation, save_pre_act, arithmetic
    )
    slices = tiles * config.SPLIT_K * (1 + gated) if config.SPLIT_K > 1 else 0
    return M, N, W, H, slices * config.BLOCK_M * config.BLOCK_N, 2 + tiles * (config.SPLIT_K > 1), launch


def ffn_few_tokens(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    save_pre_act: bool,
    config: _configs.Config,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch `few_tokens_kernel`; shapes as in the module docstring. out_dtype: of y; None: x's.

    Returns (y, act, pre_act); pre_act is None unless save_pre_act.

    Raises: ValueError: more tokens than config.BLOCK_M; and as `ffn_single_launch`.
    """
    M, N, W, H, slices, count, launch = _prepare(
        signature(x), signature(w1), signature(b1), signature(w2), signature(b2), activation, save_pre_act,
        out_dtype or x.dtype, _configs.arithmetic_of(x.dtype), config,
    )  # fmt: skip
    act = x.new_empty((M, N))
    pre_act = x.new_empty((M, W)) if save_pre_act else None
    y = x.new_empty((M, H), dtype=out_dtype)
    partial = x.new_empty((slices,), dtype=torch.float32) if slices else y  # a launch has no argument that is absent
    stored = act if pre_act is None else pre_act
    up = stored if W == N or pre_act is None else pre_act[:, N:]
    biases = (x if bias is None else bias for bias in (b1, b2))
    _counters.launch_counting(launch, count, x, w1, w2, act, y, stored, up, act, w2, *biases, partial)
    return y, act, pre_act
