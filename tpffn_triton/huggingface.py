"""Models of Hugging Face transformers with fused, tensor-parallel MLPs, in place and from their loaded weights.

    report = parallelize(model, tp_group)
    print(report)       what was replaced, what was left and why

Everything else of the model stays as it is, replicated over the group: equal inputs give every rank equal outputs and
equal gradients. transformers is not imported, and any other torch model will do: an MLP is known by its values.

Over a group the MLPs' parameters become DTensors under their old names, so the original state dict is
`torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpffn_triton.agreement import compare, reject
from tpffn_triton.collectives import resolve_group
from tpffn_triton.machines import Machine
from tpffn_triton.mlp_halves import HALVES, has_halves, wiring_of_halves
from tpffn_triton.mlp_twins import is_conv1d, sizes_of
from tpffn_triton.mlp_wiring import Wiring, orders_of, wiring_of
from tpffn_triton.tensor_parallel_mlp import Options, TensorParallelMLP, describe, replace_mlp
from tpffn_triton.validation import check_sizes

# Names and classes of what deserves a line in the report where it cannot be replaced.
_NAMES = re.compile(r"mlp|ffn|feed_?forward|moe|(shared_)?experts?|DenseReluDense", re.IGNORECASE)
_CLASSES = re.compile(r".*(MLP|FFN|FeedForward|Experts?|MoE|MoeBlock)", re.IGNORECASE)


class Replaced(NamedTuple):
    """An MLP that is computed by `tpffn_triton.ffn` now."""

    name: str  # in the model; of BERT's relatives: the layer's, whose `intermediate` and `output` it was
    kind: str  # the class it had
    activation: str
    hidden_size: int  # H
    ffn_hidden_size: int  # F


class Left(NamedTuple):
    """A module that looks like an MLP, and is as it was."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `parallelize` did, module by module; str() lays it out as a table, like layers in one line."""

    world_size: int
    replaced: list[Replaced]
    left: list[Left]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} MLPs replaced, over {self.world_size} rank{'s' * (self.world_size > 1)}"]
        lines += _table(
            [(r.name, r.kind, f"{r.activation}, H={r.hidden_size}, F={r.ffn_hidden_size}") for r in self.replaced]
        )
        if self.left:
            lines.append(f"{len(self.left)} left as they were")
            lines += _table([(left.name, left.kind, left.reason) for left in self.left])
        return "\n".join(lines)


def parallelize(
    model: nn.Module,
    tp_group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    save: str = "pre_act",
    reduce_dtype: torch.dtype | None = None,
    forward_chunks: int | Machine = 1,
    batch_invariant: bool = False,
) -> Report:
    """Replace every MLP of a model whose function is known by one `tpffn_triton.ffn`, in place.

    model       on every rank of the group the same, parameters included
    tp_group    None (one rank: parameters stay the same objects), a ProcessGroup or a 1-D DeviceMesh
    save, reduce_dtype, forward_chunks, batch_invariant
                as in `tpffn_triton.ffn`

    An MLP is a module with two linears, or three where it is gated, nn.Linear or transformers' Conv1D; or the two
    modules `intermediate` and `output` of a layer, as in BERT. Its activation is the one it computes, erf and tanh told
    apart. What is quantized, adapted, hooked or sharded already is left, and so is what computes anything else.

    Raises: TypeError, ValueError: options or a group that do not fit; no MLP that can be replaced, with the reasons;
    ranks that find different ones. CollectiveError: a rank did not come. Nothing is changed then.
    """
    options = Options(False, save, reduce_dtype, forward_chunks, batch_invariant)
    group = resolve_group(tp_group)
    world_size = 1 if group is None else group.size()
    found, left = _survey(model, world_size)
    if not found:
        error = ValueError("\n".join(["found no MLP that can be replaced", *_table(left)]))
        if group is not None:
            reject(group, error)  # the others are about to compare
        raise error
    mesh = None
    if group is not None:
        compare(group, {"MLPs": ", ".join(f"{name} {describe(module, wiring)}" for name, module, wiring in found)})
        mesh = (
            tp_group if isinstance(tp_group, DeviceMesh) else DeviceMesh.from_group(group, _device_type(group, model))
        )
    replaced: list[Replaced] = []
    for name, module, wiring in found:
        sizes = wiring.hidden_size, wiring.ffn_hidden_size
        replaced.append(Replaced(name, type(module).__name__, wiring.activation, *sizes))
        first, second = map(module.get_submodule, HALVES) if has_halves(module) else (module, None)
        replace_mlp(first, wiring, mesh, options, second_half=second)
    return Report(world_size, replaced, left)


