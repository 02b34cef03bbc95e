"""The FFN as a module: parameters of one rank's shards, named as Megatron-LM names them.

linear_fc1.weight [F/P, H]   linear_fc1.bias [F/P]     column-parallel; gated: [2F/P, H], [2F/P], gate above up
linear_fc2.weight [H, F/P]   linear_fc2.bias [H]       row-parallel; the bias is replicated
"""

import copy
import math
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton.collectives import resolve_group
from tpffn_triton.functional import ffn
from tpffn_triton.kernels.activations import halves
from tpffn_triton.machines import Machine
from tpffn_triton.sharding import shard_ffn
from tpffn_triton.validation import check_activation, check_memory, check_modes, check_sizes

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_but_share(module: ModuleT, memo: dict, *shared: Any) -> ModuleT:
    """Return a deep copy of a module that shares some objects with it, for its __deepcopy__."""
    memo |= {id(what): what for what in shared}
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return twin


class LinearShard(nn.Module):
    """Hold one rank's weight [out_features, in_features] and bias of a sharded linear; forward returns both.

    Calling it (rather than reading its attributes) lets hooks see that the parameters are about to be used.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias). inputs: for whatever is wrapped around it and takes what a linear takes."""
        return self.weight, self.bias

    def extra_repr(self) -> str:
        """Show the shard's sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TensorParallelFFN(nn.Module):
    """Compute act(x W1 + b1) W2 + b2 with W1 split by columns and W2 by rows over tp_group; x, y [..., H] replicated,
    or with sequence_parallel this rank's slices of dim 0.

    hidden_size, ffn_hidden_size   H and the full F; F is divisible by the group's size P
    bias                           both linears have a bias, or neither
    the other options              as in `tpffn_triton.ffn`

    With sequence_parallel `linear_fc2.bias` carries the attribute sequence_parallel=True (Megatron-LM's convention):
    its gradient is of this rank's tokens, until `tpffn_triton.reduce_replicated_grads` has summed it over the group.

    Initialised as nn.Linear(H, F) (gated: 2F) and nn.Linear(F, H) created in this order would be: each rank draws the
    full tensors and keeps its part, so the same seed on every rank gives the same full weights at every P.

    Under FSDP shard this module or one around it: linear_fc1 and linear_fc2 only hand out their weights.

    Raises: TypeError, ValueError: sizes, activation, save or group that do not fit (the message shows them).
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        tp_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        sequence_parallel: bool = False,
        save: str = "pre_act",
        gradient_accumulation_fusion: bool = False,
        reduce_dtype: torch.dtype | None = None,
        forward_chunks: int | Machine = 1,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_modes(activation, save, sequence_parallel, reduce_dtype, forward_chunks, batch_invariant)
        self.tp_group = resolve_group(tp_group)
        self.rank = 0 if self.tp_group is None else self.tp_group.rank()
        self.world_size = 1 if self.tp_group is None else self.tp_group.size()
        check_sizes(hidden_size, ffn_hidden_size, self.world_size)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation, self.sequence_parallel, self.save = activation, sequence_parallel, save
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        self.reduce_dtype, self.forward_chunks = reduce_dtype, forward_chunks
        self.batch_invariant = batch_invariant
        shard = ffn_hidden_size // self.world_size
        self.linear_fc1 = LinearShard(hidden_size, halves(activation) * shard, bias, device, dtype)
        self.linear_fc2 = LinearShard(shard, hidden_size, bias, device, dtype)
        self._mark_replicated()
        self.reset_parameters()

    def _mark_replicated(self) -> None:
        bias: Any = self.linear_fc2.bias
        if bias is not None:
            bias.sequence_parallel = self.sequence_parallel

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the full weights as nn.Linear does, uniform in ±1/√fan_in, and keep this rank's shards."""
        full = []
        for linear, out_features, in_features in (
            (self.linear_fc1, halves(self.activation) * self.ffn_hidden_size, self.hidden_size),
            (self.linear_fc2, self.hidden_size, self.ffn_hidden_size),
        ):
            bound = 1 / math.sqrt(in_features)
            weight = linear.weight.new_empty(out_features, in_features)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bias = None if linear.bias is None else linear.bias.new_empty(out_features).uniform_(-bound, bound)
            full += [weight, bias]
        self._load_full(*full)

    @torch.no_grad()
    def _load_full(self, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
        shards = shard_ffn(w1, b1, w2, b2, self.rank, self.world_size, activation=self.activation)
        own = (self.linear_fc1.weight, self.linear_fc1.bias, self.linear_fc2.weight, self.linear_fc2.bias)
        for parameter, shard in zip(own, shards, strict=True):
            if parameter is not None and shard is not None:
                parameter.copy_(shard)

    @classmethod
    def from_dense(
        cls,
        fc1: nn.Linear,
        fc2: nn.Linear,
        *,
        activation: str = "gelu",
        tp_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        sequence_parallel: bool = False,
        save: str = "pre_act",
        gradient_accumulation_fusion: bool = False,
        reduce_dtype: torch.dtype | None = None,
        forward_chunks: int | Machine = 1,
        batch_invariant: bool = False,
    ) -> "TensorParallelFFN":
        """Build this rank's module from the full linears: copies of their values, their dtype, device, training mode
        and requires_grad. The two must agree on whether there is a bias. Gated: fc1 has 2F outputs, gate before up.

        Raises: TypeError, ValueError: not nn.Linear, or shapes that do not chain (the message shows them).
        """
        for name, linear in (("fc1", fc1), ("fc2", fc2)):
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name} must be nn.Linear, got {type(linear).__name__}")
        if (fc1.bias is None) != (fc2.bias is None):
            raise ValueError(
                f"fc1 and fc2 must both have a bias or neither: fc1.bias {fc1.bias is not None}, "
                f"fc2.bias {fc2.bias is not None}"
            )
        if fc1.weight.dtype != fc2.weight.dtype:
            raise TypeError(f"one dtype expected, got fc1 {fc1.weight.dtype}, fc2 {fc2.weight.dtype}")
        check_activation(activation)
        if (halves(activation) * fc2.in_features, fc2.out_features) != (fc1.out_features, fc1.in_features):
            raise ValueError(
                f"fc2 must lead back from fc1{', gate and up' if halves(activation) == 2 else ''}: "
                f"fc1 {fc1.in_features} → {fc1.out_features}, fc2 {fc2.in_features} → {fc2.out_features}"
            )
        with torch.device("meta"):
            layer = cls(
                fc1.in_features,
                fc2.in_features,
                activation=activation,
                bias=fc1.bias is not None,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
                save=save,
                gradient_accumulation_fusion=gradient_accumulation_fusion,
                reduce_dtype=reduce_dtype,
                forward_chunks=forward_chunks,
                batch_invariant=batch_invariant,
                dtype=fc1.weight.dtype,
            )
        layer.to_empty(device=fc1.weight.device).train(fc1.training)
        layer._mark_replicated()  # to_empty made new parameters
        layer._load_full(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        for own, dense in ((layer.linear_fc1, fc1), (layer.linear_fc2, fc2)):
            for name, parameter in own.named_parameters():
                parameter.requires_grad_(getattr(dense, name).requires_grad)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., H] of x [..., H]; see `tpffn_triton.ffn`."""
        w1, b1 = self.linear_fc1(x)
        w2, b2 = self.linear_fc2(x)
        # FSDP2 changes the class of what it shards.
        sharded = not (type(self.linear_fc1) is type(self.linear_fc2) is LinearShard)
        if sharded and not torch.compiler.is_compiling():
            check_memory(w1, w2)
        return ffn(
            x,
            w1,
            w2,
            b1,
            b2,
            activation=self.activation,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            save=self.save,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            reduce_dtype=self.reduce_dtype,
            forward_chunks=self.forward_chunks,
            batch_invariant=self.batch_invariant,
        )

    def __deepcopy__(self, memo: dict) -> "TensorParallelFFN":
        """Copy everything but the process group, which the copies share."""
        twin = copy_but_share(self, memo, self.tp_group)
        twin._mark_replicated()  # a parameter's copy has no attributes
        return twin

    def extra_repr(self) -> str:
        """Show the full sizes and the sharding."""
        return (
            f"hidden_size={self.hidden_size}, ffn_hidden_size={self.ffn_hidden_size}, activation={self.activation!r}, "
            f"rank={self.rank}, world_size={self.world_size}, save={self.save!r}, "
            f"sequence_parallel={self.sequence_parallel}, reduce_dtype={self.reduce_dtype}, "
            f"forward_chunks={getattr(self.forward_chunks, 'name', self.forward_chunks)!r}, "
            f"batch_invariant={self.batch_invariant}"
        )
