"""Tile configurations: a table per GPU, with the origin of every row, and the rule that picks one.

Nothing is tuned at run time. A table holds, for one architecture, kernel and arithmetic, rows from the largest tile to
the smallest; `select` takes the first row whose tiles are not much taller than the problem and still fill the GPU. What
bench/tune.py has measured on a GPU comes before the table (_tuned.py).

`origin` says where a row comes from. "compiles" means: chosen because it compiles within shared memory and, on sm_80
and sm_90, without spills, in every form for every activation (tests/compile_gate.py; what sm_100 and gfx942 do is in
docs/compiled.md); its speed has not been measured.
"""

from functools import lru_cache

import torch
import triton

from . import _tuned
from ._config import KERNELS, PLAIN_GEMMS, Config


def _tma(m, n, k, warps, stages, split=False):
    return Config(m, n, k, warps, stages, USE_TMA=True, SPLIT_EPILOGUE=split)


def _ptr(m, n, k, warps, stages, split=False):
    return Config(m, n, k, warps, stages, SPLIT_EPILOGUE=split)


def _few(m, n, k, warps, stages, slices, prefetched=0, tma=True):
    return Config(m, n, k, warps, stages, USE_TMA=tma, SPLIT_K=slices, PREFETCH_K=prefetched)


def _table(
    ffn, gated_ffn, linear_act, linear_dact, gated_act, gated_dact, gemm, tf32, few=(), gated_few=()
) -> dict[tuple[str, str], tuple[Config, ...]]:
    ieee = (_ptr(64, 64, 32, 8, 2), _ptr(32, 32, 32, 4, 3))
    sixteen_bit = {"linear_act": linear_act, "linear_dact": linear_dact} | dict.fromkeys(PLAIN_GEMMS, gemm)
    sixteen_bit |= {"ffn": ffn, "gated_ffn": gated_ffn, "gated_linear_act": gated_act, "gated_linear_dact": gated_dact}
    rows = {(kernel, "16bit"): configs for kernel, configs in sixteen_bit.items()}
    few_tokens = {"few_tokens": few, "gated_few_tokens": gated_few}
    rows |= {(kernel, "tf32"): tf32 for kernel in KERNELS if kernel not in few_tokens}
    rows |= {(kernel, "ieee"): ieee for kernel in KERNELS if kernel not in few_tokens}
    rows |= {(kernel, "16bit"): configs for kernel, configs in few_tokens.items()}
    return rows | {
        ("ffn", "ieee"): (_ptr(64, 32, 32, 8, 2), ieee[1]),
        ("gated_ffn", "ieee"): (ieee[0], _ptr(32, 32, 32, 8, 2)),
    }


