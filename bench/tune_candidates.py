"""Say which configurations are worth compiling for a case: what the tables choose, its neighbours, and a product of
tiles and steps, less what cannot be right.

    few rows    at most 64: weights stream, so many small tiles, long steps and deep pipelines
    else        tiles of 64 to 256 rows and columns, from those that feed tensor cores best

What cannot be right: more shared memory or accumulators than there are, steps longer than the reduction, tiles twice as
tall as the output, grids far smaller than the GPU, or so many small tiles that operands are loaded again and again.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import checkout  # noqa: F401
import torch
import triton
from tune_cases import FEW, Case
from workloads import DTYPES

from tpffn_triton.kernels._configs import PROCESSORS, Config, select, select_for_few_tokens

# Arithmetic → the dtype that stands for it, by its name in workloads.py.
ARITHMETICS = {"16bit": "bf16", "tf32": "tf32", "ieee": "fp32"}
# Compiled for a case at most.
MOST = 24
# Bytes of shared memory that a program may use, as tests/compile_inspect.py has them.
SHARED_BYTES = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Gated forwards multiply each tile of x by one of gate and one of up.
_TWO_ACCUMULATORS = ("gated_ffn", "gated_few_tokens", "gated_linear_act")
# fp32 accumulators of a thread: with more, registers do not suffice for the rest, of which the derivative has most.
_ACCUMULATORS = {"linear_dact": 64, "gated_linear_dact": 64}
_MOST_ACCUMULATORS = 128
# Of a grid: at least so much of the processors, at most so many waves.
_FILLED, _WAVES = 0.25, 12

_Tiles = tuple[tuple[int, int, int], ...]
_Steps = tuple[tuple[int, int], ...]
_BY_TMA = ("sm_90", "sm_100")
# (BLOCK_M, BLOCK_N, warps) and (BLOCK_K, stages), the most ordinary first.
_TMA: tuple[_Tiles, _Steps] = (
    ((128, 256, 8), (128, 128, 8), (256, 128, 8), (128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 256, 4), (64, 64, 4)),
    ((64, 3), (64, 4), (128, 2)),
)
_TMA_FEW: tuple[_Tiles, _Steps] = (
    ((64, 64, 4), (64, 32, 4), (64, 128, 4), (64, 16, 4)),
    ((64, 4), (128, 4), (128, 3), (64, 6), (256, 3), (256, 2)),
)
_POINTERS: tuple[_Tiles, _Steps] = (
    ((128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 64, 8), (128, 256, 8)),
    ((32, 4), (64, 3), (32, 3), (64, 2)),
)
_POINTERS_FEW: tuple[_Tiles, _Steps] = (
    ((16, 64, 4), (32, 64, 4), (64, 64, 4), (16, 32, 4), (16, 128, 4)),
    ((64, 4), (128, 3), (64, 3), (128, 2), (64, 2)),
)
_FP32: tuple[_Tiles, _Steps] = (
    ((64, 64, 4), (64, 64, 8), (64, 32, 4), (32, 64, 4), (32, 32, 4), (128, 64, 8)),
    ((32, 3), (32, 2), (64, 2), (16, 4)),
)
# What a configuration's short name has in its place.
_NAMED = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "USE_TMA", "SPLIT_EPILOGUE")
# Of a kernel for few tokens: steps, PREFETCH_K, SPLIT_K and BLOCK_N.
_OF_FEW_TOKENS = (((128, 4), (64, 4), (128, 3), (64, 6)), (256, 512, 0), (1, 4, 2, 8), (64, 32, 128))


def dtype_of(case: Case) -> torch.dtype:
    """Return the dtype of a case's tensors."""
    return DTYPES[ARITHMETICS[case.arithmetic]]


def tables_choice(case: Case, arch: str) -> Config | None:
    """Return the tables' row, None where there is none; torch's precision of fp32 matmuls is to be the case's
    arithmetic."""
    choose = select_for_few_tokens if case.kernel.endswith("few_tokens") else select
    like = torch.empty(0, dtype=dtype_of(case))
    return choose(case.kernel, like, case.rows, case.cols, case.inner, arch)


