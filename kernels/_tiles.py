"""One output tile of a GEMM: which tile a program owns, its main loop, its loads and stores.

Every operand is either a pointer (`USE_TMA` False: cp.async on sm_80, any alignment) or a host-side tensor descriptor
(`USE_TMA` True: TMA on sm_90 and later). The branch is resolved at compile time, so each kernel is written once.

    a    [M, K], or [K, M] with TRANS_A     row-major, last dim contiguous, row stride in elements
    b    [K, N], or [N, K] with TRANS_B     likewise
    acc  [BLOCK_M, BLOCK_N] fp32            rows and columns past M and N hold values that nobody may store

Offsets are 64-bit: a row index times a stride may pass 2³¹ elements.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Map a program id to (tile_m, tile_n), GROUP_M row tiles at a time, so that programs running together share
    operand tiles in L2.

    Source: the grouped ordering of Triton's matrix-multiplication tutorial.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group_size = GROUP_M * tiles_n
    first_m = (pid // group_size) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % group_size) % rows
    tile_n = (pid % group_size) // rows
    return tile_m, tile_n


@triton.jit
def _operand_ptrs(ptr, offs_row, offs_col, stride):
    return ptr + offs_row[:, None].to(tl.int64) * stride + offs_col[None, :]


@triton.jit
def gemm_tile(
    a,
    b,
    tile_m,
    tile_n,
    M,
    N,
    first_k,
    K,
    stride_a,
    stride_b,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate one tile of A[:, first_k:K] @ B[first_k:K] in fp32; by TMA, K is the end of a row or a multiple of
    BLOCK_K beyond first_k. PRECISION ("ieee" or "tf32") matters for fp32 operands only."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        # Reads past an edge return zero.
        for k in range(first_k, K, BLOCK_K):
            if TRANS_A:
                a_tile = a.load([k, tile_m * BLOCK_M]).T
            else:
                a_tile = a.load([tile_m * BLOCK_M, k])
            if TRANS_B:
                b_tile = b.load([tile_n * BLOCK_N, k]).T
            else:
                b_tile = b.load([k, tile_n * BLOCK_N])
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    else:
        # Rows and columns past M and N are those of other tiles instead of being masked: they are never stored, and
        # only K needs a mask in the loop.
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        if TRANS_A:
            offs_m = offs_m % M
        else:
            # Of this row block, not of the first: in a single launch others may still be writing that one.
            offs_m = tl.minimum(offs_m, M - 1)
        offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
        offs_k = tl.arange(0, BLOCK_K)
        step = tl.full((), BLOCK_K, tl.int64)
        if TRANS_A:
            # Not a load of [BLOCK_K, BLOCK_M] transposed: on sm_80 that goes through registers, without cp.async.
            a_ptrs = a + offs_m[:, None] + (first_k + offs_k)[None, :].to(tl.int64) * stride_a
        else:
            a_ptrs = _operand_ptrs(a, offs_m, first_k + offs_k, stride_a)
        if TRANS_B:
            b_ptrs = _operand_ptrs(b, offs_n, first_k + offs_k, stride_b)
        else:
            b_ptrs = _operand_ptrs(b, first_k + offs_k, offs_n, stride_b)
        for k in range(first_k, K, BLOCK_K):
            a_tile = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            if TRANS_A:
                a_ptrs += step * stride_a
            else:
                a_ptrs += BLOCK_K
            if TRANS_B:
                b_tile = tl.load(b_ptrs, mask=offs_k[None, :] < K - k, other=0.0).T
                b_ptrs += BLOCK_K
            else:
                b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
                b_ptrs += step * stride_b
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gemm_gate_and_up(
    a,
    b,
    tile_m,
    tile_n,
    M,
    N,
    first_k,
    K,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate the tiles of A @ B[:N].T and A @ B[N:].T at the same place in fp32; b is [2N, K], and each tile of A
    is loaded once for both. The rest is as in gemm_tile."""
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        # A gate tile that reaches past N reads up rows: its columns past N are never stored.
        for k in range(first_k, K, BLOCK_K):
            a_tile = a.load([tile_m * BLOCK_M, k])
            gate = tl.dot(a_tile, b.load([tile_n * BLOCK_N, k]).T, gate, input_precision=PRECISION)
            up = tl.dot(a_tile, b.load([N + tile_n * BLOCK_N, k]).T, up, input_precision=PRECISION)
    else:
        offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
        offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
        offs_k = tl.arange(0, BLOCK_K)
        a_ptrs = _operand_ptrs(a, offs_m, first_k + offs_k, stride_a)
        gate_ptrs = _operand_ptrs(b, offs_n, first_k + offs_k, stride_b)
        up_ptrs = _operand_ptrs(b, N + offs_n, first_k + offs_k, stride_b)
        for k in range(first_k, K, BLOCK_K):
            mask = offs_k[None, :] < K - k
            a_tile = tl.load(a_ptrs, mask=mask, other=0.0)
            gate = tl.dot(a_tile, tl.load(gate_ptrs, mask=mask, other=0.0).T, gate, input_precision=PRECISION)
            up = tl.dot(a_tile, tl.load(up_ptrs, mask=mask, other=0.0).T, up, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
    return gate, up


@triton.jit
def load_tile(src, row, col, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr):
    """Load the [BLOCK_M, BLOCK_N] tile at (row, col) of a row-major [M, N] tensor; zero past its edges."""
    if USE_TMA:
        tile = src.load([row, col])
    else:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tile = tl.load(_operand_ptrs(src, offs_m, offs_n, stride), mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(dst, tile, row, col, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr):
    """Round an fp32 tile once to the dtype of `dst` and store what lies inside [M, N]."""
    if USE_TMA:
        dst.store([row, col], tile.to(dst.dtype))
    else:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(_operand_ptrs(dst, offs_m, offs_n, stride), tile.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def column_parts(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Return an accumulator's left and right column halves (PARTS 2), or the whole (1), as a tuple.

    An epilogue that works on one half at a time keeps half of its temporaries alive: the difference between spilling
    and not at 128×128 and above.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2)
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        return left, right
    else:
        return (acc,)


@triton.jit
def add_row_vector(tile, vector_ptr, col, N, BLOCK_N: tl.constexpr):
    """Add vector[col : col + BLOCK_N] to every row of an fp32 tile."""
    offs_n = col + tl.arange(0, BLOCK_N)
    return tile + tl.load(vector_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
