"""Kernels stay inside their tensors, and find what lies far apart in them."""

import contextlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from acceptance import assert_exact
from triton.runtime import interpreter as triton_interpreter

from tpffn_triton import interpreter
from tpffn_triton.kernels._configs import Config
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, wgrad

interpreter.install()
TINY = Config(32, 32, 32, 4, 2)


def integers(*shape, device):
    """Draw -1, 0 and 1 in bf16: sums of a few products are exact."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    return torch.randint(-1, 2, shape, generator=generator).to(device, torch.bfloat16)


@pytest.mark.cpu_only
@pytest.mark.parametrize("edge", ["end", "start"])
def test_guard_pages(edge):
    """Every operand ends right before, or starts right after, a page that faults (guarded_calls.py)."""
    script = Path(__file__).with_name("guarded_calls.py")
    result = subprocess.run([sys.executable, script, edge], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stdout[-500:]}{result.stderr[-2000:]}"
    assert "80 calls" in result.stdout


@pytest.mark.cpu_only
def test_guard_pages_notice_a_row_too_many():
    """The test of the test: reading past the end must kill the process."""
    script = Path(__file__).with_name("guarded_calls.py")
    result = subprocess.run([sys.executable, script, "end", "--overrun"], capture_output=True, text=True, timeout=240)
    assert result.returncode < 0, result.stdout


def test_a_step_through_the_reduction_past_two_to_the_31(device):
    """Tokens 2²⁶ elements apart: 32 of them, one step of the pointer path through wgrad's reduction, pass 32 bits."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    stride, tokens = 2**26 + 8, 40
    far = torch.empty((tokens - 1) * stride + 16, dtype=torch.bfloat16, device=device)
    far = far.as_strided((tokens, 16), (stride, 1))
    near = integers(tokens, 16, device=device)
    far.copy_(near)
    assert_exact("wgrad", wgrad(far, near, config=TINY), near.double().t() @ near.double())
    assert_exact("wgrad", wgrad(near, far, config=TINY), near.double().t() @ near.double())


def test_offsets_past_two_to_the_31(device):
    """Rows that lie 2³⁰ elements apart: the third starts past what 32 bits address."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    stride, K = 2**30 + 8, 16
    far = torch.empty(2 * stride + K, dtype=torch.bfloat16, device=device).as_strided((3, K), (stride, 1))
    near = integers(3, K, device=device)
    far.copy_(near)
    weight, bias = (integers(*s, device=device) for s in ((24, K), (24,)))
    for config in (None, TINY):
        act, _ = linear_act(far, weight, bias, "relu", False, config)
        assert torch.equal(act, F.relu(F.linear(near, weight, bias)))
        assert torch.equal(wgrad(far, near, config=config), near.t() @ near)
        assert torch.equal(linear(near, far, None, config=config), near @ near.t())
        assert torch.equal(dgrad(near[:, :3].contiguous(), far, config=config), near[:, :3] @ near)
    assert torch.equal(column_sum(far), near.sum(0))


@contextlib.contextmanager
def last_program_only():
    """Interpret the last program of every grid and no other; on a GPU all of them run."""
    call = triton_interpreter.GridExecutor.__call__

    def call_last(self, *args, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k in inspect.getfullargspec(self.fn).args}
        builder, scope = triton_interpreter.interpreter_builder, triton_interpreter._patch_lang(self.fn)
        try:
            values = inspect.getcallargs(self.fn, *args, **kwargs).items()
            values = {k: v if k in self.constexprs else triton_interpreter._implicit_cvt(v) for k, v in values}
            builder.set_grid_dim(*self.grid)
            builder.set_grid_idx(*(size - 1 for size in self.grid))
            self.fn(**values)
        finally:
            scope.restore()

    triton_interpreter.GridExecutor.__call__ = call_last
    try:
        yield
    finally:
        triton_interpreter.GridExecutor.__call__ = call


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("config", [None, TINY], ids=["table", "pointers"])
def test_outputs_of_more_than_two_to_the_31_elements(config, activation, device):
    """The last tile of act, pre_act and d_pre lies past 2³¹ elements; the other tiles stay untouched memory."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    M, N, K, tail = 2**17 + 8, 2**14 + 8, 16, slice(-8, None)
    width = 2 * N if activation == "swiglu" else N
    x, weight, w2 = (integers(*s, device=device) for s in ((M, K), (width, K), (K, N)))
    with last_program_only():
        act, pre_act = linear_act(x, weight, None, activation, True, config)
        halves = [slice(-8 - N * i, width - N * i) for i in range(width // N)]
        for half in halves:
            assert torch.equal(pre_act[tail, half], x[tail] @ weight[half].t())
        d_pre, again, _ = linear_dact(x, w2, pre_act, activation, True, False, config)
    small = linear_act(x[tail], torch.cat([weight[half] for half in reversed(halves)]), None, activation, True, TINY)
    small_d_pre, small_again, _ = linear_dact(x[tail], w2[:, tail], small[1], activation, True, False, TINY)
    assert torch.equal(act[tail, tail], small[0])
    assert torch.equal(again[tail, tail], small_again)
    for i, half in enumerate(reversed(halves)):
        assert torch.equal(d_pre[tail, half], small_d_pre[:, 8 * i : 8 * i + 8])