def candidates(case: Case, arch: str, most: int = MOST) -> list[Config]:
    """Return at most so many configurations to compile, the tables' own first; none where the tables have no row."""
    own = tables_choice(case, arch)
    if own is None:
        return []
    others = (*_neighbours(case, own, arch), *_product(case, own, arch))
    return [*dict.fromkeys((own, *(config for config in others if fits(config, case, arch))))][:most]


def _neighbours(case: Case, own: Config, arch: str) -> Iterator[Config]:
    """Yield the tables' row in another order of tiles, and with its operands loaded the other way."""
    if triton.cdiv(case.rows, own.BLOCK_M) > own.GROUP_M // 2:
        yield from (replace(own, GROUP_M=group) for group in (4, 16))
    if case.arithmetic == "16bit" and arch in _BY_TMA:
        yield replace(own, USE_TMA=not own.USE_TMA)


def _product(case: Case, own: Config, arch: str) -> Iterator[Config]:
    few, by_tma = case.rows <= FEW, case.arithmetic == "16bit" and arch in _BY_TMA
    if case.kernel.endswith("few_tokens"):
        yield from _of_few_tokens(own)
        return
    if case.arithmetic != "16bit":
        tiles, steps = _FP32
    elif by_tma:
        tiles, steps = _TMA_FEW if few else _TMA
    else:
        tiles, steps = _POINTERS_FEW if few else _POINTERS
    for (k, stages), split, (m, n, warps) in product(steps, (True, False), tiles):
        if not split or (n >= 128 and case.kernel not in _TWO_ACCUMULATORS):
            yield Config(m, n, k, warps, stages, USE_TMA=by_tma, SPLIT_EPILOGUE=split)


def _of_few_tokens(own: Config) -> Iterator[Config]:
    """Yield the tables' row with each other step, prefetch, number of slices and width; then slices with widths, which
    depend on each other: together they fill the GPU."""
    steps, prefetched, slices, widths = _OF_FEW_TOKENS
    yield from (replace(own, BLOCK_K=k, num_stages=stages) for k, stages in steps)
    yield from (replace(own, PREFETCH_K=columns) for columns in prefetched)
    yield from (replace(own, SPLIT_K=count) for count in slices)
    yield from (replace(own, BLOCK_N=n) for n in widths)
    yield from (replace(own, SPLIT_K=count, BLOCK_N=n) for count, n in product(slices, widths))


def fits(config: Config, case: Case, arch: str) -> bool:
    """Say whether nothing in the module docstring speaks against a configuration."""
    stacks = 2 if case.kernel in _TWO_ACCUMULATORS else 1
    itemsize = dtype_of(case).itemsize
    columns = stacks * config.BLOCK_N
    shared = config.num_stages * (config.BLOCK_M + columns) * config.BLOCK_K * itemsize
    accumulators = config.BLOCK_M * columns / (32 * config.num_warps)
    tiles = triton.cdiv(case.rows, config.BLOCK_M) * triton.cdiv(case.cols, config.BLOCK_N)
    tall = config.BLOCK_M > 64 and 2 * case.rows <= config.BLOCK_M
    small = max(config.BLOCK_M, config.BLOCK_N) <= 64 or case.rows <= FEW
    return (
        shared <= SHARED_BYTES[arch]
        and accumulators <= _ACCUMULATORS.get(case.kernel, _MOST_ACCUMULATORS)
        and 2 * case.inner > config.BLOCK_K
        and not tall
        and (small or tiles >= _FILLED * PROCESSORS[arch])
        and (tiles <= _WAVES * PROCESSORS[arch] or config.BLOCK_M * config.BLOCK_N >= 128 * 128)
    )


def name_of(config: Config) -> str:
    """Return a configuration in short: tile, warps, stages, how it loads, and what else is not as usual."""
    name = f"{config.BLOCK_M}×{config.BLOCK_N}×{config.BLOCK_K} w{config.num_warps} s{config.num_stages}"
    name += (" tma" if config.USE_TMA else " ptr") + " split" * config.SPLIT_EPILOGUE
    usual = Config(1, 1, 1, 1, 1).meta
    unusual = {field: value for field, value in config.meta.items() if field not in _NAMED and value != usual[field]}
    return name + "".join(f" {field.lower()}={value}" for field, value in unusual.items())
