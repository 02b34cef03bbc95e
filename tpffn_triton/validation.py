"""Reject wrong arguments with a message that shows them, before any launch or collective."""

import torch
from torch import Tensor

from tpffn_triton.kernels._launch import SUPPORTED_DTYPES
from tpffn_triton.kernels.activations import PLAIN_ACTIVATIONS

SAVE_MODES = ("pre_act", "nothing")
# fp64 is for the native CPU path: the Triton launchers refuse it.
FFN_DTYPES = (*SUPPORTED_DTYPES, torch.float64)


def check_activation(activation: str) -> None:
    """Raises: ValueError: not the name of a plain activation (the message lists them)."""
    if activation not in PLAIN_ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(PLAIN_ACTIVATIONS)}")


def check_modes(activation: str, save: str, sequence_parallel: bool) -> None:
    """Raises: ValueError: unknown activation or save mode, or sequence_parallel, which does not exist yet."""
    check_activation(activation)
    if save not in SAVE_MODES:
        raise ValueError(f"save {save!r} is not one of {', '.join(SAVE_MODES)}")
    if sequence_parallel:
        raise ValueError("sequence_parallel=True is not available in this version: replicate x over the group")


def check_sizes(hidden_size: int, ffn_hidden_size: int, world_size: int) -> None:
    """Raises: TypeError: a size is no int. ValueError: a size below 1, or F not divisible by P."""
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size, "world_size": world_size}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if ffn_hidden_size % world_size:
        raise ValueError(
            f"ffn_hidden_size {ffn_hidden_size} is not divisible by the tensor-parallel world_size {world_size}"
        )


def _shapes(given: dict[str, Tensor | None]) -> str:
    return ", ".join(f"{name} {'None' if t is None else list(t.shape)}" for name, t in given.items())


def check_shapes(x: Tensor | None, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> None:
    """Check that x [..., H], w1 [F/P, H], w2 [H, F/P], b1 [F/P] and b2 [H] fit; None stands for what is absent.

    Raises: TypeError: not tensors. ValueError: shapes that do not fit.
    """
    given = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    for name, t in given.items():
        if not isinstance(t, Tensor) and not (t is None and name in ("x", "b1", "b2")):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if w1.dim() != 2 or w2.dim() != 2 or 0 in w1.shape:
        raise ValueError(f"expected w1 [F/P, H] and w2 [H, F/P] with H and F/P at least 1; got {_shapes(given)}")
    F, H = w1.shape
    if x is not None and (x.dim() < 1 or x.shape[-1] != H):
        raise ValueError(f"x must be [..., H={H}] beside w1 [F/P={F}, H={H}]; got {_shapes(given)}")
    for name, shape in (("w2", (H, F)), ("b1", (F,)), ("b2", (H,))):
        t = given[name]
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} beside w1 [F/P={F}, H={H}]; got {_shapes(given)}")


def check_ffn_arguments(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> None:
    """Check the tensors of `ffn`: shapes, and one supported dtype and device for all.

    Raises: TypeError: not tensors, or dtypes that differ or are unsupported. ValueError: shapes or devices.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    check_shapes(x, w1, w2, b1, b2)
    tensors = {name: t for name, t in (("x", x), ("w1", w1), ("w2", w2), ("b1", b1), ("b2", b2)) if t is not None}
    if len({t.dtype for t in tensors.values()}) > 1:
        raise TypeError("one dtype expected, got " + ", ".join(f"{name} {t.dtype}" for name, t in tensors.items()))
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError("one device expected, got " + ", ".join(f"{name} {t.device}" for name, t in tensors.items()))
    if x.dtype not in FFN_DTYPES:
        raise TypeError(f"dtype {x.dtype} is not one of {', '.join(map(str, FFN_DTYPES))}")
