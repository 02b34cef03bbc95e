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
from tpffn_triton.kernels._launch import SUPPORTED_DTYPES, Operand, configuration, grid
from tpffn_triton.kernels.activations import GATED_ACTIVATIONS, halves
from tpffn_triton.kernels.column_sum import BLOCK_N as SUMMED_COLUMNS
from tpffn_triton.kernels.column_sum import ROWS_PER_PROGRAM
from tpffn_triton.kernels.forward import forward_form
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS
from tpffn_triton.kernels.weight_grads import SUM_COLS, form_of
from tpffn_triton.plan_report import align
from tpffn_triton.validation import check_modes, check_sizes

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class KernelLaunch:
    """One launch, or several alike: `programs` is of all of them. config is None for a sum of columns."""

    pass_: str
    kernel: str
    computes: str
    config: Config | None
    programs: int


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
        return "-", "-", "-", "-", row.programs, "-"
    tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}"
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
    arch: str | None = None,
) -> Explanation:
    """Return what one rank launches for x of this shape, [..., H], when all gradients are wanted and all tensors are
    contiguous; the other arguments are as in `ffn` and `TensorParallelFFN`.

    arch    "sm_80", "sm_90", "sm_100" or "gfx942"; None: what this machine would do

    Raises: TypeError, ValueError: arguments that do not fit (the message shows them).
    """
    check_modes(activation, save, sequence_parallel, None, forward_chunks)
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
    if arch is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if backend(device) == "native":
            why = "no launches: torch and oneDNN compute CPU tensors; name an arch to see what a GPU would launch"
            return Explanation(size, "native", (), {"native": why})
        arch = _configs.arch_of(device)
    asked = _Asked(own_tokens, M, H, F, halves(activation) * F, activation, dtype, bias, arch)
    launches: list[KernelLaunch] = []
    chunks = forward_chunks if world_size > 1 else 1
    reasons = {
        "forward": asked.forward(launches, chunks),
        "backward": asked.backward(launches, save == "nothing", sequence_parallel and world_size > 1),
        "tiles": "the first row of the table that is not much taller than its output and fills three quarters of the "
        "processors, else the last; where 16 bytes of an operand's row cannot be copied at once, the row for that",
    }
    if any(row.config is not None and row.config.origin == "compiles" for row in launches):
        reasons["origin compiles"] = "it compiles without spills; its speed is not measured"
    return Explanation(f"{size}, on {arch}: {PROCESSORS[arch]} processors", arch, tuple(launches), reasons)


@dataclass
class _Asked:
    own_tokens: int  # with sequence parallelism a slice of all
    M: int
    H: int
    F: int
    W: int  # F, or 2F
    activation: str
    dtype: torch.dtype
    bias: bool
    arch: str

    def matrix(self, rows: int, cols: int) -> Operand:
        return Operand((rows, cols), (cols, 1), self.dtype, _CPU, 0)

    def launch(self, pass_: str, kernel: str, computes: str, rows: int, cols: int, *operands: Operand) -> KernelLaunch:
        """Return a launch of a kernel with one [rows, cols] output."""
        gated = self.activation in GATED_ACTIVATIONS and "act" in kernel
        config = configuration(f"{'gated_' * gated}{kernel}", None, rows, cols, *operands, arch=self.arch)
        return KernelLaunch(pass_, kernel, computes, config, grid(config, rows, cols)[0])

    def forward(self, launches: list[KernelLaunch], chunks: int) -> str:
        M, H, F = self.M, self.H, self.F
        x, w1, w2 = self.matrix(M, H), self.matrix(self.W, H), self.matrix(H, F)
        act, y = self.matrix(M, F), self.matrix(M, H)
        choice = forward_form(x, w1, w2, self.activation, self.arch)
        if choice.config is not None and chunks == 1:
            programs = grid(choice.config, M, F)[0] + grid(choice.config, M, H)[0]
            launches.append(KernelLaunch("forward", "ffn", "act, y", choice.config, programs))
            return f"{choice.form}; {choice.why}"
        launches.append(self.launch("forward", "linear_act", "act", M, F, x, w1, act))
        if chunks == 1:
            launches.append(self.launch("forward", "linear", "y", M, H, act, w2, y))
            return f"{choice.form}; {choice.why}"
        rows = rows_of_a_chunk(M, chunks)
        for start in range(0, M, rows):
            part = min(rows, M - start)
            operands = self.matrix(part, F), w2, self.matrix(part, H)
            launches.append(self.launch("forward", "linear", f"y[{start}:{start + part}]", part, H, *operands))
        return "a launch a chunk; each is all-reduced behind the next one's"

    def backward(self, launches: list[KernelLaunch], recompute: bool, sequence_parallel: bool) -> str:
        M, H, F, W = self.M, self.H, self.F, self.W
        x, dy, act, d_pre = self.matrix(M, H), self.matrix(M, H), self.matrix(M, F), self.matrix(M, W)
        w1, w2 = self.matrix(W, H), self.matrix(H, F)
        if recompute:
            launches.append(self.launch("backward", "linear_act", "act, pre_act", M, F, x, w1, act))
        made = "d_pre" + ", act" * (not recompute) + ", db1's partial sums" * self.bias
        launches.append(self.launch("backward", "linear_dact", made, M, F, dy, w2, d_pre, act))
        launches.append(self.launch("backward", "dgrad", "dx", M, H, d_pre, w1, x))
        form = form_of(d_pre, x, dy, act, w1, w2, arch=self.arch)
        in_flight = sequence_parallel and not recompute
        if form.config is not None and not in_flight:
            programs = grid(form.config, W, H)[0] + grid(form.config, H, F)[0]
            programs += (-(-W // SUM_COLS) + -(-H // SUM_COLS)) * self.bias
            computes = "dw1, dw2" + ", db1, db2" * self.bias
            launches.append(KernelLaunch("backward", "weight_grads", computes, form.config, programs))
            return f"one launch of weight gradients; {form.why}"
        dw1 = [self.launch("backward", "wgrad", "dw1", W, H, d_pre, x, w1)]
        dw2 = [self.launch("backward", "wgrad", "dw2", H, F, dy, act, w2)]
        db1, db2 = [*self._sums("db1", -(-M // PARTIAL_ROWS), W)], [*self._sums("db2", self.own_tokens, H)]
        if in_flight:
            launches += [*db1, *dw2, *dw1, *db2]
            return "a launch a weight gradient; x is in flight behind dw2"
        launches += [*dw1, *dw2, *db1, *db2]
        return f"a launch a weight gradient; {form.why}"

    def _sums(self, name: str, rows: int, cols: int) -> Iterator[KernelLaunch]:
        """Yield the passes over so many rows of what a bias gradient sums."""
        while self.bias and rows > 0:
            rows = -(-rows // ROWS_PER_PROGRAM)
            yield KernelLaunch("backward", "column_sum", name, None, rows * -(-cols // SUMMED_COLUMNS))
            rows = 0 if rows == 1 else rows
