"""Make TRITON_INTERPRET=1 compute bf16 as a GPU does, and in less time.

Triton's interpreter keeps bf16 values as uint16 bit patterns and, in triton 3.6 to 3.9, multiplies those patterns in
`tl.dot` as integers, truncates fp32 → bf16 instead of rounding to nearest even, and adds bf16 as integers. With
triton 3.6 and numpy ≥ 2.4 a loop with a run-time bound fails as well. `install` replaces the handful of interpreter
methods behind that; it changes nothing in a process whose kernels are compiled.

    dot         operands widened to fp32; with input_precision "tf32" fp32 operands lose their low 13 bits first
    casts       through torch: round to nearest even, NaN kept
    arithmetic  bf16 operands widened to fp32, result rounded back
    inline PTX  what orders or fetches memory and computes nothing (kernels/_inline_ptx.py) is passed over: programs and
                launches run one after the other
    calls       a function's language is patched once a launch, not at every call, which took a third of the time
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from tpffn_triton.kernels.linear_act import linear_act_kernel

_TORCH_DTYPE = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
_COMPUTING_NOTHING = ("fence.proxy.async;", "griddepcontrol.", "prefetch.global.")
_patch_lang = interpreter._patch_lang
_installed = False


def interpreting() -> bool:
    """Say whether this process runs our kernels in the interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return isinstance(linear_act_kernel, InterpretedFunction)


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    values = torch.from_numpy(np.array(data))
    if source == tl.bfloat16:
        values = values.view(torch.bfloat16)
    values = values.to(_TORCH_DTYPE[target])
    return (values.view(torch.uint16) if target == tl.bfloat16 else values).numpy()


def _widened(handle: TensorHandle) -> np.ndarray:
    is_bf16 = handle.dtype.scalar == tl.bfloat16
    return _convert(handle.data, tl.bfloat16, tl.float32) if is_bf16 else handle.data


def _bf16(values: np.ndarray) -> TensorHandle:
    return TensorHandle(_convert(values.astype(np.float32), tl.float32, tl.bfloat16), tl.bfloat16)


def _truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@contextlib.contextmanager
def patched_once() -> Iterator[Callable]:
    """Let triton patch the language of a function at its first call inside alone; yields what patches it."""
    # Triton's own: what is in its place may be the cache of a launch around this one, or of another thread's.
    interpreter._patch_lang = once = functools.cache(_patch_lang)
    try:
        yield once
    finally:
        interpreter._patch_lang = _patch_lang


def install() -> None:
    """Patch triton's interpreter, once; a no-op unless `interpreting()`."""
    global _installed
    if _installed or not interpreting():
        return
    _installed = True
    builder = InterpreterBuilder
    cast, binary, unary = builder.cast_impl, builder.binary_op, builder.unary_op
    convert, patch_tensor, fma = builder.create_fp_to_fp, interpreter._patch_lang_tensor, builder.create_fma
    inline_asm, launch = builder.create_inline_asm, interpreter.GridExecutor.__call__

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        if target == tl.bfloat16:
            data = src.data if source in _TORCH_DTYPE else src.data.astype(np.float32)
            return TensorHandle(_convert(data, source if source in _TORCH_DTYPE else tl.float32, target), target)
        return cast(self, TensorHandle(_widened(src), tl.float32), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if toward_zero or source not in _TORCH_DTYPE or target not in _TORCH_DTYPE:
            return convert(self, src, dst_type, rounding_mode)
        return TensorHandle(_convert(src.data, source, target), target)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16 or op in _BITWISE:
            return binary(self, lhs, rhs, op)
        result = op(_widened(lhs), _widened(rhs))
        return TensorHandle(result, tl.int1) if op in _COMPARISONS else _bf16(result)

    def unary_op(self, arg, op):
        return _bf16(op(_widened(arg))) if arg.dtype.scalar == tl.bfloat16 else unary(self, arg, op)

    def create_fma(self, x, y, z):
        if z.dtype.scalar != tl.bfloat16:
            return fma(self, x, y, z)
        return _bf16(_widened(x) * _widened(y) + _widened(z))

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = _widened(a), _widened(b)
        if a.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
            left, right = _truncated_to_tf32(left), _truncated_to_tf32(right)
        product = np.matmul(left.astype(d.data.dtype), right.astype(d.data.dtype))
        return TensorHandle(product + d.data, d.dtype.scalar)

    def create_inline_asm(self, asm, *args):
        if not asm.startswith(_COMPUTING_NOTHING):
            return inline_asm(self, asm, *args)
        return SimpleNamespace(get_result=lambda _: TensorHandle(np.zeros(1, np.int32), tl.int32))

    def launch_patched_once(self, *args, **kwargs):
        with patched_once():
            return launch(self, *args, **kwargs)

    def get_bf16(self, value):
        return _bf16(np.array([value]))

    def _patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.binary_op = binary_op
    builder.unary_op = unary_op
    builder.create_fma = create_fma
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
    builder.get_bf16 = get_bf16
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.GridExecutor.__call__ = launch_patched_once
