"""Send real launches through triton's JIT up to, but not including, the GPU: a driver that only names a target.

    python tests/jit_launches.py sm_90

Everything a launch does on the host happens: arguments are bound, specialised and compiled for the named architecture.
What a GPU would compute does not: outputs stay as new_empty left them. Prints one JSON object: kernel →
[launches, compiled variants].

Run it in a process without TRITON_INTERPRET.
"""

import json
import sys
from collections import defaultdict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
# One configuration serves all of these; 1 and multiples of 16 are what triton specialises on.
TOKENS = (1, 2, 15, 16, 33, 48, 63)


class NamedTarget:
    """A driver for triton that knows which GPU to compile for, and has none."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """Return the target."""
        return self.target

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def main() -> None:
    """Run a layer forward and backward for each number of tokens; print what was launched and compiled."""
    arch = sys.argv[1]
    triton.runtime.driver.set_active(NamedTarget(TARGETS[arch]))
    interpreter.interpreting = lambda: True  # CPU tensors go to the Triton kernels ...
    interpreter.install = lambda: None
    _configs.arch_of = lambda device: arch
    launches, variants = defaultdict(int), defaultdict(set)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)  # ... and stop before the launch
        launches[self.fn.__name__] += 1
        variants[self.fn.__name__].add(kernel.hash)
        assert all(size > 0 for size in grid)

    JITFunction.run = compile_only
    for tokens in TOKENS:
        for size in (64, 61):
            layer = tp.TensorParallelFFN(size, 2 * size, dtype=torch.bfloat16)
            x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
            layer(x).sum().backward()
    print(json.dumps({name: [launches[name], len(variants[name])] for name in launches}))


if __name__ == "__main__":
    main()
