"""Compute both weight gradients and both bias gradients in one launch.

    d_pre       [M, W]  fp32|bf16|fp16, last dim contiguous; W = F / P, or 2F / P where the activation is gated
    x, dy       [M, H]  same dtype
    act         [M, F]  same dtype; F here is this rank's F / P
    db_partial  [R, W]  fp32, as linear_dact stored it
    db2_src     [T, H]  any of these dtypes: dy, or with sequence parallelism the rank's own rows of it

    dw1 [W, H] = d_pre.T @ x          dw2 [H, F] = dy.T @ act        or += into a main_grad, in fp32
    db1 [W]    = Σ_r db_partial[r]    db2 [H]    = Σ_t db2_src[t]

fp32 accumulation, sums of columns in fp64, one rounding per stored tensor; a program sums all rows of its columns, in
one order, so the bits are the same in every run. Sums come first in the grid: they wait for memory while tiles compute.

Where one launch is not what the tables ask for (`form_of`), wgrad twice and column_sum for each bias do the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _configs
from ._configs import PROCESSORS, Config, in_one_launch
from ._launch import (
    Launch,
    Operand,
    check_contiguous,
    check_dtype,
    check_matrix,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
from .column_sum import add_rows, column_sum
from .matmul import wgrad, wgrad_accumulate, wgrad_tile

# A program sums so many columns, with so many loads of a block of rows in flight.
SUM_COLS = 32
_SUM_COLS, _SUM_ROWS, _SUM_LOADS = tl.constexpr(SUM_COLS), tl.constexpr(32), tl.constexpr(8)


@triton.jit
def _sum_columns(src_ptr, out_ptr, part, R, N, stride_src):
    """out[offs_n] = the sums of the columns offs_n of src [R, N], the part-th _SUM_COLS of them."""
    offs_n = part * _SUM_COLS + tl.arange(0, _SUM_COLS)
    acc = tl.zeros((_SUM_ROWS, _SUM_COLS), tl.float64)
    for r in range(0, R, _SUM_ROWS * _SUM_LOADS):
        for i in tl.static_range(_SUM_LOADS):
            acc = add_rows(acc, src_ptr, r + i * _SUM_ROWS, offs_n, R, N, stride_src, _SUM_ROWS)
    tl.store(out_ptr + offs_n, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit(do_not_specialize=["M", "R", "T"])
def weight_grads_kernel(
    d_pre,
    x,
    dy,
    act,
    dw1,
    dw2,
    db_partial_ptr,
    db2_src_ptr,
    db1_ptr,
    db2_ptr,
    M,
    W,
    H,
    F,
    R,
    T,
    stride_d_pre,
    stride_x,
    stride_dy,
    stride_act,
    stride_db_partial,
    stride_db2_src,
    HAS_DB1: tl.constexpr,
    HAS_DB2: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ids, in order: the parts of db1, of db2, the tiles of dw1, of dw2."""
    first_db2 = tl.cdiv(W, _SUM_COLS) if HAS_DB1 else 0
    first_dw1 = first_db2 + (tl.cdiv(H, _SUM_COLS) if HAS_DB2 else 0)
    first_dw2 = first_dw1 + tl.cdiv(W, BLOCK_M) * tl.cdiv(H, BLOCK_N)
    pid = tl.program_id(0)
    if pid < first_db2:
        if HAS_DB1:
            _sum_columns(db_partial_ptr, db1_ptr, pid, R, W, stride_db_partial)
    elif pid < first_dw1:
        if HAS_DB2:
            _sum_columns(db2_src_ptr, db2_ptr, pid - first_db2, T, H, stride_db2_src)
    else:
        # The operands are chosen, not the loop: two loops would not share their shared memory.
        if pid < first_dw2:
            tile, N, K = pid - first_dw1, W, H
            a, b, dw, stride_a, stride_b = d_pre, x, dw1, stride_d_pre, stride_x
        else:
            tile, N, K = pid - first_dw2, H, F
            a, b, dw, stride_a, stride_b = dy, act, dw2, stride_dy, stride_act
        wgrad_tile(
            tile, a, b, dw, M, N, K, stride_a, stride_b,
            ACCUMULATE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_EPILOGUE, USE_TMA, PRECISION,
        )  # fmt: skip


