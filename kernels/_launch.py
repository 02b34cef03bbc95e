"""What every launcher needs: what there is to know about its operands, their checks, and launches prepared once.

Host time is part of a small layer's latency. All that a launch needs beside addresses (checks, configuration, grid,
compiled kernel, the fields of its TMA descriptors) follows from its operands' signatures, so each launcher derives it
once per signature and keeps it in a cache.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tuned
from ._configs import Config, arithmetic_of, odd_strides, select

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")
# Serving meets thousands of token counts; a prepared launch is some 5 KB, and 0.3 KB for each address of its tensors.
_keep = lru_cache(maxsize=2048)
_prepared: list = []


def prepared_once(prepare: Callable) -> Any:
    """Keep what a function prepares for its arguments, until `load_tuning` changes what it would choose."""
    kept = _keep(prepare)
    _prepared.append(kept)
    return kept


def load_tuning(path: str | Path) -> str:
    """Let a file that bench/tune.py wrote choose tiles on its GPU before the tables, and at its own sizes before what
    the package has measured there, from the next call on; returns the GPU's name.

    Raises: ValueError: not such a file, another version of Triton, a value out of range (the message shows it).
    OSError: it cannot be read.
    """
    device = _tuned.load(Path(path))
    for kept in _prepared:
        kept.cache_clear()
    return device


class Operand(NamedTuple):
    """A tensor without its contents; `residue` is its address modulo 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    residue: int


def signature(t: torch.Tensor | None) -> tuple | None:
    """Return the fields of t's `Operand`, as the key of a cache: a plain tuple, which is faster to make."""
    if t is None:
        return None
    shape, strides = t.shape, t.stride()
    if len(shape) == 2 and shape[0] == 1:
        strides = (shape[1], strides[1])  # a single row has no stride, whatever torch says: it may choose nothing
    return shape, strides, t.dtype, t.device, t.data_ptr() % 16


def fresh(rows: int, cols: int, like: Operand, dtype: torch.dtype | None = None) -> Operand:
    """Return the operand that new_empty((rows, cols)) will be: allocators align far beyond 16 bytes."""
    return Operand((rows, cols), (cols, 1), dtype or like.dtype, like.device, 0)


