"""Say what forward and backward launch at a size: which kernels, with which tiles, and why.

The decisions are asked of kernels/, which takes them at every call; nothing is launched, so no GPU is needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tpffn_triton.backends import backend
from tpffn_triton.cost_model import rows_of_a_chunk
from tpffn_triton.kernels import _configs
from tpffn_triton.kernels._configs import PROCESSORS, TABLES, Config
from tpffn_triton.kernels._launch import SUPPORTED_DTYPES, Operand, configuration, fresh, grid
from tpffn_triton.kernels._tuned import TORCH_INSTEAD
from tpffn_triton.kernels.activations import GATED_ACTIVATIONS, halves
from tpffn_triton.kernels.column_sum import BLOCK_N as SUMMED_COLUMNS
from tpffn_triton.kernels.column_sum import ROWS_PER_PROGRAM
from tpffn_triton.kernels.forward import FEW, SINGLE, forward_form
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS
from tpffn_triton.kernels.weight_grads import SUM_COLS, form_of
from tpffn_triton.plan_report import align
from tpffn_triton.validation import check_modes, check_sizes

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class KernelLaunch:
    """One launch, or several alike: `programs` is of all of them. config is None for a sum of columns, and for a GEMM
    of torch's own (cuBLAS), whose kernel, programs and `measured` are "torch", 0 and what made it the choice."""

    pass_: str
    kernel: str
    computes: str
    config: Config | None
    programs: int
    measured: str = "-"


@dataclass(frozen=True)
class Explanation:
    """What is launched, in order, and why; str() lays it out as a table. Empty where torch and oneDNN compute.

    arch       the architecture whose tables were asked, or "native"
    reasons    pass → why it is so many launches; and how tiles are chosen
    """

    title: str
    arch: str
    launches: tuple[KernelLaunch, ...]
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.launches:
            return f"{self.title}\n{self.reasons['native']}"
        rows = [(row.pass_, row.kernel, row.computes, *_described(row)) for row in self.launches]
        header = ("pass", "kernel", "computes", "tile", ">warps", ">stages", "operands", ">programs", "origin")
        why = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join([self.title, *align(header, rows), *why])


def _described(row: KernelLaunch) -> Sequence:
    c = row.config
    if c is None:
        return "-", "-", "-", "-", row.programs or "-", row.measured
    tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}" + (f" in {c.SPLIT_K} slices" if c.SPLIT_K > 1 else "")
    return tile, c.num_warps, c.num_stages, "TMA" if c.USE_TMA else "pointers", row.programs, c.origin


