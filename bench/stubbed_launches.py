"""Do everything a kernel launch does on the host except the launch, on a machine without a GPU.

`stub` gives triton a driver that names a GPU and has none, and sends CPU tensors to the compiled kernels. Arguments are
bound, specialised and compiled for the named architecture, descriptors built, the compiled kernel called with its
arguments; there it ends. What a GPU would compute is missing: outputs stay as they were allocated.

Not included: what the launcher does in C, the encoding of tensor maps among it, and the CUDA driver.

The process must not have TRITON_INTERPRET set.
"""

from collections.abc import Callable

import checkout  # noqa: F401
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _NamedTarget:
    """A driver for triton that knows which GPU to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stub(arch: str, launched: Callable[[CompiledKernel], None] | None = None) -> None:
    """Stub launches for the rest of this process; `launched` is called in place of each."""
    triton.runtime.driver.set_active(_NamedTarget(TARGETS[arch]))
    interpreter.interpreting = lambda: True  # CPU tensors go to the Triton kernels ...
    interpreter.install = lambda: None  # ... which are compiled
    _configs.arch_of = lambda device: arch  # type: ignore[assignment]

    def run(kernel: CompiledKernel):
        if launched is not None:
            launched(kernel)
        return lambda *args: None

    CompiledKernel._init_handles = lambda kernel: None
    CompiledKernel.function = None
    CompiledKernel.run = property(run)