def check_matrix(name: str, t: Operand, like: Operand | None = None) -> None:
    """Require a 2-D tensor of a supported dtype whose last dim is contiguous; `like` fixes dtype and device.

    Raises: ValueError: with the shape, strides, dtype and device at hand.
    """
    if len(t.shape) != 2 or (t.shape[1] > 1 and t.strides[1] != 1):
        raise ValueError(
            f"{name}: expected a 2-D tensor with a contiguous last dim, got {tuple(t.shape)} with strides {t.strides}"
        )
    check_dtype(name, t.dtype)
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise ValueError(f"{name}: {t.dtype} on {t.device} beside {like.dtype} on {like.device}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Require a dtype that kernels store. Raises: ValueError otherwise."""
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{name}: dtype {dtype} is not one of {', '.join(map(str, SUPPORTED_DTYPES))}")


def check_operands(name: str, a: Operand, b: Operand, trans_b: bool) -> tuple[int, int, int]:
    """Return (M, N, K) of a [M, K] @ b [K, N], or @ b [N, K].T with trans_b.

    Raises: ValueError: inner dims differ, or an operand fails `check_matrix` (the message shows both shapes).
    """
    check_matrix(f"{name} first operand", a)
    check_matrix(f"{name} weight", b, like=a)
    N, K = b.shape if trans_b else b.shape[::-1]
    if a.shape[1] != K:
        raise ValueError(f"{name}: inner dims differ: {tuple(a.shape)} and weight {tuple(b.shape)}")
    return a.shape[0], N, K


def check_contiguous(name: str, t: Operand, shape: tuple[int, ...], like: Operand) -> None:
    """Require a contiguous tensor of this shape, of like's dtype and device. Raises: ValueError otherwise."""
    row_major = (shape[1], 1) if len(shape) == 2 else (1,)
    contiguous = 0 in shape or all(
        stride == expected for size, stride, expected in zip(shape, t.strides, row_major, strict=False) if size > 1
    )
    if t.shape != shape or not contiguous or t.dtype != like.dtype or t.device != like.device:
        raise ValueError(
            f"{name}: expected contiguous {shape} {like.dtype} on {like.device}, got {tuple(t.shape)} {t.dtype} on "
            f"{t.device} with strides {t.strides}"
        )


def _addressable(t: Operand, by_tma: bool) -> bool:
    """Say whether 16 bytes of a row can be copied at once: base and row stride are multiples of 16 bytes, rows do not
    overlap, nothing is empty. Through pointers, stride and width must be multiples of 16 elements: of an integer, the
    compiler knows just that or nothing."""
    step = 16 // t.dtype.itemsize if by_tma else 16
    return (
        t.residue == 0
        and t.strides[0] % step == 0
        and (by_tma or t.shape[1] % step == 0)
        and t.strides[0] >= t.shape[1]
        and t.strides[1] == 1
        and 0 not in t.shape
    )


def can_address(config: Config, *operands: Operand) -> bool:
    """Say whether a configuration's copies, by TMA or 16 bytes at a time, can address every operand."""
    return all(_addressable(t, config.USE_TMA) for t in operands)


def addressable(kernel: str, config: Config, *operands: Operand) -> Config:
    """Return a row of the tables, or the one for odd strides where its copies cannot address every operand."""
    return config if can_address(config, *operands) else odd_strides(kernel, arithmetic_of(operands[0].dtype))


def configuration(
    kernel: str, chosen: Config | None, rows: int, cols: int, inner: int, *operands: Operand, arch: str | None = None
) -> Config:
    """Return the configuration for a [rows, cols] output of `kernel`, reduced over inner, from these matrices, the
    output among them: the caller's, or the row of the tables for an architecture, by default that of their device.

    Raises: ValueError: the caller's uses TMA, which cannot address an operand.
    """
    if chosen is None:
        return addressable(kernel, select(kernel, operands[0], rows, cols, inner, arch), *operands)
    if chosen.USE_TMA and not can_address(chosen, *operands):
        given = ", ".join(f"{tuple(t.shape)} with strides {t.strides} at 16n + {t.residue}" for t in operands)
        raise ValueError(f"{kernel}: TMA cannot address every one of {given}")
    return chosen


def grid(config: Config, rows: int, cols: int) -> tuple[int, int, int]:
    """Return the grid that covers a [rows, cols] output with config's tiles."""
    return triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(cols, config.BLOCK_N), 1, 1


class _Address:
    """What a descriptor needs of its tensor; holding the tensor itself would keep its memory alive."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class _Descriptors:
    """Descriptors of tensors of one signature, by address: allocators give the same ones again and again."""

    MOST = 1024  # enough for the layers and micro-batches of a large model

    def __init__(self, view: Operand, block: tuple[int, int]) -> None:
        nowhere: Any = _Address(0, view.dtype)
        self._fields = vars(TensorDescriptor(nowhere, list(view.shape), list(view.strides), list(block)))
        self._known: dict[int, TensorDescriptor] = {}

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Return the descriptor of a tensor with the signature."""
        address = tensor.data_ptr()
        descriptor = self._known.get(address)
        if descriptor is None:
            if len(self._known) >= self.MOST:
                self._known.clear()
            # Without its constructor, which checks again what holds for every tensor of this signature.
            descriptor = object.__new__(TensorDescriptor)
            vars(descriptor).update(self._fields, base=_Address(address, tensor.dtype))
            self._known[address] = descriptor  # last: other threads look here too
        return descriptor


# Shared by launches: a weight's do not depend on the number of tokens.
_descriptors = lru_cache(maxsize=4096)(_Descriptors)


class Launch:
    """A kernel with everything but its tensors.

    views                (operand, block) of the tensor arguments that become descriptors if constants["USE_TMA"]
    scalars, constants   the integers that follow the tensors in the kernel's signature; its constants and Triton's
                         options of the launch, as in a configuration's `meta`

    Calling it with the tensors launches. The first call goes through Triton's JIT; later ones through the compiled
    kernel it returned, which is right because whatever Triton specialises on is in the signature of the operands.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *, views=(), scalars: tuple, constants: dict) -> None:
        self._kernel, self._grid = kernel, grid
        self._values = (*scalars, *(constants[name] for name in kernel.arg_names if name in constants))
        self._options = {name: constants[name] for name in _OPTIONS if name in constants}
        self._views = views if constants.get("USE_TMA") else ()
        self._descriptors = [_descriptors(*view) for view in self._views]
        self._compiled: Any = None  # bound to the grid

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the device of the first tensor: Triton by itself takes the current one, whatever its arguments."""
        first = tensors[0]
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self(*tensors)
        if self._compiled is not None:
            return self._compiled(*self._with_descriptors(tensors), *self._values)
        descriptors = [
            TensorDescriptor(t, list(view.shape), list(view.strides), list(block))
            for t, (view, block) in zip(tensors, self._views, strict=False)
        ]
        arguments = (*descriptors, *tensors[len(descriptors) :])
        kernel = self._kernel[self._grid](*arguments, *self._values, **self._options)
        if kernel is not None:  # the interpreter compiles nothing
            self._compiled = kernel[self._grid]

    def _with_descriptors(self, tensors: tuple[torch.Tensor, ...]) -> list:
        arguments: list = list(tensors)
        for index, descriptors in enumerate(self._descriptors):
            arguments[index] = descriptors.of(tensors[index])
        return arguments
