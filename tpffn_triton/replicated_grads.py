"""Sum the gradients of replicated parameters that saw only one rank's part of the sequence."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpffn_triton.collectives import all_reduce, resolve_group
from tpffn_triton.module import TensorParallelFFN


@torch.no_grad()
def reduce_replicated_grads(module: nn.Module, tp_group: "dist.ProcessGroup | DeviceMesh | None" = None) -> None:
    """Sum over tp_group, in place, the gradients of replicated parameters that saw this rank's tokens alone.

    Call it once a step, on all ranks, after the last backward and before the optimizer. These parameters are
    linear_fc2.bias of the layers in module with sequence_parallel, and all whose attribute `sequence_parallel` is true:
    mark those of norms between the layers (Megatron-LM's convention). One all-reduce for each dtype. A parameter
    without a gradient counts as zeros, and has one afterwards, so that all ranks send the same; a frozen one is left
    out. Gradients may be DTensors over another mesh (FSDP2).

    tp_group   None: that of the TensorParallelFFN layers in module

    Raises: ValueError: no tp_group, and layers of several groups in module.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, TensorParallelFFN)]
    group = _group_of(layers) if tp_group is None else resolve_group(tp_group)
    if group is None:
        return
    # FSDP replaces parameters, whose marks are lost.
    biases = {id(layer.linear_fc2.bias) for layer in layers if layer.sequence_parallel}
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad or not (
            getattr(parameter, "sequence_parallel", False) or id(parameter) in biases
        ):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_dtype.setdefault(local.dtype, []).append(local)
    for gradients in by_dtype.values():
        total = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), group)
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))


def _group_of(layers: list[TensorParallelFFN]) -> "dist.ProcessGroup | None":
    groups = {layer.tp_group for layer in layers}
    if len(groups) > 1:
        names = ", ".join("none" if group is None else group.group_name for group in groups)
        raise ValueError(f"layers of {len(groups)} tensor-parallel groups ({names}): give tp_group, one at a time")
    return groups.pop() if groups else None
