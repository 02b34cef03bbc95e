"""An MLP written by somebody else, computed by `ffn`: the same module, its parameters under the same names.

    fc1, or gate and up    column-parallel    weight Shard(0), bias Shard(0)       Conv1D's weight, [in, out]: Shard(1)
    fc2                    row-parallel       weight Shard(1), bias Replicate()    Conv1D's weight: Shard(0)

Over a mesh parameters are DTensors with the placements that torch's ColwiseParallel and RowwiseParallel give them, so a
distributed checkpoint of one is one of the other, and of any number of ranks. Without a mesh they stay as they are.

The kernels read a gated w1 as one matrix, gate above up. So the two are halves of one piece of memory, which is handed
over as it is. Where something has moved one of them (FSDP2, `parameter.data = ...`), and under torch.compile, they are
copied together at each call. Conv1D's weights lie transposed in memory, for the same reason.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tpffn_triton.collectives import resolve_group
from tpffn_triton.functional import ffn
from tpffn_triton.machines import Machine
from tpffn_triton.mlp_twins import is_conv1d, sizes_of
from tpffn_triton.mlp_wiring import Wiring
from tpffn_triton.module import LinearShard, copy_but_share
from tpffn_triton.regions import copy_to_tp_region
from tpffn_triton.transforms import transforming
from tpffn_triton.validation import check_memory, check_options, check_sizes

_log = logging.getLogger("tpffn_triton")


@dataclass(frozen=True)
class Options:
    """Those of `tpffn_triton.ffn`, by the same names. Raises: TypeError, ValueError: as there."""

    sequence_parallel: bool = False
    save: str = "pre_act"
    reduce_dtype: torch.dtype | None = None
    forward_chunks: int | Machine = 1
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        check_options(self.save, self.sequence_parallel, self.reduce_dtype, self.forward_chunks, self.batch_invariant)


@dataclass
class _Fused:
    """What a TensorParallelMLP knows of itself beside its parameters."""

    wiring: Wiring
    mesh: DeviceMesh | None
    tp_group: Any  # the process group; None for one rank
    options: Options
    second_half: nn.Module | None  # which holds fc2, where the MLP is two modules
    copies: bool = False  # whether it was said that gate and up are copied together


class PlacedShard(LinearShard):
    """One rank's weight [out_features, in_features] and bias, plain or DTensors, of what was an nn.Linear."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the full weight and bias as nn.Linear does, and keep this rank's."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])  # a DTensor's shape is that of the whole
            self.bias.uniform_(-bound, bound)


class Conv1DShard(LinearShard):
    """One rank's weight [in_features, out_features] and bias of transformers' Conv1D."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the full weight and bias as Conv1D does, and keep this rank's."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (weight [out_features, in_features], bias)."""
        return self.weight.t(), self.bias


class PassingShard(PlacedShard):
    """The second linear of an MLP that is two modules, of which the first computes the whole."""

    def forward(self, *inputs: Tensor) -> Any:
        """Return, to the second module, inputs[0], which is the MLP's result; to the first, which gives none, (weight,
        bias)."""
        return inputs[0] if inputs else (self.weight, self.bias)


def only_input(inputs: tuple, named: dict) -> Any:
    """Return the one argument of a call. Raises: TypeError: there is another number of them."""
    values = (*inputs, *named.values())
    if len(values) != 1:
        raise TypeError(f"the MLP takes one tensor x, got {len(inputs)} by position and {list(named)} by name")
    return values[0]


