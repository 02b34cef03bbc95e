"""A ParallelStyle for torch's parallelize_module: an MLP's two or three linears as one fused tensor-parallel FFN.

    parallelize_module(model, mesh["tp"], {"layers.*.mlp": FusedFFNParallel()})

takes the place of ColwiseParallel and RowwiseParallel on the linears, with their placements and communication.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from tpffn_triton.agreement import compare, reject
from tpffn_triton.collectives import resolve_group
from tpffn_triton.machines import Machine
from tpffn_triton.mlp_wiring import wiring_of
from tpffn_triton.tensor_parallel_mlp import Options, TensorParallelMLP, describe, only_input, replace_mlp
from tpffn_triton.validation import check_activation, check_sizes


class FusedFFNParallel(ParallelStyle):
    """Turn a module that computes fc2(act(fc1(x))), or gated fc2(act(gate(x)) · up(x)), into a TensorParallelMLP.

    activation       which one the module must compute; None: whichever it does, found by its values
    input_layouts    of x [..., H]: Replicate(), or Shard(dim) of one that counts tokens (sequence parallelism)
    output_layouts   of y: the same as x's
    use_local_output   y is a torch.Tensor, this rank's; False: a DTensor
    save, reduce_dtype, forward_chunks, batch_invariant
                     as in `tpffn_triton.ffn`

    The module stays in its place, its linears nn.Linear's or transformers' Conv1D under any names; their parameters
    become DTensors under the same names. x may be a torch.Tensor of this layout or a DTensor of any.

    Raises: TypeError, ValueError: here, options that do not fit; when it is applied, a module that computes no FFN
    known, or has something that would be lost (says what), a mesh of more than one dim, an F that P does not divide; on
    every rank, if one of them raises or has another MLP. CollectiveError: a rank did not come.
    """

    def __init__(
        self,
        *,
        activation: str | None = None,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        save: str = "pre_act",
        reduce_dtype: torch.dtype | None = None,
        forward_chunks: int | Machine = 1,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        if activation is not None:
            check_activation(activation)
        layouts = [Replicate() if layout is None else layout for layout in (input_layouts, output_layouts)]
        if input_layouts is not None and output_layouts is None:
            layouts[1] = input_layouts
        if layouts[0] != layouts[1] or not isinstance(layouts[0], Replicate | Shard):
            raise ValueError(
                f"input_layouts and output_layouts must be the same, Replicate() or Shard(dim); got {layouts[0]} and "
                f"{layouts[1]}: torch's PrepareModuleInput and PrepareModuleOutput lead from others"
            )
        self.activation, self.layout, self.use_local_output = activation, layouts[0], use_local_output
        sequence_parallel = isinstance(self.layout, Shard)
        self.options = Options(sequence_parallel, save, reduce_dtype, forward_chunks, batch_invariant)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = resolve_group(device_mesh)
        try:
            if isinstance(module, TensorParallelMLP):
                raise ValueError(f"{type(self).__name__} has been applied to this module before: {module}")
            wiring = wiring_of(module, self.activation)
            check_sizes(wiring.hidden_size, wiring.ffn_hidden_size, device_mesh.size())
        except ValueError as error:
            if group is not None:
                reject(group, error)  # the others are about to communicate
            raise
        if group is not None:
            compare(group, {"MLP": f"{describe(module, wiring)}, by {self}"})
        replace_mlp(module, wiring, device_mesh, self.options, src_data_rank=self.src_data_rank)
        module.register_forward_pre_hook(partial(self._prepare_input, device_mesh), with_kwargs=True)
        module.register_forward_hook(partial(self._prepare_output, device_mesh))
        return module

    def _prepare_input(self, mesh: DeviceMesh, module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        x = only_input(inputs, named)
        if isinstance(self.layout, Shard) and self.layout.dim % x.dim() == x.dim() - 1:
            raise ValueError(f"{self.layout} would cut the features of x {list(x.shape)}: cut a dim that counts tokens")
        return (x.redistribute(mesh, [self.layout]).to_local() if isinstance(x, DTensor) else x,), {}

    def _prepare_output(self, mesh: DeviceMesh, module: nn.Module, inputs: tuple, y: Tensor) -> Any:
        return y if self.use_local_output else DTensor.from_local(y, mesh, [self.layout], run_check=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(activation={self.activation!r}, layouts={self.layout}, "
            f"use_local_output={self.use_local_output}, {self.options})"
        )