_FEW_BY_TMA = (
    _few(16, 64, 128, 4, 4, 1, 256),
    _few(16, 32, 128, 4, 5, 1, 512),
    _few(16, 32, 128, 4, 5, 4, 512),
    _few(32, 64, 128, 4, 4, 1, 256),
    _few(32, 64, 128, 4, 4, 2, 256),
    _few(32, 32, 128, 4, 4, 4, 512),
    _few(64, 128, 64, 4, 4, 1, 256),
    _few(64, 128, 64, 4, 4, 4, 256),
    _few(64, 64, 64, 4, 4, 8, 256),
)
_GATED_FEW_BY_TMA = (
    _few(16, 32, 128, 4, 4, 1, 512),
    _few(16, 32, 128, 4, 4, 4, 512),
    _few(32, 32, 128, 4, 4, 1, 512),
    _few(32, 32, 128, 4, 4, 4, 512),
    _few(64, 64, 64, 4, 4, 1, 256),
    _few(64, 64, 64, 4, 4, 4, 256),
)
TABLES: dict[str, dict[tuple[str, str], tuple[Config, ...]]] = {
    "sm_80": _table(
        ffn=(_ptr(128, 128, 32, 8, 4), _ptr(64, 64, 64, 4, 3)),
        gated_ffn=(_ptr(128, 64, 32, 8, 4), _ptr(64, 64, 64, 4, 3)),
        linear_act=(_ptr(128, 128, 32, 8, 4), _ptr(64, 64, 64, 4, 3)),
        linear_dact=(_ptr(128, 128, 64, 8, 3, split=True), _ptr(128, 64, 64, 8, 3, split=True), _ptr(64, 64, 32, 4, 3)),
        gated_act=(_ptr(128, 64, 32, 8, 4), _ptr(64, 64, 64, 4, 3)),
        gated_dact=(_ptr(128, 64, 64, 8, 3, split=True), _ptr(64, 64, 32, 4, 3, split=True)),
        gemm=(_ptr(128, 128, 32, 8, 4), _ptr(64, 64, 64, 4, 3)),
        tf32=(_ptr(64, 64, 32, 4, 3),),
        few=(
            _few(16, 32, 128, 4, 4, 1, 512, tma=False),
            _few(16, 32, 128, 4, 4, 4, 512, tma=False),
            _few(64, 64, 64, 4, 3, 1, 256, tma=False),
            _few(64, 64, 64, 4, 3, 4, 256, tma=False),
        ),
        gated_few=(
            _few(16, 32, 64, 4, 4, 1, 512, tma=False),
            _few(16, 32, 64, 4, 4, 4, 512, tma=False),
            _few(64, 32, 64, 4, 3, 1, 256, tma=False),
            _few(64, 32, 64, 4, 3, 4, 256, tma=False),
        ),
    )
    | {
        ("linear_dact", "tf32"): (_ptr(64, 64, 32, 8, 3),),
        ("weight_grads", "16bit"): (_ptr(128, 128, 32, 8, 4), _ptr(64, 64, 64, 8, 3)),
        ("weight_grads", "ieee"): (_ptr(64, 64, 32, 8, 2), _ptr(32, 32, 32, 4, 2)),
    },
    "sm_90": _table(
        ffn=(_tma(128, 128, 64, 8, 3), _tma(128, 64, 64, 4, 4), _tma(64, 64, 64, 4, 4)),
        gated_ffn=(_tma(128, 128, 64, 8, 3), _tma(128, 64, 64, 4, 3), _tma(64, 64, 64, 4, 4)),
        linear_act=(
            _tma(128, 256, 64, 8, 3, split=True),
            _tma(128, 128, 64, 8, 3, split=True),
            _tma(128, 64, 64, 4, 4),
            _tma(64, 64, 64, 4, 4),
        ),
        linear_dact=(_tma(128, 128, 64, 8, 3, split=True), _tma(128, 64, 64, 8, 4), _tma(64, 64, 64, 4, 4)),
        gated_act=(_tma(128, 128, 64, 8, 3), _tma(128, 64, 64, 4, 3), _tma(64, 64, 64, 4, 4)),
        gated_dact=(
            _tma(128, 128, 64, 8, 3, split=True),
            _tma(128, 64, 64, 8, 4, split=True),
            _tma(64, 64, 64, 4, 4, split=True),
        ),
        gemm=(
            _tma(128, 256, 64, 8, 3, split=True),
            _tma(128, 128, 64, 8, 4),
            _tma(128, 64, 64, 4, 4),
            _tma(64, 64, 64, 4, 4),
        ),
        tf32=(_ptr(64, 64, 32, 4, 3),),
        few=_FEW_BY_TMA,
        gated_few=_GATED_FEW_BY_TMA,
    ),
    "sm_100": _table(
        ffn=(_tma(128, 128, 64, 8, 3, split=True), _tma(128, 64, 64, 4, 4)),
        gated_ffn=(_tma(128, 64, 64, 8, 3), _tma(64, 64, 64, 4, 4)),
        linear_act=(_tma(128, 128, 64, 8, 3, split=True), _tma(128, 64, 64, 4, 4)),
        linear_dact=(_tma(128, 128, 64, 8, 3, split=True), _tma(128, 64, 64, 4, 4, split=True)),
        gated_act=(_tma(128, 128, 64, 8, 3), _tma(128, 64, 64, 8, 3), _tma(64, 64, 64, 4, 4)),
        gated_dact=(_tma(128, 128, 64, 8, 3, split=True), _tma(64, 64, 64, 4, 4, split=True)),
        gemm=(_tma(128, 128, 64, 8, 3, split=True), _tma(128, 64, 64, 4, 4)),
        tf32=(_ptr(64, 64, 32, 4, 3),),
        few=_FEW_BY_TMA,
        gated_few=_GATED_FEW_BY_TMA,
    ),
    "gfx942": _table(
        ffn=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        gated_ffn=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        linear_act=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        linear_dact=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        gated_act=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        gated_dact=(_ptr(128, 128, 32, 8, 2, split=True), _ptr(64, 64, 32, 4, 2, split=True)),
        gemm=(_ptr(128, 128, 32, 8, 2), _ptr(64, 64, 32, 4, 2)),
        tf32=(_ptr(64, 64, 32, 4, 2),),
    ),
}
# For operands that cannot be copied 16 bytes at once: larger tiles spill on their element-wise loads.
_ODD_STRIDES = {"16bit": _ptr(64, 64, 32, 8, 3), "tf32": _ptr(32, 32, 32, 8, 3), "ieee": _ptr(32, 32, 32, 8, 3)}
# The same for kernels that spill with those.
_OWN_ODD_STRIDES = {
    ("linear_act", "16bit"): _ptr(64, 32, 32, 8, 3),
    ("gated_linear_dact", "16bit"): _ptr(64, 32, 64, 8, 2, split=True),
    ("gated_linear_dact", "tf32"): _ptr(64, 32, 32, 8, 2, split=True),
    ("gated_linear_dact", "ieee"): _ptr(32, 32, 32, 4, 3),
    ("ffn", "ieee"): _ptr(32, 16, 32, 8, 2),
    ("gated_ffn", "ieee"): _ptr(32, 16, 32, 4, 2),
}
# Streaming multiprocessors (compute units) that a grid should fill.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# Work that can be one launch or several is one up to so many tiles a processor: launching, filling and draining the GPU
# costs about a wave of tiles, whatever their number. An estimate; not measured.
MOST_WAVES = {"sm_80": 4, "sm_90": 4, "sm_100": 4, "gfx942": 0}


