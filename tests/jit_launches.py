"""Send real launches through triton's JIT up to, but not including, the GPU (bench/stubbed_launches.py).

    python tests/jit_launches.py sm_90

Runs layers forward and backward at several numbers of tokens and prints one JSON object:

    launches     kernel → [launches, compiled variants]
    operators    torch operators called by ffn and its launchers, forward and backward: what a CUDA graph would capture
    dependent    kernel → launches with programmatic dependent launch; and whether just those wait for the one before
    addresses    of each descriptor that a prepared launch uses again: whether it holds its tensor's address

Run it in a process without TRITON_INTERPRET.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from stubbed_launches import stub
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

import tpffn_triton as tp
from tpffn_triton import backends, ops
from tpffn_triton.kernels import _configs, forward, weight_grads
from tpffn_triton.kernels._launch import Launch

# One configuration serves all of these; 1 and multiples of 16 are what triton specialises on.
TOKENS = (1, 2, 15, 16, 33, 48, 63)


class Operators(TorchDispatchMode):
    """Collect the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def step(layer, x, dy) -> None:
    """Run forward and backward."""
    y = layer(x)
    torch.autograd.grad(y, (x, *(p for p in layer.parameters() if p.requires_grad)), dy)


def main() -> None:
    """Print the findings."""
    launches, variants, received = defaultdict(int), defaultdict(set), []
    dependent, waits = defaultdict(int), True

    def launched(kernel: CompiledKernel):
        launches[kernel.name] += 1
        variants[kernel.name].add(kernel.hash)
        if getattr(kernel.metadata, "launch_pdl", False):
            dependent[kernel.name] += 1
        nonlocal waits
        waits &= ("griddepcontrol.wait" in kernel.asm.get("ptx", "")) == getattr(kernel.metadata, "launch_pdl", False)

    stub(sys.argv[1], launched)
    layers = {}
    for name, activation in (("gelu", "gelu"), ("swiglu", "swiglu"), ("w1 frozen", "gelu")):
        for size in (64, 61):
            layers[name, size] = tp.TensorParallelFFN(size, 2 * size, activation=activation, dtype=torch.bfloat16)
            layers[name, size].linear_fc1.weight.requires_grad_(name != "w1 frozen")
    most, few_tokens = _configs.MOST_WAVES[sys.argv[1]], _configs.select_for_few_tokens
    # In several launches each, in one, and in that for few tokens where rows are aligned.
    for most_waves, select_few in ((0, lambda *args: None), (most, lambda *args: None), (most, few_tokens)):
        _configs.MOST_WAVES[sys.argv[1]], _configs.select_for_few_tokens = most_waves, select_few
        forward._chosen.cache_clear()
        weight_grads._prepare.cache_clear()
        for tokens in TOKENS:
            for (_, size), layer in layers.items():
                x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
                step(layer, x, torch.randn_like(x))
    counted = {name: [launches[name], len(variants[name])] for name in launches}

    # Again, through prepared launches: with other tensors of the same signature, whose addresses must arrive.
    prepared = Launch._with_descriptors

    def with_descriptors(self, tensors):
        arguments = prepared(self, tensors)
        for tensor, argument in zip(tensors, arguments, strict=True):
            if isinstance(argument, TensorDescriptor):
                received.append(argument.base.data_ptr() == tensor.data_ptr())
        return arguments

    Launch._with_descriptors = with_descriptors
    # The launchers themselves instead of the registered operators, inside of which a mode sees nothing.
    ops.kernels = lambda *tensors: backends.implementation("cpu")
    operators = Operators()
    for (_, size), layer in layers.items():
        x = torch.randn(TOKENS[-1], size, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)
        with operators:
            step(layer, x, dy)
    found = {"launches": counted, "dependent": [dependent, waits]}
    print(json.dumps(found | {"operators": sorted(operators.names), "addresses": received}))


if __name__ == "__main__":
    main()
