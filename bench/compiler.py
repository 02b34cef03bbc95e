"""Say whether torch.compile works on a CPU here, which takes a C++ compiler and Python's headers."""

import functools

import torch


@functools.cache
def missing() -> str | None:
    """Compile something small; return why it fails, a line, or None."""
    try:
        torch.compile(lambda z: torch.tanh(z) + z)(torch.ones(8))
    except Exception as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None
