"""Decide what computes: the one place.

    device of the tensors          implementation
    cuda (NVIDIA, ROCm)            "triton"               compiled Triton kernels
    cpu, TRITON_INTERPRET=1        "triton-interpreted"   the same kernels, run by Triton's interpreter
    cpu                            "native"               torch and oneDNN (native.py)

TRITON_INTERPRET must be set before `tpffn_triton` is imported: Triton reads it when a kernel is decorated.
"""

import functools
import logging
from types import ModuleType, SimpleNamespace

import torch

from tpffn_triton import interpreter, native
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, wgrad

_log = logging.getLogger("tpffn_triton")
_TRITON = SimpleNamespace(
    linear_act=linear_act, linear=linear, linear_dact=linear_dact, dgrad=dgrad, wgrad=wgrad, column_sum=column_sum
)


def backend(device: torch.device | str) -> str:
    """Return "triton", "triton-interpreted" or "native": what computes on tensors of this device.

    Raises: ValueError: a device that has no implementation.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "triton"
    if kind == "cpu":
        return "triton-interpreted" if interpreter.interpreting() else "native"
    raise ValueError(f"tpffn_triton computes on cuda and cpu tensors, got device {str(device)!r}")


@functools.lru_cache
def _announce(name: str, kind: str) -> None:
    _log.info("tpffn_triton: %s tensors are computed by %s", kind, name)


def implementation(device: torch.device | str) -> ModuleType | SimpleNamespace:
    """Return the namespace of linear_act, linear, linear_dact, dgrad, wgrad and column_sum for a device; logs each
    choice once, at level INFO, to the logger "tpffn_triton"."""
    name = backend(device)
    _announce(name, torch.device(device).type)
    if name == "native":
        return native
    interpreter.install()
    return _TRITON
