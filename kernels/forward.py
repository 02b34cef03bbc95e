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
from ._launch import (
    Operand,
    addressable,
    can_address,
    check_matrix,
    configuration,
    fresh,
    grid,
    prepared_once,
    signature,
)
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
    """A form, why it is that one, and the configurations to hand to its launches; None: they ask the tables."""

    form: str
    why: str
    config: Config | None = None
    config2: Config | None = None


def forward_form(
    x: Operand,
    w1: Operand,
    w2: Operand,
    activation: str,
    arch: str | None = None,
    batch_invariant: bool = False,
    by_torch: bool = True,
    form: str | None = None,
) -> Choice:
    """Return how forward is launched for these operands on an architecture, by default that of their device; form: one
    of FORMS instead of the one that the tables choose.

    Raises: ValueError: a form that does not take so many tokens, or one beside batch_invariant; no matrices.
    """
    for name, operand in (("Linear1 first operand", x), ("Linear1 weight", w1), ("Linear2 weight", w2)):
        check_matrix(f"ffn {name}", operand)
    asked, arch = arch, arch or _configs.arch_of(x.device)
    (M, K), N, H = x.shape, w1.shape[0] // halves(activation), w2.shape[0]
    gated = "gated_" if activation in GATED_ACTIVATIONS else ""
    matrices = x, w1, w2, fresh(M, N, x), fresh(M, H, x)
    if form is not None and batch_invariant:
        raise ValueError(f"a batch-invariant forward has one form, chosen by the architecture; got form {form!r}")
    if form is None and 0 in (M, N, H):
        return Choice(TWO, f"a dim of size 0: {M} tokens, {N} features, {H} outputs")
    if batch_invariant:
        return _batch_invariant(matrices, gated, arch)
    if form in (None, FEW):
        few = _configs.select_for_few_tokens(f"{gated}few_tokens", x, M, N, K, asked)
        if few is not None and can_address(few, *matrices):
            return Choice(FEW, f"{M} tokens are one tile of {few.BLOCK_M} rows", few)
    if form == FEW:
        raise ValueError(f"form {form!r} takes at most a tile of tokens, in 16 bits and aligned; got {[*x.shape]}")
    if form is not None:
        return Choice(form, "as asked")
    # By the tables' tiles: a measured row says which tiles are best in one launch, not that one launch is.
    tiles = grid(configuration(f"{gated}ffn", None, M, N, K, *matrices, arch=arch), M, N)[0]
    one, load = _configs.in_one_launch(arch, tiles)
    why = f"{tiles} tiles of act on {_configs.PROCESSORS[arch]} processors, {load}"
    if one:
        return Choice(SINGLE, why)
    faster = _configs.faster_by_torch("linear", x, M, H, N, asked) if by_torch else None
    if faster is not None:
        return Choice(TWO, f"{why}; Linear2 by {faster}")
    if arch in DEPENDENT_LAUNCHES:
        return Choice(DEPENDENT, why)
    return Choice(TWO, f"{why}; no dependent launches on {arch}")


def _batch_invariant(matrices: tuple[Operand, ...], gated: str, arch: str) -> Choice:
    x, w1, w2, act, y = matrices
    why = "batch-invariant: the same launches and tiles for any number of tokens"

    def fixed(kernel: str, *operands: Operand) -> Config:
        return addressable(kernel, _configs.batch_invariant(kernel, x, arch), *operands)

    if _configs.MOST_WAVES[arch]:
        return Choice(SINGLE, why, fixed(f"{gated}ffn", *matrices))
    return Choice(TWO, why, fixed(f"{gated}linear_act", x, w1, act), fixed("linear", act, w2, y))


@prepared_once
def _chosen(x, w1, w2, activation, batch_invariant, by_torch, form, arithmetic) -> Choice:
    return forward_form(Operand(*x), Operand(*w1), Operand(*w2), activation, None, batch_invariant, by_torch, form)


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

    Raises: ValueError: an unknown activation, keep or form, a form that does not take so many tokens or that is asked
    for beside batch_invariant; shapes, dtypes, devices or strides that do not fit (the message shows them).
    """
    if keep not in KEPT or form not in (None, *FORMS):
        raise ValueError(f"keep must be one of {KEPT} and form of {FORMS} or None, got {keep!r} and {form!r}")
    save_pre_act = keep == "pre_act"
    if batch_invariant and (not x.is_contiguous() or x.data_ptr() % 16):
        x = x.clone(memory_format=torch.contiguous_format)  # nor may where x lies choose tiles
    by_torch = by_torch and out_dtype in (None, x.dtype)  # nor does linear call it otherwise
    form, _, config, config2 = _chosen(
        signature(x), signature(w1), signature(w2), activation, batch_invariant, by_torch, form,
        _configs.arithmetic_of(x.dtype),
    )  # fmt: skip
    if form == FEW and config is not None:
        y, act, pre_act = ffn_few_tokens(x, w1, b1, w2, b2, activation, save_pre_act, config, out_dtype)
    elif form == SINGLE:
        y, act, pre_act = ffn_single_launch(x, w1, b1, w2, b2, activation, save_pre_act, out_dtype, config)
    else:
        dependent = form == DEPENDENT
        act, pre_act = linear_act(x, w1, b1, activation, save_pre_act, config, has_dependent=dependent)
        y = linear(act, w2, b2, out_dtype, config2, by_torch=by_torch, dependent=dependent)
    return y, act if keep == "act" else pre_act
