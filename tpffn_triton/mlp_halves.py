"""Find out what an MLP computes that is two modules of a layer, as in BERT and its relatives.

    output(intermediate(x), x)      in the layer's feed_forward_chunk or, without one, in its forward
    intermediate(x)                 act(fc1(x))
    output(h, x)                    rest(fc2(h), x): a dropout, a residual connection and a norm, which stay

By its values, as in mlp_wiring.py: a twin of the layer must compute the same as one in which `intermediate` is the
whole FFN and fc2 passes on what it is given. In both, the layer's other modules return their first argument.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpffn_triton.kernels.activations import PLAIN_ACTIVATIONS
from tpffn_triton.mlp_twins import (
    SMALL_F,
    check_called,
    check_plain,
    linears_of,
    probe,
    results_of,
    same_results,
    sizes_of,
    twin_of,
    values_of,
)
from tpffn_triton.mlp_wiring import Wiring
from tpffn_triton.reference import ACTIVATIONS

HALVES = ("intermediate", "output")


def has_halves(module: nn.Module) -> bool:
    """Say whether it is a layer with the modules `intermediate` and `output`."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in HALVES)


def wiring_of_halves(layer: Any) -> Wiring:
    """Return how such a layer's MLP is wired: fc1 is a name in `intermediate`, fc2 one in `output`.

    Raises: ValueError: it computes something else, or would lose something when its linears are no longer called: says
    what.
    """
    fc1_name, fc1 = _only("intermediate", linears_of(layer.intermediate))
    fc2_name, fc2 = _only("output", {n: m for n, m in layer.output.named_modules() if type(m) is nn.Linear})
    check_called(f"output.{fc2_name}", fc2)
    check_plain({f"intermediate.{fc1_name}": fc1, f"output.{fc2_name}": fc2})
    hidden_size, ffn_hidden_size = sizes_of(fc1)
    if sizes_of(fc2) != (ffn_hidden_size, hidden_size):
        raise ValueError(f"has linears that do not lead from H to F and back: {sizes_of(fc1)}, {sizes_of(fc2)}")
    check_called("intermediate", layer.intermediate)
    if layer.output._forward_pre_hooks:
        raise ValueError("output has hooks before its forward, which would see another tensor")
    twin, small = _twin(layer, [(fc1, hidden_size, SMALL_F), (fc2, SMALL_F, hidden_size)])
    x = probe(hidden_size)
    for training in (True, False):
        _check_passed_on(twin.train(training), x)
    if not torch.equal(values_of(twin.intermediate.train(), x), values_of(twin.intermediate.eval(), x)):
        raise ValueError("has dropout before its second linear, which has no place here")
    right = results_of(_chunk(twin), x, small)
    for activation in PLAIN_ACTIVATIONS:
        twin.intermediate = _Whole(small, activation)
        twin.output.set_submodule(fc2_name, nn.Identity())
        if same_results(results_of(_chunk(twin), x, small), right):
            return Wiring(activation, (fc1_name,), fc2_name, (), hidden_size, ffn_hidden_size)
    raise ValueError(f"does not compute output(fc2(act(fc1(x))), x) with one of {', '.join(PLAIN_ACTIVATIONS)}")


class _Whole(nn.Module):
    def __init__(self, linears: list[nn.Linear], activation: str) -> None:
        super().__init__()
        self.linears, self.activation = linears, activation

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.linears
        return fc2(ACTIVATIONS[self.activation](fc1(x)))


class _PassesOn(nn.Module):
    def forward(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return first.view_as(first) if isinstance(first, Tensor) else first


def _chunk(layer: Any) -> Callable[[Tensor], Any]:
    """Return what calls both halves."""

    def call(x: Tensor) -> Any:
        found = getattr(layer, "feed_forward_chunk", layer)(x)
        return found[0] if isinstance(found, tuple) and found else found

    return call


def _check_passed_on(twin: Any, x: Tensor) -> None:
    """Raises: ValueError: `output` does not get all that `intermediate` returns, as it is; each is not called once."""
    returned, given = [], []
    handles = [
        twin.intermediate.register_forward_hook(lambda _, inputs, result: returned.append(result)),
        twin.output.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0] if inputs else None)),
    ]
    y = values_of(_chunk(twin), x)
    for handle in handles:
        handle.remove()
    if not (len(returned) == len(given) == 1 and given[0] is returned[0]):
        raise ValueError("changes what its intermediate returns before its output gets it")
    if not isinstance(y, Tensor) or y.shape != x.shape or given[0].shape[:-1] != x.shape[:-1]:
        raise ValueError(f"does not compute [..., H] of all tokens: {getattr(y, 'shape', y)} of {list(x.shape)}")


def _only(where: str, linears: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    if len(linears) != 1:
        raise ValueError(f"has {len(linears)} linears in {where}, not one")
    return next(iter(linears.items()))


def _twin(layer: nn.Module, linears: list[tuple[nn.Module, int, int]]) -> tuple[Any, list[nn.Linear]]:
    """Return a twin of the layer, small and without its other modules; what the norms behind fc2 hold is random."""
    copies: dict[int, Any] = {id(child): _PassesOn() for name, child in layer.named_children() if name not in HALVES}
    generator = torch.Generator().manual_seed(3)
    own = {id(parameter) for linear, *_ in linears for parameter in linear.parameters()}
    for half in map(layer.get_submodule, HALVES):
        for parameter in half.parameters():
            if id(parameter) in own:
                continue
            values = torch.randn(parameter.shape, dtype=torch.float64, device="cpu", generator=generator)
            copies[id(parameter)] = nn.Parameter(values, requires_grad=False)
    twin, small = twin_of(layer, linears, copies)
    return twin.eval(), small