@lru_cache
def arch_of(device: torch.device) -> str:
    """Return the table of a device: the newest that its GPU can run; sm_90's for CPU tensors (interpreter)."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # sm_120 has neither wgmma nor tcgen05 and 99 KB of shared memory: sm_80's rows fit it.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def arithmetic_of(dtype: torch.dtype) -> str:
    """Return the arithmetic class of a dtype: "16bit", or for fp32 "ieee" or "tf32", as torch's own CUDA matmuls
    (torch.set_float32_matmul_precision: "highest" is IEEE; or the newer fp32_precision settings)."""
    if dtype != torch.float32:
        return "16bit"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# The `input_precision` of the dots in each arithmetic class; 16-bit operands ignore it.
PRECISION = {"16bit": "tf32", "tf32": "tf32", "ieee": "ieee"}


def odd_strides(kernel: str, arithmetic: str) -> Config:
    """Return the row for operands that cannot be copied 16 bytes at once (_launch.configuration says which)."""
    return _OWN_ODD_STRIDES.get((kernel, arithmetic), _ODD_STRIDES[arithmetic])


def in_one_launch(arch: str, tiles: int) -> tuple[bool, str]:
    """Say whether what could be several launches is one, given its tiles (of act; of the larger dw); and why."""
    most = MOST_WAVES[arch]
    one = tiles <= most * PROCESSORS[arch]
    return one, f"{'at most' if one else 'more than'} {most} on each"


def select(kernel: str, like, rows: int, cols: int, inner: int, arch: str | None = None) -> Config:
    """Return the configuration for a [rows, cols] output of `kernel`, reduced over inner, in the dtype of `like`, on an
    architecture, by default that of like's device.

    What was measured on this GPU at about these sizes (_tuned.py); else the first row of the table that is at most 64
    rows tall or less than twice as tall as the problem, and yields tiles for three quarters of the processors; else the
    last.
    """
    measured = _measured(kernel, like, rows, cols, inner, arch)
    if measured is not None and measured.config is not None:
        return measured.config
    arch = arch or arch_of(like.device)
    table = TABLES[arch][kernel, arithmetic_of(like.dtype)]
    for config in table:
        tall = config.BLOCK_M > 64 and 2 * rows <= config.BLOCK_M
        tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(cols, config.BLOCK_N)
        if not tall and tiles >= 0.75 * PROCESSORS[arch]:
            return config
    return table[-1]


def select_for_few_tokens(
    kernel: str, like, rows: int, cols: int, inner: int, arch: str | None = None
) -> Config | None:
    """Return the configuration of a kernel for few tokens; None: they are too many, or it has none in this arithmetic.

    What was measured, as in `select`; else, of the least tall rows that all tokens fit in, the first that yields
    programs for three quarters of the processors in both stages (stage 2 has `inner` columns); else the last.
    """
    measured = _measured(kernel, like, rows, cols, inner, arch)
    if measured is not None and measured.config is not None and rows <= measured.config.BLOCK_M:
        return measured.config
    arch = arch or arch_of(like.device)
    fitting = [row for row in TABLES[arch].get((kernel, arithmetic_of(like.dtype)), ()) if rows <= row.BLOCK_M]
    least = [row for row in fitting if min(row.BLOCK_M for row in fitting) == row.BLOCK_M]
    for config in least:
        if triton.cdiv(min(cols, inner), config.BLOCK_N) * config.SPLIT_K >= 0.75 * PROCESSORS[arch]:
            return config
    return least[-1] if least else None


def batch_invariant(kernel: str, like, arch: str | None = None) -> Config:
    """Return the one configuration of a kernel whose results for a token may not depend on how many there are: the
    first row of the table at most 64 columns wide, a compromise between few tokens, which want many programs, and many,
    which want tall tiles; else the last. Its speed is not measured."""
    table = TABLES[arch or arch_of(like.device)][kernel, arithmetic_of(like.dtype)]
    return next((config for config in table if config.BLOCK_N <= 64), table[-1])


def faster_by_torch(kernel: str, like, rows: int, cols: int, inner: int, arch: str | None = None) -> str | None:
    """Return what was measured where torch's own GEMM (cuBLAS) is faster than `kernel` on this GPU at about these
    sizes; None: it is not, or nobody has measured. Arguments as of `select`."""
    measured = _measured(kernel, like, rows, cols, inner, arch)
    return measured.origin if measured is not None and measured.config is None else None


def _measured(kernel: str, like, rows: int, cols: int, inner: int, arch: str | None) -> "_tuned.Measured | None":
    """Nothing on an architecture that is only named: measurements are a GPU's."""
    if arch is not None or like.device.type != "cuda":
        return None
    return _tuned.nearest(_gpu_name(like.device), kernel, arithmetic_of(like.dtype), (rows, cols, inner))


@lru_cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