def explain(
    shape: Sequence[int],
    ffn_hidden_size: int,
    *,
    activation: str = "gelu",
    dtype: torch.dtype = torch.bfloat16,
    world_size: int = 1,
    bias: bool = True,
    save: str = "pre_act",
    sequence_parallel: bool = False,
    forward_chunks: int = 1,
    batch_invariant: bool = False,
    arch: str | None = None,
) -> Explanation:
    """Return what one rank launches for x of this shape, [..., H], when all gradients are wanted and all tensors are
    contiguous; the other arguments are as in `ffn` and `TensorParallelFFN`.

    arch    "sm_80", "sm_90", "sm_100" or "gfx942", by its tables; None: what this machine would do, by what was
            measured on its GPU (bench/tune.py) as well

    Raises: TypeError, ValueError: arguments that do not fit (the message shows them).
    """
    check_modes(activation, save, sequence_parallel, None, forward_chunks, batch_invariant)
    if not isinstance(shape, Sequence) or not shape or any(not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"shape must be that of x, [..., H], got {shape!r}")
    H = shape[-1]
    check_sizes(H, ffn_hidden_size, world_size)
    if arch not in (None, *TABLES):
        raise ValueError(f"arch must be one of {', '.join(TABLES)}, got {arch!r}")
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}")
    own_tokens = torch.Size(shape[:-1]).numel()
    M = own_tokens * (world_size if sequence_parallel else 1)
    F = ffn_hidden_size // world_size
    size = f"x [{M}, {H}], F/P = {F}, {activation}, {str(dtype).removeprefix('torch.')}"
    device = _CPU
    if arch is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if backend(device) == "native":
            why = "no launches: torch and oneDNN compute CPU tensors; name an arch to see what a GPU would launch"
            return Explanation(size, "native", (), {"native": why})
        arch = _configs.arch_of(device)
    shard = Shard(own_tokens, M, H, F, activation, dtype, bias, arch, device, batch_invariant)
    forward, why_forward = shard.forward(chunks=forward_chunks if world_size > 1 else 1)
    backward, why_backward = shard.backward(save == "nothing", sequence_parallel and world_size > 1)
    launches = (*forward, *backward)
    measured = "what was measured on this GPU; else " if shard.arch is None else ""
    reasons = {
        "forward": why_forward,
        "backward": why_backward,
        "tiles": measured + "the first row of the table that is not much taller than its output and fills three "
        "quarters of the processors, else the last; where 16 bytes of an operand's row cannot be copied at once, the "
        "row for that",
    }
    if any(row.kernel == "few_tokens" for row in launches):
        reasons["tiles of few_tokens"] = (
            measured + "the least tall row that all tokens fit in, in slices where its tiles of act or of y fill "
            "less than three quarters of the processors"
        )
    if batch_invariant:
        reasons["tiles of forward"] = "the first row of the table of at most 64 columns, whatever the number of tokens"
    if any(row.config is not None and row.config.origin == "compiles" for row in launches):
        reasons["origin compiles"] = "it compiles (docs/compiled.md); its speed is not measured"
    return Explanation(f"{size}, on {arch}: {PROCESSORS[arch]} processors", arch, launches, reasons)


