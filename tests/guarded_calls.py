"""Call every kernel on tensors at the edge of memory that faults, and compare the results with torch's.

    python tests/guarded_calls.py end|start [--overrun]

end: each operand, input or output, ends at the last byte before a page that may not be touched; start: it begins at
the first byte after one. An access outside kills the process by SIGSEGV; a write beside the operand, on its own pages,
shows in the pattern that was there. --overrun reads one row too many, to see that this is noticed.
"""

import ctypes
import math
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from tpffn_triton import interpreter
from tpffn_triton.kernels._configs import Config
from tpffn_triton.kernels.activations import halves
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.ffn_few_tokens import ffn_few_tokens
from tpffn_triton.kernels.ffn_single_launch import ffn_single_launch
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, wgrad, wgrad_accumulate
from tpffn_triton.kernels.weight_grads import weight_grads

PATTERN = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_surroundings: list[torch.Tensor] = []


def guarded(shape, dtype, at_end):
    """Return a tensor between two pages that fault; the rest of its own pages holds PATTERN."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    pages = -(-size // mmap.PAGESIZE)
    mapping = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    everything = torch.frombuffer(mapping, dtype=torch.uint8)
    inside = everything[mmap.PAGESIZE : -mmap.PAGESIZE].fill_(PATTERN)
    first = inside.numel() - size if at_end else 0
    for page in (everything.data_ptr(), everything.data_ptr() + (pages + 1) * mmap.PAGESIZE):
        assert _libc.mprotect(page, mmap.PAGESIZE, 0) == 0, "mprotect failed"
    _surroundings.append(inside[:first] if at_end else inside[size:])
    return inside[first : first + size].view(dtype).view(shape)


def main() -> None:
    """Run all calls; print how many there were."""
    at_end = sys.argv[1] == "end"
    interpreter.install()
    new_empty = torch.Tensor.new_empty

    def guarded_new_empty(self, shape, *, dtype=None, device=None):
        # The interpreter's own come with a device.
        return guarded(shape, dtype or self.dtype, at_end) if device is None else new_empty(self, shape, device=device)

    def randn(*shape, dtype):
        return guarded(shape, dtype, at_end).copy_(torch.randn(shape))

    calls = 0
    # Primes leave part of a tile over in every direction and go to the pointer kernels; the others fit TMA.
    for M, N, K in ((37, 41, 43), (40, 48, 56)):
        for dtype in (torch.float32, torch.bfloat16):
            for activation in ("gelu", "swiglu"):
                W = halves(activation) * N
                x, w1, b1 = randn(M, K, dtype=dtype), randn(W, K, dtype=dtype), randn(W, dtype=dtype)
                dy, w2, pre_act = randn(M, K, dtype=dtype), randn(K, N, dtype=dtype), randn(M, W, dtype=dtype)
                b2 = randn(K, dtype=dtype)
                torch.Tensor.new_empty = guarded_new_empty
                outputs = [
                    (linear_act(x, w1, b1, activation, True)[1], F.linear(x, w1, b1)),
                    (linear(x, w1, b1), F.linear(x, w1, b1)),
                    (dgrad(dy, w2), dy @ w2),
                    (wgrad(dy, x), dy.t() @ x),
                    (column_sum(dy), dy.sum(0)),
                ]
                d_pre, act, db_partial = linear_dact(dy, w2, pre_act, activation, True, True)
                gradients = weight_grads(d_pre, x, dy, act, db_partial, dy)
                accumulated = randn(K, K, dtype=torch.float32).zero_()
                wgrad_accumulate(accumulated, dy, x)
                ffns = [ffn_single_launch(x, w1, b1, w2, b2, activation, True)]
                slices = Config(64, 32, 32, 4, 2, USE_TMA=M == 40, SPLIT_K=2, PREFETCH_K=64)
                ffns.append(ffn_few_tokens(x, w1, b1, w2, b2, activation, True, slices))
                torch.Tensor.new_empty = new_empty
                outputs.append((accumulated, (dy.t() @ x).float()))
                for y, hidden, pre_act in ffns:
                    outputs += [(pre_act, F.linear(x, w1, b1)), (y, F.linear(hidden, w2, b2))]
                expected = (d_pre.t() @ x, dy.t() @ act, db_partial.sum(0), dy.sum(0))
                outputs += zip(gradients, expected, strict=True)
                tolerance = 1e-4 if dtype == torch.float32 else 0.3
                for ours, eager in outputs:
                    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
                calls += 10
    for beside in _surroundings:
        assert (beside == PATTERN).all(), "written beside an operand"
    if "--overrun" in sys.argv:
        # A tensor that claims one row more than its memory holds.
        short = randn(32, 32, dtype=torch.float32)
        linear(
            short.as_strided((33, 32), (32, 1)),
            randn(32, 32, dtype=torch.float32),
            None,
            config=Config(32, 32, 32, 4, 2),
        )
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
