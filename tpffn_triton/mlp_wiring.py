"""Find out what an MLP written by somebody else computes: which of its linears is which, and its activation.

Not by names, but by its values: a twin of the module, with small linears of known fp64 weights in the place of its own,
is called on pre-activations from 1e-2 to 1e3, and compared with the reference. What fits in none of the ways known is
refused, so that dropout between the linears, a norm, a factor or a clamp is never lost.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.reference import ACTIVATIONS as FUNCTIONS

SMALL_H, SMALL_F, TOKENS = 6, 10, 96
# Constants of ten digits are within this; erf and tanh are 5e-4 apart, sigmoid(1.702 z) 2e-2.
TOLERANCE = 1e-8
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _CallError(ValueError):
    """A twin cannot be called: it is none of our business, or its linears are not in the order tried."""


@dataclass(frozen=True)
class Wiring:
    """An MLP fc2(act(fc1(x))) or, gated, fc2(f(gate(x)) · up(x)), with the names of its parts inside it."""

    activation: str  # of tpffn_triton.ffn
    fc1: tuple[str, ...]  # one linear, or gate and up
    fc2: str
    dropouts: tuple[str, ...]  # dropout modules behind fc2, in order
    hidden_size: int  # H
    ffn_hidden_size: int  # F


def is_conv1d(module: nn.Module) -> bool:
    """Say whether it is transformers' Conv1D, a linear whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def wiring_of(mlp: nn.Module, activation: str | None = None) -> Wiring:
    """Return how an MLP module is wired, its linears being nn.Linear or transformers' Conv1D.

    activation   what it must compute; None: whichever it does

    Raises: ValueError: it computes none of the FFNs known, or another than `activation`; or would lose something when
    its linears are no longer called: their hooks, adapters, quantized weights. Says which.
    """
    linears = linears_of(mlp)
    if len(linears) not in (2, 3):
        raise ValueError(f"has {len(linears)} linears{_listed(linears)}: an FFN has two, or three where it is gated")
    orders = list(_orders(linears))
    if not orders:
        raise ValueError(f"has linears that do not lead from H to F and back{_listed(linears)}")
    problems = []
    for *fc1, fc2 in orders:
        try:
            found = _find(mlp, linears, tuple(fc1), fc2)
        except _CallError as error:
            problems.append(error)
            continue
        if found is None:
            continue
        if activation not in (None, found.activation):
            raise ValueError(f"computes {found.activation}, not {activation}")
        return found
    if len(problems) == len(orders):
        raise problems[0]
    raise ValueError(f"does not compute fc2(act(fc1(x))) with one of {', '.join(ACTIVATIONS)}")


def first_half_of(module: nn.Module) -> tuple[str, str]:
    """Return the name of the one linear of a module that computes act(linear(x)), and the activation.

    Raises: ValueError: it does not; or as `wiring_of`.
    """
    linears = linears_of(module)
    if len(linears) != 1:
        raise ValueError(f"has {len(linears)} linears{_listed(linears)}, not one")
    ((name, linear),) = linears.items()
    twin, (small,) = _twin(module, [(linear, SMALL_H, SMALL_F)])
    x = _probe()
    for activation in ACTIVATIONS:
        if halves(activation) == 1 and _same_function(twin, x, FUNCTIONS[activation](small(x))):
            return name, activation
    raise ValueError(f"does not compute act({name}(x)) with one of {', '.join(ACTIVATIONS)}")


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linears of a module by name, which hold all its parameters and buffers.

    Raises: ValueError: others hold some as well; or calling a linear is more than a product and a bias.
    """
    linears = {}
    for name, part in module.named_modules():
        own = [*part._parameters, *part._buffers]
        if type(part) is nn.Linear or is_conv1d(part):
            _check_plain(name, part)
            linears[name] = part
        elif any(getattr(part, tensor) is not None for tensor in own):
            kind = type(part).__name__
            raise ValueError(f"has, beside nn.Linear, {name or 'itself'} ({kind}) with {', '.join(own)}")
    return linears


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (rows, columns) if is_conv1d(linear) else (columns, rows)


def _check_plain(name: str, linear: Any) -> None:
    if isinstance(linear.weight, DTensor):
        raise ValueError(f"{name}.weight is sharded already: {list(linear.weight.placements)}")
    if not linear.weight.is_floating_point():
        raise ValueError(f"{name}.weight is quantized: {linear.weight.dtype}")
    if "forward" in vars(linear):
        raise ValueError(f"{name}.forward has been replaced, as accelerate's device_map does")
    if any(getattr(linear, hooks) for hooks in HOOKS):
        raise ValueError(f"{name} has hooks, which would no longer be called")


def _listed(linears: dict[str, nn.Module]) -> str:
    shapes = (f"{name} {' → '.join(map(str, sizes_of(linear)))}" for name, linear in linears.items())
    return f" ({', '.join(shapes)})" if linears else ""


def _orders(linears: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """Yield the orders, first linears before the last, in which the sizes lead from H to F and back."""
    for order in itertools.permutations(linears):
        *first, last = (linears[name] for name in order)
        back = sizes_of(last)[::-1]
        biases = {linear.bias is None for linear in first}
        if all(sizes_of(linear) == back for linear in first) and len(biases) == 1:
            yield order


def _find(mlp: nn.Module, linears: dict[str, nn.Module], fc1: tuple[str, ...], fc2: str) -> Wiring | None:
    """Return the wiring if the linears have these roles and the rest is an activation and dropout behind fc2."""
    small = [(linears[name], SMALL_H, SMALL_F) for name in fc1] + [(linears[fc2], SMALL_F, SMALL_H)]
    twin, (*first, last) = _twin(mlp, small)
    x = _probe()
    pre_act = torch.cat([linear(x) for linear in first], -1)
    for activation in ACTIVATIONS:
        if halves(activation) == len(fc1) and _same_function(twin, x, last(FUNCTIONS[activation](pre_act))):
            hidden_size, ffn_hidden_size = sizes_of(linears[fc1[0]])
            return Wiring(activation, fc1, fc2, _dropouts_behind(twin, x), hidden_size, ffn_hidden_size)
    return None


def _probe() -> Tensor:
    """Return x [TOKENS, 1, SMALL_H], each token of another size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1, SMALL_H, dtype=torch.float64, device="cpu", generator=generator)
    sizes = torch.logspace(-2, 3, TOKENS, dtype=torch.float64, device="cpu")
    return x * sizes[:, None, None]


