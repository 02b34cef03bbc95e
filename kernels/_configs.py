"""Tile configurations: a table per GPU, with the origin of every row, and the rule that picks one.

Nothing is tuned at run time. A table holds, for one architecture, kernel and arithmetic, rows from the largest tile to
the smallest; `select` takes the first row whose tiles are not much taller than the problem and still fill the GPU.

`origin` says where a row comes from. "compiles" means: chosen because it compiles within shared memory and, on sm_80
and sm_90, without spills, in every form for every activation (tests/compile_gate.py; what sm_100 and gfx942 do is in
docs/compiled.md); its speed has not been measured.
"""

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Constants of one compiled variant.

    BLOCK_M × BLOCK_N   output tile; BLOCK_K is the step through the reduction
    num_warps, num_stages   warps a program, depth of the software pipeline
    USE_TMA             tensor descriptors instead of pointers; needs 16-byte aligned bases and row strides
    SPLIT_EPILOGUE      work on the accumulator in two column halves
    GROUP_M             row tiles that share their columns of tiles in L2
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    USE_TMA: bool = False
    SPLIT_EPILOGUE: bool = False
    GROUP_M: int = 8
    origin: str = "compiles"

    @property
    def STORED_N(self) -> int:
        """Columns of a tile that the epilogue loads and stores at once."""
        return self.BLOCK_N // 2 if self.SPLIT_EPILOGUE else self.BLOCK_N

    @cached_property
    def meta(self) -> dict:
        """The keyword arguments of a launch."""
        return {key: value for key, value in asdict(self).items() if key != "origin"}


def _tma(m, n, k, warps, stages, split=False):
    return Config(m, n, k, warps, stages, USE_TMA=True, SPLIT_EPILOGUE=split)


def _ptr(m, n, k, warps, stages, split=False):
    return Config(m, n, k, warps, stages, SPLIT_EPILOGUE=split)


_PLAIN_GEMMS = ("linear", "dgrad", "wgrad", "weight_grads")
_OF_ACTIVATIONS = ("ffn", "linear_act", "linear_dact")
KERNELS = (*_OF_ACTIVATIONS, *(f"gated_{kernel}" for kernel in _OF_ACTIVATIONS), *_PLAIN_GEMMS)


def _table(
    ffn, gated_ffn, linear_act, linear_dact, gated_act, gated_dact, gemm, tf32
) -> dict[tuple[str, str], tuple[Config, ...]]:
    ieee = (_ptr(64, 64, 32, 8, 2), _ptr(32, 32, 32, 4, 3))
    sixteen_bit = {"linear_act": linear_act, "linear_dact": linear_dact} | dict.fromkeys(_PLAIN_GEMMS, gemm)
    sixteen_bit |= {"ffn": ffn, "gated_ffn": gated_ffn, "gated_linear_act": gated_act, "gated_linear_dact": gated_dact}
    rows = {(kernel, "16bit"): configs for kernel, configs in sixteen_bit.items()}
    rows |= {(kernel, "tf32"): tf32 for kernel in KERNELS}
    rows |= {(kernel, "ieee"): ieee for kernel in KERNELS}
    return rows | {
        ("ffn", "ieee"): (_ptr(64, 32, 32, 8, 2), ieee[1]),
        ("gated_ffn", "ieee"): (ieee[0], _ptr(32, 32, 32, 8, 2)),
    }


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


def select(kernel: str, like, rows: int, cols: int, arch: str | None = None) -> Config:
    """Return the configuration for a [rows, cols] output of `kernel` in the dtype of `like`, on an architecture, by
    default that of like's device.

    The first row of the table that is at most 64 rows tall or less than twice as tall as the problem, and yields tiles
    for three quarters of the processors; else the last.
    """
    arch = arch or arch_of(like.device)
    table = TABLES[arch][kernel, arithmetic_of(like.dtype)]
    for config in table:
        tall = config.BLOCK_M > 64 and 2 * rows <= config.BLOCK_M
        tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(cols, config.BLOCK_N)
        if not tall and tiles >= 0.75 * PROCESSORS[arch]:
            return config
    return table[-1]
