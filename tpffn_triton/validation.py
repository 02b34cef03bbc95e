"""Reject wrong arguments with a message that shows them, before any launch or collective."""

import torch
from torch import Tensor

from tpffn_triton.kernels._launch import SUPPORTED_DTYPES
from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS, halves
from tpffn_triton.machines import Machine
from tpffn_triton.partitionings import PARTITIONINGS, Partitioning

SAVE_MODES = ("pre_act", "nothing")
# fp64 is for the native CPU path: the Triton launchers refuse it.
FFN_DTYPES = (*SUPPORTED_DTYPES, torch.float64)


def check_activation(activation: str) -> None:
    """Raises: ValueError: not the name of an activation (the message lists them)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def check_modes(
    activation: str,
    save: str,
    sequence_parallel: bool,
    reduce_dtype: torch.dtype | None,
    forward_chunks: int | Machine,
    batch_invariant: bool = False,
) -> None:
    """Raises: ValueError: unknown activation, save mode or reduce_dtype, chunks below 1, or other than 1 beside
    sequence_parallel; batch_invariant beside either of these. TypeError: chunks are no int and no Machine."""
    check_activation(activation)
    check_options(save, sequence_parallel, reduce_dtype, forward_chunks)
    if batch_invariant and (sequence_parallel or forward_chunks != 1):
        raise ValueError(
            "batch_invariant adds the ranks' parts in the order of ranks: it cannot go with "
            + ("sequence_parallel" if sequence_parallel else f"forward_chunks={forward_chunks}")
        )


def check_options(
    save: str, sequence_parallel: bool, reduce_dtype: torch.dtype | None, forward_chunks: int | Machine
) -> None:
    """Raises: as `check_modes`, for what does not depend on the activation."""
    if save not in SAVE_MODES:
        raise ValueError(f"save {save!r} is not one of {', '.join(SAVE_MODES)}")
    if reduce_dtype not in (None, torch.float32):
        raise ValueError(f"reduce_dtype {reduce_dtype} is not one of None, torch.float32")
    if not isinstance(forward_chunks, Machine):
        check_positive("forward_chunks", forward_chunks)
    if sequence_parallel and forward_chunks != 1:
        raise ValueError(
            f"forward_chunks={forward_chunks} cuts an all-reduce; sequence_parallel has a reduce-scatter, whose parts "
            "are not rows of one chunk"
        )


def check_sizes(hidden_size: int, ffn_hidden_size: int, world_size: int) -> None:
    """Raises: TypeError: a size is no int. ValueError: a size below 1, or F not divisible by P."""
    for name, size in (("hidden_size", hidden_size), ("ffn_hidden_size", ffn_hidden_size)):
        check_positive(name, size)
    check_positive("world_size", world_size)
    PARTITIONINGS["column_row"].check_divisible(hidden_size, ffn_hidden_size, world_size)


def check_positive(name: str, size: int) -> None:
    """Raises: TypeError: no int. ValueError: below 1."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")


