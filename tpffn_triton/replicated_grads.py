"""Sum the gradients of replicated parameters that saw only one rank's part of the sequence."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpffn_triton.agreement import compare
from tpffn_triton.collectives import all_reduce, resolve_group
from tpffn_triton.module import TensorParallelFFN

# The texts that a group's ranks compared last.
_compared: "weakref.WeakKeyDictionary[dist.ProcessGroup, str]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def reduce_replicated_grads(module: nn.Module, tp_group: "dist.ProcessGroup | DeviceMesh | None" = None) -> None:
    """Sum over tp_group, in place, the gradients of replicated parameters that saw this rank's tokens alone.

    Call it once a step, on all ranks, after the last backward and before the optimizer. These parameters are
    linear_fc2.bias of the layers in module with sequence_parallel, and all whose attribute `sequence_parallel` is true:
    mark those of norms between the layers (Megatron-LM's convention); after FSDP2, which makes new parameters. One
    all-reduce for each dtype. Where a parameter has no `grad` but a `main_grad`, that is summed; one without either
    counts as zeros, and has a gradient afterwards, so that all ranks send the same; a frozen one is left out.
    Gradients may be DTensors over another mesh (FSDP2). Ranks compare what they are to send, once.

    tp_group   None: that of the layers in module with sequence_parallel

    Raises: ValueError: no tp_group, and such layers of several groups in module, or marked parameters and no such
    layer; or ranks that would send different gradients.
    """
    layers = [m for m in module.modules() if isinstance(m, TensorParallelFFN) and m.sequence_parallel]
    # By identity as well: what replaces parameters loses marks.
    biases = {id(layer.linear_fc2.bias) for layer in layers}
    replicated = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (getattr(parameter, "sequence_parallel", False) or id(parameter) in biases)
    }
    group = _group_of(layers, replicated) if tp_group is None else resolve_group(tp_group)
    if group is None:
        return
    gradients = {name: _gradient(parameter) for name, parameter in replicated.items()}
    text = ", ".join(f"{name} {list(gradient.shape)} {gradient.dtype}" for name, gradient in gradients.items())
    if _compared.get(group) != text:
        compare(group, {"gradients": f"gradients of {text or 'nothing'}"})
        _compared[group] = text
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients.values():
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for parts in by_dtype.values():
        total = all_reduce(torch.cat([part.flatten() for part in parts]), group)
        for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view(part.shape))


def _gradient(parameter: Any) -> Tensor:
    """Return this rank's part of the parameter's gradient, to be written to."""
    gradient = parameter.grad
    if gradient is None:
        gradient = getattr(parameter, "main_grad", None)
    if gradient is None:
        gradient = parameter.grad = torch.zeros_like(parameter)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _group_of(layers: list[TensorParallelFFN], replicated: dict[str, nn.Parameter]) -> "dist.ProcessGroup | None":
    groups = {layer.tp_group for layer in layers}
    if len(groups) > 1:
        names = ", ".join("none" if group is None else group.group_name for group in groups)
        raise ValueError(f"layers of {len(groups)} tensor-parallel groups ({names}): give tp_group, one at a time")
    if replicated and not groups:
        raise ValueError(f"no TensorParallelFFN with sequence_parallel beside {', '.join(replicated)}: give tp_group")
    return groups.pop() if groups else None