def _twin(module: nn.Module, linears: list[tuple[nn.Module, int, int]]) -> tuple[nn.Module, list[nn.Linear]]:
    """Return a copy of the module in which small fp64 linears stand for (linear, in_features, out_features)."""
    generator, small = torch.Generator().manual_seed(2), []
    for linear, in_features, out_features in linears:
        twin = nn.Linear(in_features, out_features, linear.bias is not None, device="meta", dtype=torch.float64)
        for name, parameter in list(twin.named_parameters()):
            values = torch.randn(parameter.shape, dtype=torch.float64, device="cpu", generator=generator)
            setattr(twin, name, nn.Parameter(values / math.sqrt(in_features), requires_grad=False))
        small.append(twin)
    copies: dict[int, Any] = {id(linear): twin for (linear, *_), twin in zip(linears, small, strict=True)}
    try:
        return copy.deepcopy(module, copies), small
    except Exception as error:
        raise ValueError(f"cannot be copied to be looked at: {error}") from error


def _values(twin: nn.Module, x: Tensor) -> Tensor | None:
    # Some activations are compiled; for one look that would take seconds, and a C++ compiler.
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            return twin(x.clone())
        except Exception as error:
            raise _CallError(f"cannot be called with one tensor [S, B, H]: {error}") from error


def _same_function(twin: nn.Module, x: Tensor, right: Tensor) -> bool:
    """Say whether the twin, as it is outside of training, returns these values."""
    values = _values(twin.eval(), x)
    if not isinstance(values, Tensor) or values.shape != right.shape or values.dtype != right.dtype:
        return False
    # Of each token by itself: large ones have large errors.
    error, size = ((t.abs().amax(-1)) for t in (values - right, right))
    return bool((error <= TOLERANCE * size).all())


def _dropouts_behind(twin: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the names of the dropout modules that act on the result.

    Raises: ValueError: others have p > 0; or without dropout modules training gives another result.
    """
    seen: dict[str, Tensor] = {}
    modules = {n: m for n, m in twin.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in modules.items()
    ]
    right = _values(twin.eval(), x)
    for handle in handles:
        handle.remove()
    assert right is not None
    behind = tuple(name for name, t in seen.items() if torch.equal(t, right))
    if inside := [f"{name} (p={modules[name].p})" for name in modules if name not in behind]:
        raise ValueError(f"has dropout before its second linear, which has no place here: {', '.join(inside)}")
    for name in behind:
        modules[name].p = 0.0
    in_training = _values(twin.train(), x)
    if in_training is None or not torch.equal(in_training, right):
        raise ValueError("computes something else in training: dropout that is no module of its own?")
    return behind