class TensorParallelMLP(nn.Module):
    """Compute fc2(act(fc1(x))), gated fc2(act(gate(x)) · up(x)), by one `tpffn_triton.ffn`, then the module's dropouts.

    `replace_mlp` makes one of a module, in place. Its linears become PlacedShards, which hand out their weights when
    called; whatever else it has stays.

    x, y    [..., H], the same on every rank of the group; with sequence_parallel this rank's tokens, equally many on
            each, whichever of the leading dims is cut
    """

    _fused: _Fused

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return y [..., H] of x, by position or under whatever name the module's callers know it.

        Raises: TypeError: not one argument. And as `tpffn_triton.ffn`.
        """
        x = only_input(inputs, named)
        fused = self._fused
        wiring, options = fused.wiring, fused.options
        # By name: what somebody has wrapped around a linear is called, not passed by.
        fc1 = [_local(self.get_submodule(name)(x)) for name in wiring.fc1]
        w1, b1 = fc1[0] if len(fc1) == 1 else self._joined(*fc1)
        home = fused.second_half
        w2, b2 = _local(self.get_submodule(wiring.fc2)(x) if home is None else home.get_submodule(wiring.fc2)())
        if not (torch.compiler.is_compiling() or transforming()):
            check_memory(w1, w2)
        if options.sequence_parallel and b2 is not None:
            b2 = copy_to_tp_region(b2, fused.tp_group)  # its gradient is of this rank's tokens
        y = ffn(
            x,
            w1,
            w2,
            b1,
            b2,
            activation=wiring.activation,
            tp_group=fused.tp_group,
            sequence_parallel=options.sequence_parallel,
            save=options.save,
            reduce_dtype=options.reduce_dtype,
            forward_chunks=options.forward_chunks,
            batch_invariant=options.batch_invariant,
        )
        for name in wiring.dropouts:
            y = self.get_submodule(name)(y)
        return y

    def _joined(self, gate: tuple, up: tuple) -> tuple[Tensor, Tensor | None]:
        (gate_weight, gate_bias), (up_weight, up_bias) = gate, up
        as_it_is = not torch.compiler.is_compiling() and not transforming() and _adjacent(gate_weight, up_weight)
        if not (as_it_is or self._fused.copies or torch.compiler.is_compiling()):
            self._fused.copies = True
            _log.info("tpffn_triton: gate and up are no longer side by side in memory: copied together at each call")
        w1 = _SideBySide.apply(gate_weight, up_weight) if as_it_is else torch.cat([gate_weight, up_weight])
        return w1, None if gate_bias is None else torch.cat([gate_bias, up_bias])

    def _lay_side_by_side(self) -> None:
        """Make gate's and up's weights halves of one piece of memory, unless FSDP has cut or somebody wrapped them."""
        weights = self._fc1_weights()
        if len(weights) < 2 or any(getattr(weight, "device_mesh", None) != self._fused.mesh for weight in weights):
            return
        gate, up = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        if _adjacent(gate, up) or not (gate.is_contiguous() and up.is_contiguous()):
            return
        mesh = self._fused.mesh
        if mesh is not None and gate.device.type not in (mesh.device_type, "meta"):
            return  # from_local would move them to the mesh's devices
        for weight, half in zip(weights, torch.cat([gate.detach(), up.detach()]).split(gate.shape[0]), strict=True):
            if isinstance(weight, DTensor):
                # Anew: torch.compile does not take a DTensor whose local tensor has moved.
                parameter = _with_local(weight, half)
                parameter.grad = weight.grad
                torch.utils.swap_tensors(weight, parameter)
            else:
                weight.data = half

    def _fc1_weights(self) -> list[Any]:
        shards = [self.get_submodule(name) for name in self._fused.wiring.fc1]
        return [shard.weight for shard in shards if isinstance(shard, LinearShard)]

    def _apply(self, fn: Callable, recurse: bool = True) -> "TensorParallelMLP":
        super()._apply(fn, recurse)
        self._lay_side_by_side()  # to() and its like move each by itself
        return self

    def __deepcopy__(self, memo: dict) -> "TensorParallelMLP":
        """Copy everything but the mesh and the process group, which the copies share."""
        mesh = self._fused.mesh
        parameters: list[Any] = [p for p in self.parameters() if isinstance(p, DTensor) and p.device_mesh == mesh]
        for parameter in parameters:  # torch copies none whose local tensor begins inside of its storage
            grad = parameter.grad
            copied = memo[id(parameter)] = _with_local(parameter, parameter.to_local().detach().clone())
            copied.grad = None if grad is None else _with_local(grad, grad.to_local().clone()).detach()
        twin = copy_but_share(self, memo, mesh, self._fused.tp_group)
        twin._lay_side_by_side()
        return twin

    def extra_repr(self) -> str:
        """Show what is computed, and over how many ranks."""
        wiring, group, options = self._fused.wiring, self._fused.tp_group, self._fused.options
        return (
            f"{' and '.join(wiring.fc1)}, {wiring.fc2}: hidden_size={wiring.hidden_size}, "
            f"ffn_hidden_size={wiring.ffn_hidden_size}, activation={wiring.activation!r}, "
            f"world_size={1 if group is None else group.size()}, save={options.save!r}, "
            f"sequence_parallel={options.sequence_parallel}"
        )


def replace_mlp(
    mlp: nn.Module,
    wiring: Wiring,
    mesh: DeviceMesh | None,
    options: Options,
    *,
    src_data_rank: int | None = None,
    second_half: nn.Module | None = None,
) -> None:
    """Turn a module into a TensorParallelMLP, in place.

    wiring           what `wiring_of` found
    mesh             1-D; None: one rank, whose parameters stay as they are
    src_data_rank    the rank of the mesh whose values all get; None: every rank cuts its own, which are the same
    second_half      the module that holds fc2, called with the MLP's result in the place of fc2's input

    Raises: ValueError: sizes or a mesh that do not fit, before anything is changed.
    """
    group = resolve_group(mesh)
    check_sizes(wiring.hidden_size, wiring.ffn_hidden_size, 1 if mesh is None else mesh.size())
    home = mlp if second_half is None else second_half
    kind = PlacedShard if second_half is None else PassingShard
    with torch.inference_mode(False):  # parameters made in it could never be trained
        for name in wiring.fc1:
            mlp.set_submodule(name, _column_parallel(mlp.get_submodule(name), mesh, src_data_rank))
        home.set_submodule(wiring.fc2, _row_parallel(home.get_submodule(wiring.fc2), mesh, src_data_rank, kind))
    # Not a new module: torch's parallelize_module ignores what a style returns.
    mlp.__class__ = TensorParallelMLP
    own: Any = mlp
    # Not by setattr: second_half has a place in the model already.
    own.__dict__["_fused"] = _Fused(wiring, mesh, group, options, second_half)
    with torch.inference_mode(False):
        own._lay_side_by_side()


def describe(module: nn.Module, wiring: Wiring) -> str:
    """Return what ranks compare before they communicate: the wiring, and every parameter's kind."""
    parameters = (
        f"{name} {list(p.shape)} {p.dtype} on {p.device.type}{'' if p.requires_grad else ', frozen'}"
        for name, p in module.named_parameters()
    )
    return f"{wiring} of {'; '.join(parameters)}"