def check_tensors(x: Tensor | None, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> None:
    """Raises: TypeError: not tensors; None stands for an absent x, b1 or b2."""
    for name, t in (("w1", w1), ("w2", w2), ("x", x), ("b1", b1), ("b2", b2)):
        if not isinstance(t, Tensor) and (t is not None or name in ("w1", "w2")):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def check_shapes(
    x: Tensor | None, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: str
) -> None:
    """Check that x [..., H], w1 [F/P, H], w2 [H, F/P], b1 [F/P] and b2 [H] fit, with 2F/P rows of w1 and b1 where the
    activation is gated; None stands for what is absent.

    Raises: ValueError: shapes that do not fit.
    """
    gated = activation in GATED_ACTIVATIONS
    rows = "2F/P" if gated else "F/P"
    problem = None
    if w1.dim() != 2 or w2.dim() != 2 or (gated and w1.shape[0] % 2):
        problem = f"{activation} expects w1 [{rows}, H] and w2 [H, F/P]"
    else:
        W, H = w1.shape
        F = W // 2 if gated else W
        if x is not None and (x.dim() < 1 or x.shape[-1] != H):
            problem = f"x must be [..., H={H}]"
        elif w2.shape != (H, F):
            problem = f"w2 must be {[H, F]}"
        elif b1 is not None and b1.shape != (W,):
            problem = f"b1 must be {[W]}"
        elif b2 is not None and b2.shape != (H,):
            problem = f"b2 must be {[H]}"
        if problem:
            problem += f" beside w1 [{rows}={W}, H={H}] with {activation}"
    if problem:
        given = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
        shapes = ", ".join(f"{name} {'None' if t is None else list(t.shape)}" for name, t in given.items())
        raise ValueError(f"{problem}; got {shapes}")


def check_partitioned_shapes(
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    partitioning: Partitioning,
    world_size: int,
) -> None:
    """Check that x [..., H] and one rank's shards fit together and into the partitioning; None: absent.

    Raises: ValueError: shapes that do not fit, or a size that P does not divide.
    """
    given = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    problem = f"{partitioning.name} expects x [..., H] and two matrices"
    if w1.dim() == w2.dim() == 2 and (x is None or x.dim() > 0):
        # From w2, whose rows are never halves.
        parts = [world_size if dim == partitioning.cuts["w2"] else 1 for dim in (0, 1)]
        H, F = w2.shape[0] * parts[0], w2.shape[1] * parts[1]
        fitting = partitioning.shard_shapes(H, F, world_size, halves(activation))
        if (x is None or x.shape[-1] == H) and all(t is None or t.shape == fitting[name] for name, t in given.items()):
            return
        problem = f"{partitioning.name} with {activation} over {world_size} ranks, by w2 H={H}, F={F}: expects "
        problem += f"x [..., {H}], " + ", ".join(f"{name} {list(shape)}" for name, shape in fitting.items())
    shapes = {name: None if t is None else list(t.shape) for name, t in {"x": x, **given}.items()}
    raise ValueError(f"{problem}; got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")


def check_dtypes(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> torch.dtype:
    """Check that the arguments of `ffn` are tensors on one device, of one supported dtype or under autocast.

    Returns the dtype to compute in: theirs, or autocast's (fp64 is left alone, as torch's own linear does).

    Raises: TypeError: not tensors, or dtypes that differ or are unsupported. ValueError: devices that differ.
    """
    if x is None:
        raise TypeError("x must be a tensor, got NoneType")
    check_tensors(x, w1, w2, b1, b2)
    dtype, device = x.dtype, x.device
    kind = device.type
    autocast = dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind)
    dtypes = SUPPORTED_DTYPES if autocast else (dtype,)
    if dtype not in FFN_DTYPES:
        raise TypeError(f"dtype {dtype} is not one of {', '.join(map(str, FFN_DTYPES))}")
    for t in (w1, w2, b1, b2):
        if t is not None and (t.device != device or t.dtype not in dtypes):
            _reject_mixture({"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2})
    return torch.get_autocast_dtype(kind) if autocast else dtype


def _reject_mixture(given: dict[str, Tensor | None]) -> None:
    tensors = {name: t for name, t in given.items() if t is not None}
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError("one device expected, got " + ", ".join(f"{name} {t.device}" for name, t in tensors.items()))
    raise TypeError(
        "one dtype expected outside of torch.autocast, got "
        + ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
    )


def check_memory(w1: Tensor, w2: Tensor) -> None:
    """Check that the weights a wrapper of linear_fc1 and linear_fc2 lets through still have memory.

    Raises: ValueError: FSDP, applied to one of the two alone, has freed its weight again.
    """
    for name, weight in (("linear_fc1", w1), ("linear_fc2", w2)):
        if weight.numel() and not weight.untyped_storage().size():
            raise ValueError(
                f"the memory of {name}.weight {list(weight.shape)} was freed before its use: apply FSDP to the "
                f"module that it is in or to one around that, or to {name} with reshard_after_forward=False"
            )


def check_main_grads(w1: Tensor, w2: Tensor) -> None:
    """Check what gradient_accumulation_fusion adds weight gradients to: a contiguous fp32 `main_grad` of each weight
    that needs a gradient, of its shape and on its device.

    Raises: ValueError: it is missing or does not fit. RuntimeError: under torch.compile, which cannot trace it.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "gradient_accumulation_fusion writes to an attribute of the weights: not under torch.compile"
        )
    for name, weight in (("w1", w1), ("w2", w2)):
        main_grad = getattr(weight, "main_grad", None)
        if weight.requires_grad and not (
            isinstance(main_grad, Tensor)
            and main_grad.shape == weight.shape
            and main_grad.dtype == torch.float32
            and main_grad.device == weight.device
            and main_grad.is_contiguous()
        ):
            found = (
                f"{list(main_grad.shape)} {main_grad.dtype} on {main_grad.device} with strides {main_grad.stride()}"
                if isinstance(main_grad, Tensor)
                else repr(main_grad)
            )
            raise ValueError(
                f"gradient_accumulation_fusion needs {name}.main_grad, contiguous {list(weight.shape)} torch.float32 "
                f"on {weight.device}; got {found}"
            )
