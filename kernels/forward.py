"""Compute the forward pass of one rank, y = act(x @ w1.T + b1) @ w2.T + b2, in one launch or two.

    form                    launches
    "single launch"         ffn_single_launch
    "dependent launches"    linear_act, then linear, which starts while that one ends (programmatic dependent launch)
    "two launches"          linear_act, linear

Shapes and dtypes: ffn_single_launch.py. Forms that choose the same tiles give the same bits.
"""

from typing import NamedTuple

import torch

from . import _configs
from ._configs import Config
from ._launch import Operand, configuration, fresh, grid, prepared_once, signature
from .activations import GATED_ACTIVATIONS, halves
from .ffn_single_launch import ffn_single_launch
from .linear_act import linear_act
from .matmul import linear

SINGLE, DEPENDENT, TWO = FORMS = ("single launch", "dependent launches", "two launches")
KEPT = ("pre_act", "act", "nothing")
# Architectures whose launches can wait for the one before.
DEPENDENT_LAUNCHES = ("sm_90", "sm_100")


class Choice(NamedTuple):
    """A form, the configuration that a single launch has (None: nothing to compute), and why it is that form."""

    form: str
    config: Config | None
    why: str


def forward_form(x: Operand, w1: Operand, w2: Operand, activation: str, arch: str | None = None) -> Choice:
    """Return how forward is launched for these operands on an architecture, by default that of their device."""
    arch = arch or _configs.arch_of(x.device)
    M, N, H = x.shape[0], w1.shape[0] // halves(activation), w2.shape[0]
    if 0 in (M, N, H):
        return Choice(TWO, None, f"a dim of size 0: {M} tokens, {N} features, {H} outputs")
    kernel = "gated_ffn" if activation in GATED_ACTIVATIONS else "ffn"
    act, y = fresh(M, N, x), fresh(M, H, x)
    config = configuration(kernel, None, M, N, x, w1, w2, act, y, arch=arch)
    tiles = grid(config, M, N)[0]
    one, load = _configs.in_one_launch(arch, tiles)
    why = f"{tiles} tiles of act on {_configs.PROCESSORS[arch]} processors, {load}"
    if one:
        return Choice(SINGLE, config, why)
    if arch in DEPENDENT_LAUNCHES:
        return Choice(DEPENDENT, config, why)
    return Choice(TWO, config, f"{why}; no dependent launches on {arch}")


@prepared_once
def _form(x, w1, w2, activation, arithmetic) -> str:
    return forward_form(Operand(*x), Operand(*w1), Operand(*w2), activation).form


def ffn_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None = None,
    form: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y [M, H] in out_dtype (None: x's), and what to keep of forward: "pre_act", "act" or "nothing" (None).

    form: one of FORMS instead of the one that `forward_form` chooses.

    Raises: ValueError: an unknown activation, keep or form; shapes, dtypes, devices or strides that do not fit (the
    message shows them).
    """
    if keep not in KEPT or form not in (None, *FORMS):
        raise ValueError(f"keep must be one of {KEPT} and form of {FORMS} or None, got {keep!r} and {form!r}")
    save_pre_act = keep == "pre_act"
    form = form or _form(signature(x), signature(w1), signature(w2), activation, _configs.arithmetic_of(x.dtype))
    if form == SINGLE:
        y, act, pre_act = ffn_single_launch(x, w1, b1, w2, b2, activation, save_pre_act, out_dtype)
    else:
        dependent = form == DEPENDENT
        act, pre_act = linear_act(x, w1, b1, activation, save_pre_act, has_dependent=dependent)
        y = linear(act, w2, b2, out_dtype, dependent=dependent)
    return y, act if keep == "act" else pre_act