class Form(NamedTuple):
    """How the gradients are computed: in one launch of `config`, or, where that is None, in one launch each."""

    config: Config | None
    why: str


def form_of(
    d_pre: Operand,
    x: Operand,
    dy: Operand,
    act: Operand,
    dw1: Operand,
    dw2: Operand,
    *,
    config: Config | None = None,
    arch: str | None = None,
) -> Form:
    """Return how the gradients of these operands are computed, on their device or another architecture. The caller's
    `config` is for one launch, however large.

    Raises: ValueError: the caller's uses TMA, which cannot address an operand.
    """
    (M, W), (H, F) = d_pre.shape, dw2.shape
    if 0 in (M, W, H, F):
        return Form(None, f"nothing to multiply: M={M}, W={W}, H={H}, F={F}")
    if dw1.dtype != dw2.dtype:
        return Form(None, f"dw1 is {dw1.dtype}, dw2 {dw2.dtype}")
    asked, arch = arch, arch or _configs.arch_of(d_pre.device)
    # dw1 and dw2.T side by side: together they fill the GPU.
    operands = d_pre, x, dy, act, dw1, dw2
    row = configuration("weight_grads", config, W + F, H, M, *operands, arch=asked)
    # By the tables' tiles, as in forward.py.
    counted = configuration("weight_grads", config, W + F, H, M, *operands, arch=arch)
    tiles = max(grid(counted, W, H)[0], grid(counted, H, F)[0])
    size = f"{tiles} tiles of the larger gradient on {PROCESSORS[arch]} processors"
    if config is not None:
        return Form(config, f"asked for; {size}")
    one, load = in_one_launch(arch, tiles)
    return Form(row if one else None, f"{size}, {load}")


def _checked(matrices, grads, sources, dtypes) -> tuple:
    """Return the operands behind the signatures, dw1 and dw2 among them: those to add to, or those to come."""
    names = ("d_pre", "x", "dy", "act")
    d_pre, x, dy, act = operands = [Operand(*t) for t in matrices]
    for name, t in zip(names, operands, strict=True):
        check_matrix(f"weight_grads {name}", t, like=d_pre)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(names, operands, strict=True))
    if len({t.shape[0] for t in operands}) > 1:
        raise ValueError(f"weight_grads: {shapes} differ in tokens (dim 0)")
    if x.shape[1] != dy.shape[1]:
        raise ValueError(f"weight_grads: x and dy differ in features (dim 1): {shapes}")
    W, H, F = d_pre.shape[1], x.shape[1], act.shape[1]
    results = [fresh(W, H, d_pre, dtypes[0]), fresh(H, F, d_pre, dtypes[1])]
    for i, name in enumerate(("dw1", "dw2")):
        check_dtype(f"weight_grads {name}", dtypes[i])
        if grads is not None:
            given, like = Operand(*grads[i]), results[i]._replace(dtype=torch.float32)
            check_contiguous(f"weight_grads {name}", given, like.shape, like=like)
            results[i] = given
    summed = [None if src is None else Operand(*src) for src in sources]
    for name, src, columns, dtype in zip(("db_partial", "db2_src"), summed, (W, H), dtypes[2:], strict=True):
        if src is not None:
            check_matrix(f"weight_grads {name}", src)
            check_dtype(f"weight_grads sum of {name}", dtype or src.dtype)
            if src.shape[1] != columns or src.device != d_pre.device:
                got = f"{tuple(src.shape)} on {src.device}"
                raise ValueError(f"weight_grads {name}: expected {columns} columns on {d_pre.device}, got {got}")
    return operands, results, summed


