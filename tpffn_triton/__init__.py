"""Tensor-parallel transformer FFN, act(x W1 + b1) W2 + b2, with fused Triton kernels forward and backward.

ffn                  the operator on this rank's shards
TensorParallelFFN    the same as a module
reduce_replicated_grads    after backward under sequence parallelism
CollectiveError      a collective failed, or a rank did not come to compare arguments
compare_ranks, comparing_every_call    find out why ranks drift apart
explain              which kernels a layer launches at a size, with which tiles, and why
load_tuning          let what bench/tune.py measured on this GPU choose tiles
backend              what computes on a device: compiled Triton, interpreted Triton, or torch and oneDNN
sharding, reference, plan    cut weights, compare with eager, count shapes and communication
"""

from tpffn_triton.agreement import comparing_every_call
from tpffn_triton.backends import backend
from tpffn_triton.comparison import compare_ranks
from tpffn_triton.explanation import explain
from tpffn_triton.functional import ffn
from tpffn_triton.group_store import CollectiveError
from tpffn_triton.kernels._launch import load_tuning
from tpffn_triton.machines import Machine
from tpffn_triton.module import TensorParallelFFN
from tpffn_triton.replicated_grads import reduce_replicated_grads

__version__ = "0.1.0"
__all__ = [
    "CollectiveError",
    "Machine",
    "TensorParallelFFN",
    "backend",
    "compare_ranks",
    "comparing_every_call",
    "explain",
    "ffn",
    "load_tuning",
    "reduce_replicated_grads",
]
