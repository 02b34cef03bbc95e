"""What every launcher needs: operand checks, TMA eligibility, descriptors, grid and device."""

import contextlib

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ._configs import Config, arithmetic_of

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, t: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Require a 2-D tensor of a supported dtype whose last dim is contiguous; `like` fixes dtype and device.

    Raises: ValueError: with the shape, strides, dtype and device at hand.
    """
    if t.dim() != 2 or (t.shape[1] > 1 and t.stride(1) != 1):
        raise ValueError(
            f"{name}: expected a 2-D tensor with a contiguous last dim, got {tuple(t.shape)} with strides {t.stride()}"
        )
    if t.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{name}: dtype {t.dtype} is not one of {', '.join(map(str, SUPPORTED_DTYPES))}")
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise ValueError(f"{name}: {t.dtype} on {t.device} beside {like.dtype} on {like.device}")


def check_operands(name: str, a: torch.Tensor, b: torch.Tensor, trans_b: bool) -> tuple[int, int, int]:
    """Return (M, N, K) of a [M, K] @ b [K, N], or @ b [N, K].T with trans_b.

    Raises: ValueError: inner dims differ, or an operand fails `check_matrix` (the message shows both shapes).
    """
    check_matrix(f"{name} first operand", a)
    check_matrix(f"{name} weight", b, like=a)
    N, K = b.shape if trans_b else b.shape[::-1]
    if a.shape[1] != K:
        raise ValueError(f"{name}: inner dims differ: {tuple(a.shape)} and weight {tuple(b.shape)}")
    return a.shape[0], N, K


def check_vector(name: str, v: torch.Tensor | None, size: int, like: torch.Tensor) -> None:
    """Require v to be None or a contiguous [size] of like's dtype and device. Raises: ValueError otherwise."""
    if v is not None:
        check_like(name, v, (size,), like)


def check_like(name: str, t: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Require a contiguous tensor of this shape, of like's dtype and device. Raises: ValueError otherwise."""
    if t.shape != shape or not t.is_contiguous() or t.dtype != like.dtype or t.device != like.device:
        raise ValueError(
            f"{name}: expected contiguous {shape} {like.dtype} on {like.device}, got {tuple(t.shape)} {t.dtype} on "
            f"{t.device} with strides {t.stride()}"
        )


def aligned(*tensors: torch.Tensor) -> bool:
    """Say whether TMA and 16-byte copies can address every tensor: base and row stride multiples of 16 bytes, rows
    that do not overlap, nothing empty."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.stride(1) == 1
        and t.numel() > 0
        for t in tensors
    )


def operands(use_tma: bool, *tensors_and_blocks: tuple[torch.Tensor, tuple[int, int]]) -> list:
    """Return kernel arguments: the tensors themselves, or host-side descriptors that load and store `block`s."""
    if not use_tma:
        return [t for t, _ in tensors_and_blocks]
    return [TensorDescriptor(t, list(t.shape), list(t.stride()), list(b)) for t, b in tensors_and_blocks]


def precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of the dots: "ieee" or "tf32"; it matters for fp32 operands only."""
    return "ieee" if arithmetic_of(dtype) == "ieee" else "tf32"


def grid(config: Config, rows: int, cols: int) -> tuple[int]:
    """Return the 1-D grid that covers a [rows, cols] output with config's tiles."""
    # Plain arithmetic: triton.cdiv costs a microsecond on the host.
    return (-(-rows // config.BLOCK_M) * -(-cols // config.BLOCK_N),)


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make t's GPU current for a launch: Triton launches on the current device, whatever its arguments say."""
    if t.device.type == "cuda" and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()