@prepared_once
def _prepare(matrices, grads, sources, dtypes, arithmetic, config) -> Launch | None:
    """Return the launch, if the gradients are computed in one.

    matrices  signatures of (d_pre, x, dy, act)     sources  of (db_partial, db2_src), None where not wanted
    grads     of (dw1, dw2) to add to, or None      dtypes   of (dw1, dw2, db1, db2)
    """
    operands, results, summed = _checked(matrices, grads, sources, dtypes)
    config = form_of(*operands, *results, config=config).config
    if config is None:
        return None
    (M, W), (H, F) = operands[0].shape, results[1].shape
    programs = sum(0 if src is None else triton.cdiv(src.shape[1], SUM_COLS) for src in summed)
    programs += sum(grid(config, *dw.shape)[0] for dw in results)
    left, right = (config.BLOCK_K, config.BLOCK_M), (config.BLOCK_K, config.BLOCK_N)
    blocks = (left, right, left, right, *[(config.BLOCK_M, config.STORED_N)] * 2)
    return Launch(
        weight_grads_kernel,
        (programs, 1, 1),
        views=tuple(zip((*operands, *results), blocks, strict=True)),
        scalars=(
            *(M, W, H, F),
            *(0 if src is None else src.shape[0] for src in summed),
            *(0 if t is None else t.strides[0] for t in (*operands, *summed)),
        ),
        constants=config.meta
        | {
            "HAS_DB1": summed[0] is not None,
            "HAS_DB2": summed[1] is not None,
            "ACCUMULATE": grads is not None,
            "PRECISION": _configs.PRECISION[arithmetic],
        },
    )


def _compute(grads, matrices, sources, dtypes, config, by_torch=True) -> tuple:
    """Return (dw1, dw2, db1, db2); arguments as in `_prepare`, but tensors."""
    d_pre, x, dy, act = matrices
    launch = _prepare(
        tuple(map(signature, matrices)),
        None if grads is None else tuple(map(signature, grads)),
        tuple(map(signature, sources)),
        dtypes,
        _configs.arithmetic_of(d_pre.dtype),
        config,
    )
    biases = tuple(zip(sources, dtypes[2:], strict=True))
    if launch is None:
        if grads is None:
            grads = (
                wgrad(d_pre, x, dtypes[0], by_torch=by_torch),
                wgrad(dy, act, dtypes[1], by_torch=by_torch),
            )
        else:
            wgrad_accumulate(grads[0], d_pre, x)
            wgrad_accumulate(grads[1], dy, act)
        return *grads, *(None if src is None else column_sum(src, dtype) for src, dtype in biases)
    if grads is None:
        dw1 = d_pre.new_empty((d_pre.shape[1], x.shape[1]), dtype=dtypes[0])
        grads = dw1, d_pre.new_empty((dy.shape[1], act.shape[1]), dtype=dtypes[1])
    sums = tuple(None if src is None else src.new_empty((src.shape[1],), dtype=dtype) for src, dtype in biases)
    # A launch has no argument that is absent.
    launch(*matrices, *grads, *(dy if t is None else t for t in (*sources, *sums)))
    return *grads, *sums


def weight_grads(
    d_pre: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    act: torch.Tensor,
    db_partial: torch.Tensor | None,
    db2_src: torch.Tensor | None,
    w1_dtype: torch.dtype | None = None,
    w2_dtype: torch.dtype | None = None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
    config: Config | None = None,
    by_torch: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return (dw1, dw2, db1, db2) as in the module docstring, in these dtypes (None: d_pre's; of a bias, that of what
    is summed); db1 or db2 is None where db_partial or db2_src is. `config`: as in `form_of`; by_torch: as of `wgrad`.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    dtypes = w1_dtype or d_pre.dtype, w2_dtype or d_pre.dtype, b1_dtype, b2_dtype
    return _compute(None, (d_pre, x, dy, act), (db_partial, db2_src), dtypes, config, by_torch)


def weight_grads_accumulate(
    dw1: torch.Tensor,
    dw2: torch.Tensor,
    d_pre: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    act: torch.Tensor,
    db_partial: torch.Tensor | None,
    db2_src: torch.Tensor | None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Add the weight gradients to dw1 [W, H] and dw2 [H, F], contiguous fp32, in place; return (db1, db2) as
    `weight_grads` does.

    Raises: ValueError: shapes, dtypes, devices, strides or a `config` that do not fit (the message shows them).
    """
    dtypes = dw1.dtype, dw2.dtype, b1_dtype, b2_dtype
    return _compute((dw1, dw2), (d_pre, x, dy, act), (db_partial, db2_src), dtypes, config)[2:]