def _column_parallel(linear: nn.Module, mesh: DeviceMesh | None, src_data_rank: int | None) -> LinearShard:
    in_features, out_features = sizes_of(linear)
    out_features //= 1 if mesh is None else mesh.size()
    return _shard(PlacedShard, linear, (in_features, out_features), (Shard(0), Shard(0)), mesh, src_data_rank)


def _row_parallel(
    linear: nn.Module, mesh: DeviceMesh | None, src_data_rank: int | None, kind: type[LinearShard]
) -> LinearShard:
    in_features, out_features = sizes_of(linear)
    in_features //= 1 if mesh is None else mesh.size()
    return _shard(kind, linear, (in_features, out_features), (Shard(1), Replicate()), mesh, src_data_rank)


def _shard(
    kind: type[LinearShard],
    linear: Any,
    sizes: tuple[int, int],
    placements: tuple[Placement, Placement],
    mesh: DeviceMesh | None,
    src_data_rank: int | None,
) -> LinearShard:
    """Return what holds a linear's parameters. placements: of a weight [out, in] and of the bias."""
    transposed = is_conv1d(linear)
    shard = (Conv1DShard if transposed else kind)(*sizes, linear.bias is not None, device="meta")
    for name, placement in zip(("weight", "bias"), placements, strict=True):
        parameter = getattr(linear, name)
        if parameter is None:
            continue
        turned = transposed and name == "weight"
        if mesh is not None:
            cut = Shard(1 - placement.dim) if turned and isinstance(placement, Shard) else placement
            full = distribute_tensor(parameter.detach(), mesh, [cut], src_data_rank=src_data_rank)
            if turned:
                full = DTensor.from_local(_transposed(full.to_local()), mesh, [cut], run_check=False)
            parameter = nn.Parameter(full, parameter.requires_grad)
        elif turned:
            parameter.data = _transposed(parameter.data)
        setattr(shard, name, parameter)
    return shard


def _transposed(t: Tensor) -> Tensor:
    """Return the same matrix, its columns contiguous."""
    return t.t().contiguous().t()


def _with_local(parameter: Any, local: Tensor) -> Any:
    """Return a DTensor parameter with another local tensor."""
    full = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
    return nn.Parameter(full, parameter.requires_grad)


def _local(tensors: tuple[Tensor, Tensor | None]) -> Any:
    """Return this rank's (weight, bias)."""
    return tuple(t.to_local() if isinstance(t, DTensor) else t for t in tensors)


def _adjacent(gate: Tensor, up: Tensor) -> bool:
    """Say whether up's rows follow gate's in memory."""
    return (
        gate.is_contiguous()
        and up.is_contiguous()
        and gate.untyped_storage()._cdata == up.untyped_storage()._cdata
        and up.storage_offset() == gate.storage_offset() + gate.numel()
    )


class _SideBySide(torch.autograd.Function):
    """One matrix of two that are adjacent in memory, without a copy."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.rows = gate.shape[0], up.shape[0]
        return gate.detach().as_strided((sum(ctx.rows), gate.shape[1]), gate.stride())

    @staticmethod
    def backward(ctx: Any, dw1: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = dw1.split(ctx.rows)
        return gate, up
