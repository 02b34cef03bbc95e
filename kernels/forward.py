"""Compute the forward pass of one rank, y = act(x @ w1.T + b1) @ w2.T + b2, in one launch or two.

    form                    launches
    "few tokens"            ffn_few_tokens: at most a tile of tokens
    "single launch"         ffn_single_launch
    "dependent launches"    linear_act, then linear, which starts while that one ends (programmatic dependent launch)
    "two launches"          linear_act, linear

Shapes and dtypes: ffn_single_launch.py. Forms that choose the same tiles give the same bits, but for few tokens, whose
reductions may be split. Batch-invariant: form and tiles are the same for every number of tokens, and so are the bits of
each token's results.
"""

from typing import NamedTuple

import torch

from . import _configs
from ._configs import Config
from ._launch import Operand, can_address, configuration, fresh, grid, prepared_once, signature
from .activations import GATED_ACTIVATIONS, halves
from .ffn_few_tokens import ffn_few_tokens
from .ffn_single_launch import ffn_single_launch
from .linear_act import linear_act
from .matmul import linear

FEW, SINGLE, DEPENDENT, TWO = FORMS = ("few tokens", "single launch", "dependent launches", "two launches")
KEPT = ("pre_act", "act", "nothing")
# Architectures whose launches can wait for the one before.
DEPENDENT_LAUNCHES = ("sm_90", "sm_100")


class Choice(NamedTuple):
    """A form, the configuration that its first launch has (None: nothing to compute), and why it is that form. config2:
    of linear, where the choice is not left to the tables."""

    form: str
    config: Config | None
    why: str
    config2: Config | None = None


class _Sizes(NamedTuple):
    """What follows from the operands: sizes, and the prefix of the kernels' names."""

    M: int
    N: int
    K: int
    H: int
    gated: str
    matrices: tuple[Operand, ...]  # x, w1, w2, act, y


def _sizes(x: Operand, w1: Operand, w2: Operand, activation: str) -> _Sizes:
    M, N, H = x.shape[0], w1.shape[0] // halves(activation), w2.shape[0]
    gated = "gated_" if activation in GATED_ACTIVATIONS else ""
    return _Sizes(M, N, x.shape[1], H, gated, (x, w1, w2, fresh(M, N, x), fresh(M, H, x)))


def few_tokens_config(x: Operand, w1: Operand, w2: Operand, activation: str, arch: str | None = None) -> Config | None:
    """Return the configuration of a launch for few tokens; None: these are too many, or cannot be addressed by it."""
    M, N, K, _, gated, matrices = _sizes(x, w1, w2, activation)
    config = _configs.select_for_few_tokens(f"{gated}few_tokens", x, M, N, K, arch)
    return config if config is not None and can_address(config, *matrices) else None


def forward_form(
    x: Operand,
    w1: Operand,
    w2: Operand,
    activation: str,
    arch: str | None = None,
    batch_invariant: bool = False,
    by_torch: bool = True,
) -> Choice:
    """Return how forward is launched for these operands on an architecture, by default that of their device."""
    asked, arch = arch, arch or _configs.arch_of(x.device)
    M, N, K, H, gated, matrices = _sizes(x, w1, w2, activation)
    if 0 in (M, N, H):
        return Choice(TWO, None, f"a dim of size 0: {M} tokens, {N} features, {H} outputs")
    if batch_invariant:
        return _batch_invariant(matrices, gated, arch)
    few = few_tokens_config(x, w1, w2, activation, asked)
    if few is not None:
        return Choice(FEW, few, f"{M} tokens are one tile of {few.BLOCK_M} rows")
    # By the tables' tiles: a measured row says which tiles are best in one launch, not that one launch is.
    tiles = grid(configuration(f"{gated}ffn", None, M, N, K, *matrices, arch=arch), M, N)[0]
    config = configuration(f"{gated}ffn", None, M, N, K, *matrices, arch=asked)
    one, load = _configs.in_one_launch(arch, tiles)
    why = f"{tiles} tiles of act on {_configs.PROCESSORS[arch]} processors, {load}"
    if one:
        return Choice(SINGLE, config, why)
    faster = _configs.faster_by_torch("linear", x, M, H, N, asked) if by_torch else None
    if faster is not None:
        return Choice(TWO, config, f"{why}; Linear2 by {faster}")
    if arch in DEPENDENT_LAUNCHES:
        return Choice(DEPENDENT, config, why)
    return Choice(TWO, config, f"{why}; no dependent launches on {arch}")


