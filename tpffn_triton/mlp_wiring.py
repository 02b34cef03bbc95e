"""Find out what an MLP written by somebody else computes: which of its linears is which, and its activation.

Not by names, but by its values: a twin of the module (mlp_twins.py) is called on pre-activations from 1e-2 to 1e6, and
its results and gradients compared with the reference's. What fits in none of the ways known is refused, so that dropout
between the linears, a norm, a factor or a clamp is never lost.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.mlp_twins import (
    SMALL_F,
    SMALL_H,
    TwinCallError,
    linears_of,
    probe,
    results_of,
    same_results,
    sizes_of,
    twin_of,
    values_of,
)
from tpffn_triton.reference import ACTIVATIONS as FUNCTIONS


@dataclass(frozen=True)
class Wiring:
    """An MLP fc2(act(fc1(x))) or, gated, fc2(f(gate(x)) · up(x)), with the names of its parts inside it."""

    activation: str  # of tpffn_triton.ffn
    fc1: tuple[str, ...]  # one linear, or gate and up
    fc2: str
    dropouts: tuple[str, ...]  # dropout modules behind fc2, in order
    hidden_size: int  # H
    ffn_hidden_size: int  # F


def wiring_of(mlp: nn.Module, activation: str | None = None) -> Wiring:
    """Return how an MLP module is wired, its linears being nn.Linear or transformers' Conv1D.

    activation   what it must compute; None: whichever it does

    Raises: ValueError: it computes none of the FFNs known, or another than `activation`; or would lose something when
    its linears are no longer called: their hooks, adapters, quantized weights. Says which.
    """
    linears = linears_of(mlp)
    if len(linears) not in (2, 3):
        raise ValueError(f"has {len(linears)} linears{_listed(linears)}: an FFN has two, or three where it is gated")
    orders = list(orders_of(linears))
    if not orders:
        raise ValueError(f"has linears that do not lead from H to F and back{_listed(linears)}")
    problems = []
    for *fc1, fc2 in orders:
        try:
            found = _find(mlp, linears, tuple(fc1), fc2)
        except TwinCallError as error:
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


def _listed(linears: dict[str, nn.Module]) -> str:
    if len(linears) > 4:
        return ""
    shapes = (f"{name} {' → '.join(map(str, sizes_of(linear)))}" for name, linear in linears.items())
    return f" ({', '.join(shapes)})" if linears else ""


def orders_of(linears: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
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
    twin, parts = twin_of(mlp, small)
    *first, last = parts
    x = probe()
    found = results_of(twin.eval(), x, parts)

    def reference(x: Tensor) -> Tensor:
        return last(FUNCTIONS[activation](torch.cat([linear(x) for linear in first], -1)))

    for activation in ACTIVATIONS:
        if halves(activation) == len(fc1) and same_results(found, results_of(reference, x, parts)):
            hidden_size, ffn_hidden_size = sizes_of(linears[fc1[0]])
            return Wiring(activation, fc1, fc2, _dropouts_behind(twin, x), hidden_size, ffn_hidden_size)
    return None


def _dropouts_behind(twin: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the names of the dropout modules that act on the result, and on nothing else.

    Raises: ValueError: others have p > 0; or without dropout modules training gives another result.
    """
    modules = {n: m for n, m in twin.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name, module in modules.items()
    ]
    right = values_of(twin.eval(), x)
    for handle in handles:
        handle.remove()
    behind = tuple(name for name, calls in seen.items() if len(calls) == 1 and torch.equal(calls[0], right))
    if inside := [f"{n} (p={m.p})" for n, m in modules.items() if m.p > 0 and seen[n] and n not in behind]:
        raise ValueError(f"has dropout before its second linear, which has no place here: {', '.join(inside)}")
    for name in behind:
        modules[name].p = 0.0
    if not torch.equal(values_of(twin.train(), x), right):
        raise ValueError("computes something else in training: dropout that is no module of its own?")
    return behind
