"""Let an implementation be timed where it is right: its results are compared with fp64."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from ranks import Rank
from steps import Step
from torch import Tensor

ErrorOf = Callable[[Tensor, Tensor], Tensor]


def error_bound(dtype: str, activation: str) -> float:
    """Return the max_rel_err above which an implementation is refused.

    Three to ten times what eager shows at the named shapes: a wrong formula or a lost term lies above it.
    relu's derivative jumps at 0, where a rounding error of the pre-activation turns a whole element of d_pre
    on or off, in eager as well: with the errors of fp32 and TF32 sums, one element in about 10⁶ and 10³.
    """
    smooth = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 2e-2, "fp16": 3e-3}
    relu = {"fp32": 5e-3, "tf32": 5e-2, "bf16": 2e-2, "fp16": 5e-3}
    return (relu if activation == "relu" else smooth)[dtype]


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Have fp32 GEMMs use TF32 where dtype is tf32, and IEEE arithmetic otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def frobenius_error(off: Tensor, reference: Tensor) -> Tensor:
    """Return ‖off‖ / ‖ref‖ (Frobenius)."""
    return off.norm() / reference.norm()


def worst_row_error(off: Tensor, reference: Tensor) -> Tensor:
    """Return the largest ‖off‖ of a row over the root mean square of ‖ref‖ of the rows; a vector is one row.

    At least the Frobenius error, in which one wrong row of many thousands is lost.
    """
    rows, of_reference = (t.reshape(-1, t.shape[-1]).norm(dim=1) for t in (off, reference))
    return rows.max() / of_reference.square().mean().sqrt()


def relative_errors(
    step: Step, reference: dict[str, Tensor], rank: Rank, error_of: ErrorOf = frobenius_error
) -> dict[str, float]:
    """Run step; return the relative error of each of its tensors, the largest over ranks.

    Infinite: a tensor that is missing, of another shape, or not finite.
    """
    step.reset()
    step()
    outputs = step.outputs()
    names = [name for name in reference if step.mode == "fwd_bwd" or name == "y"]
    local = []
    for name in names:
        if name not in outputs or outputs[name].shape != reference[name].shape:
            local.append(float("inf"))
        else:
            off = outputs[name].double() - reference[name]
            local.append(error_of(off, reference[name]).item())
    step.reset()
    return dict(zip(names, rank.maxima(local), strict=True))


def worst_error(step: Step, reference: dict[str, Tensor], rank: Rank) -> tuple[float, str]:
    """Return the largest relative error of step's outputs over tensors and ranks, and the tensor's name."""
    return max((error, name) for name, error in relative_errors(step, reference, rank).items())


@dataclass(frozen=True)
class Checked:
    """A step and its relative error by tensor; or, refused, why it is not timed."""

    step: Step | None
    errors: dict[str, float]
    refused: str | None = None


def checked(
    what: str,
    make: Callable[[], Step],
    reference: dict[str, Tensor],
    bound: float,
    rank: Rank,
    error_of: ErrorOf = frobenius_error,
) -> Checked:
    """Make a step and compare it with the reference; what: how a refusal names it.

    A step that raises, here or where it runs first, is refused as a wrong one is. For ranks without a group: with one,
    the others may be waiting for this rank.
    """
    try:
        step = make()
        errors = relative_errors(step, reference, rank, error_of)
    except Exception as failure:
        traceback.print_exc()
        return Checked(None, {}, f"{what} failed: {type(failure).__name__}: {failure}")
    error, tensor = max((error, name) for name, error in errors.items())
    if error <= bound:
        return Checked(step, errors)
    return Checked(None, errors, f"{what} is wrong: {tensor} is off by {error:.2g} against fp64, allowed {bound:.2g}")
