"""FusedMLP: Megatron-Core's MLP with `tpffn_triton.ffn` as its forward.

By inheritance its constructor, parameters with their attributes and initial values, and checkpoints are those of the
installed version. Its linear_fc1 and linear_fc2 are Megatron's ColumnParallelLinear and RowParallelLinear, except that
calling one runs its hooks and hands out (weight, bias).

Communication is that of Megatron's own linears, but for the order: dx's all-reduce (or reduce-scatter) is in flight
behind both weight gradients, where Megatron's hides behind linear_fc1's alone.

Source: megatron-core 0.12.0 to 0.16.1, transformer/mlp.py and tensor_parallel/layers.py.
"""

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

try:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import utils as transformer_utils
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
except ModuleNotFoundError as error:
    raise ImportError(
        f"tpffn_triton.megatron needs megatron-core, 0.12 or later ({error}): pip install 'tpffn-triton[megatron]'"
    ) from error

from tpffn_triton.functional import ffn
from tpffn_triton.machines import Machine
from tpffn_triton.megatron_options import activation_of, check_options
from tpffn_triton.validation import check_memory, check_modes

# What some version of TransformerLayer passes to an MLP.
KNOWN_ELSEWHERE = {"name", "pg_collection", "is_mtp_layer"}


class _HandsOutWeights(nn.Module):
    """Have one of Megatron's linears return (weight, bias) in place of a product.

    FusedMLP calls it, rather than reading its attributes: Megatron's distributed optimizer gathers parameters in
    hooks on the module that owns them.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        # With gradient_accumulation_fusion Megatron's constructor asks for APEX, which is not needed here.
        plain = copy.copy(config)
        plain.gradient_accumulation_fusion = False
        super().__init__(*args, config=plain, **kwargs)
        self.config = config
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias): [k·F/P, H] and [k·F/P] of linear_fc1, [H, F/P] and [H] of linear_fc2."""
        return self.weight, self.bias

    def backward_dw(self) -> None:
        """Do nothing: backward has computed the weight gradients."""