class Shard:
    """One rank's M tokens, of which own_tokens are its own, and F of the features: its launches, and why.

    choice      the form of forward that the tables choose
    gradients   how they have the weight and bias gradients computed
    device      a GPU: what was measured on it counts before arch's tables
    """

    def __init__(
        self,
        own_tokens: int,
        M: int,
        H: int,
        F: int,
        activation: str,
        dtype: torch.dtype,
        bias: bool,
        arch: str,
        device: torch.device = _CPU,
        batch_invariant: bool = False,
    ) -> None:
        self.own_tokens, self.bias, self.activation = own_tokens, bias, activation
        self.arch = None if device.type == "cuda" else arch
        self._gated = "gated_" * (activation in GATED_ACTIVATIONS)
        W = halves(activation) * F
        like = Operand((M, H), (H, 1), dtype, device, 0)
        self._x = self._y = like  # and their gradients
        self._w1, self._w2 = fresh(W, H, like), fresh(H, F, like)
        self._act, self._d_pre = fresh(M, F, like), fresh(M, W, like)
        self._of_gradients = self._d_pre, self._x, self._y, self._act, self._w1, self._w2
        self._inputs = self._x, self._w1, self._w2, activation, self.arch
        self.choice = forward_form(*self._inputs, batch_invariant)
        self.gradients = form_of(*self._of_gradients, arch=self.arch)

    def _launch(
        self,
        pass_: str,
        kernel: str,
        computes: str,
        out: Operand,
        *operands: Operand,
        config: Config | None = None,
    ) -> KernelLaunch:
        """Return a launch of a kernel with a program for each tile of out; config: not what the tables choose."""
        name = f"{self._gated}{kernel}" if "act" in kernel else kernel
        rows, cols = out.shape
        inner = operands[0].shape[0 if kernel == "wgrad" else 1]
        if kernel in TORCH_INSTEAD and config is None:
            measured = _configs.faster_by_torch(kernel, out, rows, cols, inner, self.arch)
            if measured is not None:
                return KernelLaunch(pass_, "torch", computes, None, 0, measured)
        config = configuration(name, config, rows, cols, inner, *operands, out, arch=self.arch)
        return KernelLaunch(pass_, kernel, computes, config, grid(config, rows, cols)[0])

    def forward(self, chunks: int = 1, form: str | None = None) -> tuple[list[KernelLaunch], str]:
        """Return the launches of forward, and why the tables choose theirs; form: one of forward.FORMS instead, of a
        single chunk. Raises: ValueError: a form that does not take these operands."""
        if chunks > 1:
            return self._forward_by_chunks(chunks), "a launch a chunk; each is all-reduced behind the next one's"
        x, w1, w2, act, y = matrices = self._x, self._w1, self._w2, self._act, self._y
        why = f"{self.choice.form}; {self.choice.why}"
        form, _, config, config2 = self.choice if form is None else forward_form(*self._inputs, form=form)
        if form in (FEW, SINGLE):
            kernel = "few_tokens" if form == FEW else "ffn"
            M, F = act.shape
            config = configuration(f"{self._gated}{kernel}", config, M, F, x.shape[1], *matrices, arch=self.arch)
            programs = (grid(config, M, F)[0] + grid(config, *y.shape)[0]) * config.SPLIT_K
            return [KernelLaunch("forward", kernel, "act, y", config, programs)], why
        linear_act = self._launch("forward", "linear_act", "act", act, x, w1, config=config)
        return [linear_act, self._launch("forward", "linear", "y", y, act, w2, config=config2)], why

    def _forward_by_chunks(self, chunks: int) -> list[KernelLaunch]:
        (M, H), F = self._y.shape, self._act.shape[1]
        launches = [self._launch("forward", "linear_act", "act", self._act, self._x, self._w1)]
        rows = rows_of_a_chunk(M, chunks)
        for start in range(0, M, rows):
            part = min(rows, M - start)
            chunk, out = fresh(part, F, self._act), fresh(part, H, self._y)
            launches.append(self._launch("forward", "linear", f"y[{start}:{start + part}]", out, chunk, self._w2))
        return launches

    def backward(
        self, recompute: bool = False, sequence_parallel: bool = False, at_once: bool | None = None
    ) -> tuple[list[KernelLaunch], str]:
        """Return the launches of backward, and why the tables choose theirs; at_once: whether one launch computes all
        weight and bias gradients instead, unless x is still in flight."""
        d_pre, x, dy, act, w1, w2 = self._of_gradients
        (M, W), (H, F) = d_pre.shape, w2.shape
        launches = [self._launch("backward", "linear_act", "act, pre_act", act, x, w1)] if recompute else []
        made = "d_pre" + ", act" * (not recompute) + ", db1's partial sums" * self.bias
        launches.append(self._launch("backward", "linear_dact", made, act, dy, w2, d_pre))
        launches.append(self._launch("backward", "dgrad", "dx", x, d_pre, w1))
        config, why = self.gradients
        if at_once is not None:
            row = configuration("weight_grads", None, W + F, H, M, *self._of_gradients, arch=self.arch)
            config = row if at_once else None
        in_flight = sequence_parallel and not recompute
        if config is not None and not in_flight:
            programs = grid(config, *w1.shape)[0] + grid(config, *w2.shape)[0]
            programs += (-(-W // SUM_COLS) + -(-H // SUM_COLS)) * self.bias
            computes = "dw1, dw2" + ", db1, db2" * self.bias
            launches.append(KernelLaunch("backward", "weight_grads", computes, config, programs))
            return launches, f"one launch of weight gradients; {why}"
        dw1 = self._launch("backward", "wgrad", "dw1", w1, d_pre, x)
        dw2 = self._launch("backward", "wgrad", "dw2", w2, dy, act)
        db1, db2 = [*self._sums("db1", -(-M // PARTIAL_ROWS), W)], [*self._sums("db2", self.own_tokens, H)]
        if in_flight:
            return [*launches, *db1, dw2, dw1, *db2], "a launch a weight gradient; x is in flight behind dw2"
        return [*launches, dw1, dw2, *db1, *db2], f"a launch a weight gradient; {why}"

    def _sums(self, name: str, rows: int, cols: int) -> Iterator[KernelLaunch]:
        """Yield the passes over so many rows of what a bias gradient sums, until one is left."""
        passes_left = self.bias and rows > 0
        while passes_left:
            rows = -(-rows // ROWS_PER_PROGRAM)
            yield KernelLaunch("backward", "column_sum", name, None, rows * -(-cols // SUMMED_COLUMNS))
            passes_left = rows > 1
