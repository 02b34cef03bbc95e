"""Tensor-parallel transformer FFN, act(x W1 + b1) W2 + b2, with fused Triton kernels forward and backward.

ffn                  the operator on this rank's shards
TensorParallelFFN    the same as a module
reduce_replicated_grads    after backward under sequence parallelism
backend              what computes on a device: compiled Triton, interpreted Triton, or torch and oneDNN
sharding, reference, plan    cut weights, compare with eager, count shapes and communication
"""

from tpffn_triton.backends import backend
from tpffn_triton.functional import ffn
from tpffn_triton.machines import Machine
from tpffn_triton.module import TensorParallelFFN
from tpffn_triton.replicated_grads import reduce_replicated_grads

__version__ = "0.1.0"
__all__ = ["Machine", "TensorParallelFFN", "backend", "ffn", "reduce_replicated_grads"]