def _survey(model: nn.Module, world_size: int) -> tuple[list[tuple[str, nn.Module, Wiring]], list[Left]]:
    """Return the MLPs that can be replaced, by name, and what looks like one but cannot."""
    found: list[tuple[str, nn.Module, Wiring]] = []
    left: list[Left] = []
    seen = set()
    # From how many places each parameter and each linear is reached.
    uses = Counter(
        id(part) for module in model.modules() for part in (*module._parameters.values(), *module._modules.values())
    )

    def visit(name: str, module: nn.Module) -> None:
        if module in seen:  # layers that share one
            return
        seen.add(module)
        inside = dict(module.named_children())
        if has_halves(module) or _looks_like_one(name, module):
            try:
                wiring = (wiring_of_halves if has_halves(module) else wiring_of)(module)
                check_sizes(wiring.hidden_size, wiring.ffn_hidden_size, world_size)
                if world_size > 1 and (shared := [name for name, part in _parts(module, wiring) if uses[id(part)] > 1]):
                    raise ValueError(f"shares {', '.join(shared)} with another module, which shards would not")
            except ValueError as error:
                left.append(Left(name, type(module).__name__, str(error)))
            else:
                found.append((name, module, wiring))
                inside = {n: m for n, m in inside.items() if has_halves(module) and n not in HALVES}
        for child_name, child in inside.items():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found, left


def _parts(module: nn.Module, wiring: Wiring) -> Iterator[tuple[str, Any]]:
    """Yield the linears that become shards and their parameters, by name."""
    where = ("", "") if not has_halves(module) else tuple(f"{half}." for half in HALVES)
    for name in (*(f"{where[0]}{fc1}" for fc1 in wiring.fc1), f"{where[1]}{wiring.fc2}"):
        linear = module.get_submodule(name)
        yield name, linear
        yield from linear.named_parameters(name)


def _device_type(group: dist.ProcessGroup, model: nn.Module) -> str:
    """Return where the model is or, on the meta device, will be."""
    kind = next(model.parameters()).device.type
    return kind if kind != "meta" else "cuda" if "nccl" in dist.get_backend(group) else "cpu"


def _looks_like_one(name: str, module: nn.Module) -> bool:
    if not isinstance(module, TensorParallelMLP | nn.Linear) and any(True for _ in module.parameters()):
        if _NAMES.fullmatch(name.rpartition(".")[2]) or _CLASSES.fullmatch(type(module).__name__):
            return True
        own = {n: m for n, m in module.named_children() if type(m) is nn.Linear or is_conv1d(m)}
        # Not query, key and value, which are square.
        return len(own) in (2, 3) and any(len(set(sizes_of(own[order[-1]]))) == 2 for order in orders_of(own))
    return False


def _table(rows: Sequence[tuple]) -> list[str]:
    """Lay out (name, class, ...) in columns; rows that differ in numbers of their names alone are one."""
    alike: dict[tuple, list[str]] = {}
    for name, *rest in rows:
        alike.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), *rest), []).append(name or "(the model)")
    texts = [(f"{key[0]} ×{len(names)}" if len(names) > 1 else names[0], *key[1:]) for key, names in alike.items()]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in texts]
