"""Decide what computes: the one place.

    device of the tensors          implementation
    cuda (NVIDIA, ROCm)            "triton"               compiled Triton kernels
    cpu, TRITON_INTERPRET=1        "triton-interpreted"   the same kernels, run by Triton's interpreter
    cpu                            "native"               torch and oneDNN (native.py)

TRITON_INTERPRET must be set before `tpffn_triton` is imported: Triton reads it when a kernel is decorated.
"""

import logging
from types import ModuleType, SimpleNamespace

import torch

from tpffn_triton import interpreter, native
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.forward import ffn_forward
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, linear_into, wgrad, wgrad_accumulate
from tpffn_triton.kernels.weight_grads import weight_grads, weight_grads_accumulate

_log = logging.getLogger("tpffn_triton")
_TRITON = SimpleNamespace(
    ffn_forward=ffn_forward,
    linear_act=linear_act,
    linear=linear,
    linear_into=linear_into,
    linear_dact=linear_dact,
    dgrad=dgrad,
    wgrad=wgrad,
    wgrad_accumulate=wgrad_accumulate,
    column_sum=column_sum,
    weight_grads=weight_grads,
    weight_grads_accumulate=weight_grads_accumulate,
)


def _choose(kind: str) -> str:
    if kind == "cuda":
        return "triton"
    if kind == "cpu":
        return "triton-interpreted" if interpreter.interpreting() else "native"
    raise ValueError(f"tpffn_triton computes on cuda and cpu tensors, got device {kind!r}")


def backend(device: torch.device | str) -> str:
    """Return "triton", "triton-interpreted" or "native": what computes on tensors of this device.

    Raises: ValueError: a device that has no implementation.
    """
    return _choose(torch.device(device).type)


# What has been asked for so far.
_ready: dict[str, ModuleType | SimpleNamespace] = {}


def implementation(kind: str) -> ModuleType | SimpleNamespace:
    """Return the namespace of one function per operator (ops.py) for "cpu" or "cuda" tensors; logs each choice once, at
    level INFO, to the logger "tpffn_triton"."""
    name = _choose(kind)
    if name not in _ready:
        interpreter.install()
        _log.info("tpffn_triton: %s tensors are computed by %s", kind, name)
        _ready[name] = native if name == "native" else _TRITON
    return _ready[name]
