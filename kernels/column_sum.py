"""Sum the rows of a matrix in a fixed order: bias gradients.

    src  [R, N]  fp32|bf16|fp16, last dim contiguous
    out  [N]     any of these dtypes: Σ_r src[r, :]

Each program sums ROWS_PER_PROGRAM rows of BLOCK_N columns in fp64 (the kernel waits for memory, not for additions);
where that leaves several partial rows, kept in fp32, a further pass sums those. The order depends on R alone, so the
bits are the same in every run.
"""

import torch
import triton
import triton.language as tl

from ._launch import Launch, Operand, check_dtype, check_matrix, prepared_once, signature

ROWS_PER_PROGRAM = 128
BLOCK_R = 32
BLOCK_N = 64


@triton.jit
def add_rows(acc, src_ptr, first_row, offs_n, R, N, stride_src, BLOCK_R: tl.constexpr):
    """Add the columns offs_n of BLOCK_R rows of src [R, N], zero past its edges, to fp64 sums of such blocks."""
    offs_r = first_row + tl.arange(0, BLOCK_R)
    ptrs = src_ptr + offs_r[:, None].to(tl.int64) * stride_src + offs_n[None, :]
    return acc + tl.load(ptrs, mask=(offs_r[:, None] < R) & (offs_n[None, :] < N), other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["R"])
def column_sum_kernel(
    src_ptr, out_ptr, R, N, stride_src, ROWS_PER_PROGRAM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[program_id(0), :] = sum of this program's rows of src."""
    first_row = tl.program_id(0) * ROWS_PER_PROGRAM
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float64)
    for r in range(0, ROWS_PER_PROGRAM, BLOCK_R):
        acc = add_rows(acc, src_ptr, first_row + r, offs_n, R, N, stride_src, BLOCK_R)
    out_ptrs = out_ptr + tl.program_id(0).to(tl.int64) * N + offs_n
    tl.store(out_ptrs, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=offs_n < N)


@prepared_once
def _prepare(src, out_dtype) -> tuple[tuple[int, int], torch.dtype, Launch | None]:
    """Return shape and dtype of what one pass leaves, and its launch, if there is anything to sum."""
    src = Operand(*src)
    check_matrix("column_sum src", src)
    check_dtype("column_sum out", out_dtype)
    R, N = src.shape
    if R == 0 or N == 0:
        return (1, N), out_dtype, None
    partial_rows = triton.cdiv(R, ROWS_PER_PROGRAM)
    launch = Launch(
        column_sum_kernel,
        (partial_rows, triton.cdiv(N, BLOCK_N), 1),
        scalars=(R, N, src.strides[0]),
        constants={"ROWS_PER_PROGRAM": ROWS_PER_PROGRAM, "BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N},
    )
    return (partial_rows, N), out_dtype if partial_rows == 1 else torch.float32, launch


def column_sum(src: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Launch `column_sum_kernel` until one row is left; shapes as in the module docstring. out_dtype: default src's.

    Raises: ValueError: src is not 2-D, its last dim is not contiguous, or a dtype is unsupported (the message shows
    them).
    """
    out_dtype = out_dtype or src.dtype
    while True:
        shape, dtype, launch = _prepare(signature(src), out_dtype)
        if launch is None:
            return src.new_zeros(shape[1:], dtype=dtype)
        out = src.new_empty(shape, dtype=dtype)
        launch(src, out)
        if shape[0] == 1:
            return out[0]
        src = out