class ColumnParallelShard(_HandsOutWeights, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear as the owner of linear_fc1's parameters."""


class RowParallelShard(_HandsOutWeights, RowParallelLinear):
    """Megatron's RowParallelLinear as the owner of linear_fc2's parameters."""


class FusedMLP(MLP):
    """Compute Megatron-Core's MLP by `tpffn_triton.ffn`.

    config        TransformerConfig; read are add_bias_linear, gated_linear_unit, activation_func,
                  bias_activation_fusion (with which gelu is tanh), sequence_parallel, gradient_accumulation_fusion
                  The activation is settled here; sequence_parallel is read on each call.
    submodules    None, or MLPSubmodules of ColumnParallelLinear and RowParallelLinear, whose parameters these hold
    tp_group      default: pg_collection.tp, else parallel_state's tensor-parallel group
    save, reduce_dtype, forward_chunks
                  as in `tpffn_triton.ffn`
    kwargs        what a version of TransformerLayer passes beside these: for the installed MLP, else ignored

    Raises: TypeError: config is not one. ValueError: an option that is not honoured, by name; sizes that do not make an
    FFN from H to H.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLPSubmodules | None = None,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: "torch.distributed.ProcessGroup | None" = None,
        *,
        save: str = "pre_act",
        reduce_dtype: torch.dtype | None = None,
        forward_chunks: int | Machine = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"config must be a TransformerConfig, got {type(config).__name__}")
        check_options(config)
        check_linears(submodules)
        if is_expert:
            raise ValueError("FusedMLP is no expert of a mixture (is_expert=True): use Megatron's experts")
        # linear_fc2 of Megatron's MLP leads from config.ffn_hidden_size to config.hidden_size, whatever is passed.
        for name, given, own in (
            ("input_size", input_size, config.hidden_size),
            ("ffn_hidden_size", ffn_hidden_size, config.ffn_hidden_size),
        ):
            if given not in (None, own):
                raise ValueError(f"FusedMLP has {name}={own}, as in its config; got {given}")
        activation = activation_of(config)
        check_modes(activation, save, config.sequence_parallel, reduce_dtype, forward_chunks)
        known = inspect.signature(MLP.__init__).parameters
        if unknown := kwargs.keys() - known.keys() - KNOWN_ELSEWHERE:
            warnings.warn(f"FusedMLP ignores {', '.join(sorted(unknown))}", stacklevel=2)
        given_group, default = tp_group or getattr(kwargs.get("pg_collection"), "tp", None), _default_group()
        if given_group is None:
            _warn_of_another_size(default, config.tensor_model_parallel_size)
        elif "tp_group" not in known and given_group is not default:
            raise ValueError("this version of megatron-core has one tensor-parallel group, parallel_state's")
        kwargs |= {"ffn_hidden_size": config.ffn_hidden_size, "tp_group": given_group or default}
        own_submodules = MLPSubmodules(linear_fc1=ColumnParallelShard, linear_fc2=RowParallelShard)
        super().__init__(config, own_submodules, **{name: kwargs[name] for name in known if name in kwargs})
        self.activation, self.save = activation, save
        self.reduce_dtype, self.forward_chunks = reduce_dtype, forward_chunks

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, linear_fc2.bias), whose sum is the MLP's result; Megatron adds them with its dropout.

        hidden_states, output    [S, B, H]; with sequence parallelism [S/P, B, H], this rank's slice
        kwargs                   padding_mask, and whatever else is meant for a mixture of experts: ignored

        Raises: ValueError: per_token_scale, or linears that disagree on sequence_parallel. And as `tpffn_triton.ffn`.
        """
        if per_token_scale is not None:
            raise ValueError("FusedMLP does not support per_token_scale, which is for experts")
        w1, b1 = self.linear_fc1()
        w2, b2 = self.linear_fc2()
        if not torch.compiler.is_compiling():
            check_memory(w1, w2)
        group = getattr(self.linear_fc1, "tp_group", None) or _default_group()  # before 0.13 there is one
        output = ffn(
            hidden_states,
            w1,
            w2,
            b1,
            activation=self.activation,
            tp_group=group,
            sequence_parallel=self._sequence_parallel(group),
            save=self.save,
            gradient_accumulation_fusion=self._adds_to_main_grads(),
            reduce_dtype=self.reduce_dtype,
            forward_chunks=self.forward_chunks,
        )
        # A view: Megatron's checkpoint would make the parameter itself its own output, and recurse in backward.
        return output, None if b2 is None else b2.view_as(b2)

    def _sequence_parallel(self, group: Any) -> bool:
        """Read it on each call: inference switches it off on the linears. Over one rank linear_fc1 has it off."""
        fc1, fc2 = self.linear_fc1.sequence_parallel, self.linear_fc2.sequence_parallel
        if fc1 != fc2 and group is not None and group.size() > 1:
            raise ValueError(f"sequence_parallel must be one for both: linear_fc1 {fc1}, linear_fc2 {fc2}")
        return fc1

    def _adds_to_main_grads(self) -> bool:
        """Say whether backward is to add weight gradients to fp32 `main_grad`s. Megatron adds those it returns."""
        if not (self.config.gradient_accumulation_fusion and torch.is_grad_enabled()):
            return False
        for name in ("linear_fc1", "linear_fc2"):
            weight = getattr(self, name).weight
            found = getattr(getattr(weight, "main_grad", None), "dtype", None)
            if weight.requires_grad and found != torch.float32:
                warnings.warn(
                    "gradient_accumulation_fusion needs a main_grad in torch.float32 of each weight, "
                    f"{name}.weight's is {found}: weight gradients are returned, for Megatron to add",
                    stacklevel=3,
                )
                return False
        return True

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Return Megatron's own: fc1 cut along axis 0, gate and up rows apart, fc2's weight along axis 1."""
        # From 0.16 on Megatron's linears want a group in it, which its models put there.
        ensure = getattr(transformer_utils, "ensure_metadata_has_dp_cp_group", None)
        if ensure is not None:
            metadata = ensure(None if metadata is None else dict(metadata))
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def backward_dw(self) -> None:
        """Do nothing: backward has computed the weight gradients, also with delay_wgrad_compute."""

    def set_layer_number(self, layer_number: int) -> None:
        """Remember which layer of the model this is, from 1 on."""
        self.layer_number = layer_number

    def extra_repr(self) -> str:
        """Show what is computed and how."""
        return (
            f"activation={self.activation!r}, save={self.save!r}, reduce_dtype={self.reduce_dtype}, "
            f"forward_chunks={getattr(self.forward_chunks, 'name', self.forward_chunks)!r}"
        )


def check_linears(submodules: Any, others: tuple = ()) -> None:
    """Check that the linears which FusedMLP's are in the place of are absent, Megatron's own, or among others.

    Raises: ValueError: some whose work would be lost, such as Transformer Engine's with a norm inside.
    """
    for name, own, held in (
        ("linear_fc1", ColumnParallelLinear, ColumnParallelShard),
        ("linear_fc2", RowParallelLinear, RowParallelShard),
    ):
        given = getattr(submodules, name, None)
        given = getattr(given, "module", given)  # of a ModuleSpec
        if given not in (None, own, held, *others):
            shown = getattr(given, "__name__", given)
            hint = "" if others else "; replace_mlp(spec) takes specs of Transformer Engine"
            raise ValueError(f"FusedMLP takes the place of {own.__name__} as {name}, not of {shown}{hint}")


def _default_group() -> "torch.distributed.ProcessGroup | None":
    return parallel_state.get_tensor_model_parallel_group(check_initialized=False)


def _warn_of_another_size(group: Any, size: int) -> None:
    """A model may have groups of its own, and up to 0.17 no layer hands them on."""
    if group is not None and group.size() != size:
        warnings.warn(
            f"FusedMLP takes parallel_state's tensor-parallel group, of {group.size()} ranks, in a model with "
            f"tensor_model_parallel_size={size}: give replace_mlp a tp_group for another",
            stacklevel=3,
        )
