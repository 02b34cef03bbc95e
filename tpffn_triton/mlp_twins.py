"""Twins of modules written by somebody else: copies with small fp64 linears of known weights, to call and to compare.

A twin runs on the CPU whatever the module is on, meta included, and whatever its size.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpffn_triton.validation import FFN_DTYPES

SMALL_H, SMALL_F, TOKENS = 6, 10, (16, 6)
# Constants of ten digits are within this; erf and tanh are 5e-4 apart, sigmoid(1.702 z) 2e-2.
TOLERANCE = 1e-8
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TwinCallError(ValueError):
    """A twin cannot be called with one tensor."""


def is_conv1d(module: nn.Module) -> bool:
    """Say whether it is transformers' Conv1D, a linear whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (rows, columns) if is_conv1d(linear) else (columns, rows)


def check_plain(linears: dict[str, Any]) -> None:
    """Raises: ValueError: parameters of linears are not plain tensors of a dtype that `ffn` takes, have hooks, are not
    all of one dtype and device, or one of them is in two places."""
    seen: dict[int, str] = {}
    for name, linear in linears.items():
        for kind, parameter in linear.named_parameters(name):
            if isinstance(parameter, DTensor):
                raise ValueError(f"{kind} is sharded already: {list(parameter.placements)}")
            if type(parameter) is not nn.Parameter or parameter.dtype not in FFN_DTYPES:
                raise ValueError(f"{kind} is quantized: {type(parameter).__name__} of {parameter.dtype}")
            if parameter.dim() != (2 if parameter is linear.weight else 1):
                raise ValueError(f"{kind} has the shape {list(parameter.shape)}")
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(f"{kind} has hooks, which would no longer be called")
            if id(parameter) in seen:
                raise ValueError(f"{kind} is {seen[id(parameter)]} as well, and would no longer be")
            seen[id(parameter)] = kind
    for what in ("dtype", "device"):
        found = {f"{name} {getattr(linear.weight, what)}" for name, linear in linears.items()}
        if len({getattr(linear.weight, what) for linear in linears.values()}) > 1:
            raise ValueError(f"has linears of more than one {what}: {', '.join(sorted(found))}")


def check_called(name: str, module: nn.Module, hooks: bool = True) -> None:
    """Raises: ValueError: calling a module is more than its class' forward, which would no longer happen."""
    if "forward" in vars(module):
        whose = f"{name}.forward" if name else "its forward"
        raise ValueError(f"{whose} has been replaced, as accelerate's device_map does")
    if hooks and any(getattr(module, kind) for kind in HOOKS):
        raise ValueError(f"{name} has hooks, which would no longer be called")


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linears of a module by name, which hold all its parameters and buffers.

    Raises: ValueError: others hold some as well; or a call of one of its modules is more than it seems.
    """
    linears: dict[str, nn.Module] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        check_called(name, part, hooks=part is not module)
        own = [*part._parameters, *part._buffers]
        if type(part) is nn.Linear or is_conv1d(part):
            if other := next((n for n, linear in linears.items() if linear is part), None):
                raise ValueError(f"{name} is {other} as well, and would no longer be")
            linears[name] = part
        elif any(getattr(part, tensor) is not None for tensor in own):
            kind = type(part).__name__
            raise ValueError(f"has, beside nn.Linear, {name or 'itself'} ({kind}) with {', '.join(own)}")
    check_plain(linears)
    return linears


def twin_of(
    module: nn.Module, linears: list[tuple[nn.Module, int, int]], copies: dict[int, Any] | None = None
) -> tuple[nn.Module, list[nn.Linear]]:
    """Return a copy of the module, and in it small fp64 linears in the place of (linear, in_features, out_features).

    copies    id of a part of the module → what stands for it in the copy
    Raises: ValueError: it cannot be copied.
    """
    generator, small = torch.Generator().manual_seed(2), []
    for linear, in_features, out_features in linears:
        own = nn.Linear(in_features, out_features, linear.bias is not None, device="meta", dtype=torch.float64)
        for name, parameter in list(own.named_parameters()):
            values = torch.randn(parameter.shape, dtype=torch.float64, device="cpu", generator=generator)
            setattr(own, name, nn.Parameter(values / math.sqrt(in_features)))
        small.append(own)
    replaced = {id(linear): own for (linear, *_), own in zip(linears, small, strict=True)}
    try:
        twin = copy.deepcopy(module, dict(copies or {}) | replaced)
    except Exception as error:
        raise ValueError(f"cannot be copied to be looked at: {error}") from error
    for part in twin.modules():
        for kind in HOOKS:
            getattr(part, kind).clear()  # somebody's, who waits for real calls
    return twin, small


def probe(hidden_size: int = SMALL_H) -> Tensor:
    """Return x [*TOKENS, hidden_size], each token of another size, in no order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*TOKENS, hidden_size, dtype=torch.float64, device="cpu", generator=generator)
    sizes = torch.logspace(-2, 6, math.prod(TOKENS), dtype=torch.float64, device="cpu")
    order = torch.randperm(len(sizes), generator=generator, device="cpu")
    return x * sizes[order].view(*TOKENS, 1)


def values_of(function: Callable, x: Tensor, with_grad: bool = False) -> Any:
    """Return function(x). Raises: TwinCallError: it raised."""
    # Some activations are compiled; for one look that would take seconds, and a C++ compiler.
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(with_grad),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            return function(x if with_grad else x.clone())
        except Exception as error:
            raise TwinCallError(f"cannot be called with one tensor [S, B, H]: {error}") from error


def results_of(function: Callable, x: Tensor, linears: list[nn.Linear]) -> list[Any]:
    """Return [y, dx and the gradients of the linears' parameters] of y = function(x) for one and the same dy.

    Raises: TwinCallError: it raised.
    """
    leaf = x.clone().requires_grad_()
    y = values_of(function, leaf, with_grad=True)
    if not (isinstance(y, Tensor) and y.requires_grad and y.dtype == x.dtype):
        return [y]
    dy = torch.randn(y.shape, dtype=y.dtype, device="cpu", generator=torch.Generator().manual_seed(4))
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    return [y.detach(), *torch.autograd.grad(y, (leaf, *parameters), dy, allow_unused=True)]


def same_values(values: Any, right: Any) -> bool:
    """Say whether these are the values of a right result, within TOLERANCE."""
    if not (isinstance(values, Tensor) and isinstance(right, Tensor)):
        return False
    if values.shape != right.shape or values.dtype != right.dtype:
        return False
    # Of each token by itself: large ones have large errors.
    error, size = ((t.detach().abs().amax(-1)) for t in (values - right, right))
    return bool((error <= TOLERANCE * size).all())


def same_results(results: list[Any], right: list[Any]) -> bool:
    """Say whether all of `results_of` are right."""
    return len(results) == len(right) and all(map(same_values, results, right))