def _batch_invariant(matrices: tuple[Operand, ...], gated: str, arch: str) -> Choice:
    x, w1, w2, act, y = matrices
    why = "batch-invariant: the same launches and tiles for any number of tokens"
    if _configs.MOST_WAVES[arch]:
        return Choice(SINGLE, _invariant_config(f"{gated}ffn", arch, *matrices), why)
    first = _invariant_config(f"{gated}linear_act", arch, x, w1, act)
    return Choice(TWO, first, why, _invariant_config("linear", arch, act, w2, y))


def _invariant_config(kernel: str, arch: str, *operands: Operand) -> Config:
    config = _configs.batch_invariant(kernel, operands[0], arch)
    if can_address(config, *operands):
        return config
    return _configs.odd_strides(kernel, _configs.arithmetic_of(operands[0].dtype))


@prepared_once
def _chosen(x, w1, w2, activation, batch_invariant, by_torch, arithmetic) -> Choice:
    return forward_form(Operand(*x), Operand(*w1), Operand(*w2), activation, None, batch_invariant, by_torch)


@prepared_once
def _few(x, w1, w2, activation, arithmetic) -> Config | None:
    return few_tokens_config(Operand(*x), Operand(*w1), Operand(*w2), activation)


def ffn_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    form: str | None = None,
    by_torch: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y [M, H] in out_dtype (None: x's), and what to keep of forward: "pre_act", "act" or "nothing" (None).

    batch_invariant: a token's y does not depend on the other tokens, nor on their number, in any bit.
    form: one of FORMS instead of the one that `forward_form` chooses; by_torch: as of `linear`.

    Raises: ValueError: an unknown activation, keep or form, a form that does not take so many tokens; shapes, dtypes,
    devices or strides that do not fit (the message shows them).
    """
    if keep not in KEPT or form not in (None, *FORMS):
        raise ValueError(f"keep must be one of {KEPT} and form of {FORMS} or None, got {keep!r} and {form!r}")
    save_pre_act = keep == "pre_act"
    if batch_invariant and (not x.is_contiguous() or x.data_ptr() % 16):
        x = x.clone(memory_format=torch.contiguous_format)  # nor may where x lies choose tiles
    operands = signature(x), signature(w1), signature(w2), activation
    arithmetic = _configs.arithmetic_of(x.dtype)
    config: Config | None = None
    config2: Config | None = None
    if form is None:
        form, config, _, config2 = _chosen(*operands, batch_invariant, by_torch, arithmetic)
    elif form == FEW:
        config = _few(*operands, arithmetic)
        if config is None:  # only where a caller names the form: forward_form chooses it with its row
            raise ValueError(f"form {form!r} takes at most a tile of tokens, in 16 bits and aligned; got {[*x.shape]}")
    fixed = config if batch_invariant else None
    if form == FEW and config is not None:
        y, act, pre_act = ffn_few_tokens(x, w1, b1, w2, b2, activation, save_pre_act, config, out_dtype)
    elif form == SINGLE:
        y, act, pre_act = ffn_single_launch(x, w1, b1, w2, b2, activation, save_pre_act, out_dtype, fixed)
    else:
        dependent = form == DEPENDENT
        act, pre_act = linear_act(x, w1, b1, activation, save_pre_act, fixed, has_dependent=dependent)
        y = linear(act, w2, b2, out_dtype, config2, by_torch=by_torch, dependent=dependent)
    return y, act if keep == "act" else pre_act
