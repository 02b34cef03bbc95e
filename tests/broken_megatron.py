"""FusedMLP, and what it would be with one mistake each: the tests of it must notice every one.

On a rank only (megatron_ranks.py): it imports megatron-core.
"""

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from tpffn_triton import ffn
from tpffn_triton.megatron import FusedMLP

__all__ = ["FusedMLP"]


class DxNotReduced(FusedMLP):
    """Each rank's part of dx."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        (w1, b1), (w2, b2) = self.linear_fc1(), self.linear_fc2()
        y = ffn(hidden_states, w1, w2, b1, activation=self.activation)
        return reduce_from_tensor_model_parallel_region(y), None if b2 is None else b2.view_as(b2)


class ErfUnderFusion(FusedMLP):
    """F.gelu, where bias_activation_fusion makes it tanh."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = self.activation.removesuffix("_tanh")


class InterleavedRows(FusedMLP):
    """Rows of linear_fc1 read as gate, up, gate, up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_fc1.forward = self._interleaved

    def _interleaved(self) -> Any:
        weight, bias = self.linear_fc1.weight, self.linear_fc1.bias
        order = torch.arange(len(weight)).view(-1, 2).T.flatten()
        return weight[order], None if bias is None else bias[order]


class ReturnsTheParameter(FusedMLP):
    """The bias itself, which a checkpoint makes its own output: backward recurses for ever."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0], self.linear_fc2.bias


class BiasTwice(FusedMLP):
    """The bias added, and returned to be added."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, bias = super().forward(*args, **kwargs)
        return y + bias, bias


class BiasUnmarked(FusedMLP):
    """Without the attribute by which Megatron sums the bias's gradient over the tensor-parallel group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.linear_fc2.bias.sequence_parallel


class WeightUnmarked(FusedMLP):
    """A shard that counts as replicated, once, in the norm of the gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_fc1.weight.tensor_model_parallel = False


class HooksBypassed(FusedMLP):
    """The weights read without calling the modules that own them."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        y = ffn(
            hidden_states,
            fc1.weight,
            fc2.weight,
            fc1.bias,
            activation=self.activation,
            tp_group=self.tp_group,
            sequence_parallel=fc1.sequence_parallel,
        )
        return y, fc2.bias.view_as(fc2.bias)


class SequenceParallelFrozen(FusedMLP):
    """sequence_parallel as it was when the model was built."""

    def _sequence_parallel(self, group: Any) -> bool:
        return self.config.sequence_parallel


class GateAndUpTogether(FusedMLP):
    """A checkpoint that cuts the rows of linear_fc1 as if they were not gate above up."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        config, self.config = self.config, copy.copy(self.config)
        self.config.gated_linear_unit = False
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.config = config
