"""The kernel for few tokens, interpreted or on a GPU: results, slices of the reduction, which row is chosen."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from acceptance import assert_accurate, assert_exact
from kernel_cases import (
    FEW_TOKENS,
    assert_same,
    ffn_operands,
    ffn_results,
    integers,
    need_sm_90,
    randn,
    rows_of,
    running,
)
from triton.runtime.interpreter import InterpreterBuilder

from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs, _counters
from tpffn_triton.kernels._config import Config
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.kernels.ffn_few_tokens import ffn_few_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreter.install()
ROW = Config(32, 32, 32, 4, 2, PREFETCH_K=64)
SLICES = replace(ROW, SPLIT_K=2)
TMA = replace(SLICES, USE_TMA=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [ROW, SLICES, TMA], ids=["whole", "slices", "tma"])
def test_against_fp64(config, activation, dtype, device):
    if config.USE_TMA:
        need_sm_90(device, "TMA")
    args = ffn_operands(randn, FEW_TOKENS, activation, dtype, device)
    ours = ffn_few_tokens(*args, activation, True, config)
    exact = ffn_results([t.double() for t in args], activation)
    for name, *tensors in zip(("y", "act", "pre_act"), ours, ffn_results(args, activation), exact, strict=True):
        assert_accurate(name, *tensors)
    y, act, absent = ffn_few_tokens(*args, activation, False, config)
    assert absent is None
    assert_same((y, act), ours[:2])


@pytest.mark.parametrize("M", [1, 7, 32])
@pytest.mark.parametrize("slices", [1, 2, 4, 16])  # more than there are blocks: some slices are empty
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_small_integers_are_exact(activation, use_tma, slices, M, device):
    """act of relu is rounded to bf16, so y is compared with the fp64 product of that."""
    if use_tma:
        need_sm_90(device, "TMA")
    args = ffn_operands(integers, (M, *FEW_TOKENS[1:]), activation, torch.bfloat16, device)
    config = replace(ROW, USE_TMA=use_tma, SPLIT_K=slices)
    y, act, pre_act = ffn_few_tokens(*args, activation, True, config, torch.float32)
    _, exact, exact_pre_act = ffn_results([t.double() for t in args], activation)
    assert_exact("pre_act", pre_act, exact_pre_act)
    assert_exact("act", act, exact)
    assert_exact("y", y, F.linear(act.double(), args[3].double(), args[4].double()))


def test_pointers_take_odd_sizes_and_strides(device):
    args = ffn_operands(integers, (9, 45, 71, 37), "relu", torch.bfloat16, device)
    args[0] = torch.cat([args[0], args[0]], dim=1)[:, :45]
    y, act, _ = ffn_few_tokens(*args, "relu", False, replace(SLICES, SPLIT_K=4), torch.float32)
    assert_exact("y", y, F.linear(act.double(), args[3].double(), args[4].double()))


@pytest.mark.parametrize(("kernel", "arithmetic", "config"), rows_of("few_tokens", "gated_few_tokens"))
def test_every_configuration_row(kernel, arithmetic, config, device):
    """A tile of tokens but one, two tiles of features and a bit, and no slice as long as the others."""
    activation = "swiglu" if kernel.startswith("gated") else "gelu"
    shape = (config.BLOCK_M - 1, (config.SPLIT_K + 1) * config.BLOCK_K + 16, 2 * config.BLOCK_N + 16, 80)
    with running(config, arithmetic, device) as dtype:
        args = ffn_operands(randn, shape, activation, dtype, device)
        ours = ffn_few_tokens(*args, activation, True, config)
        exact = ffn_results([t.double() for t in args], activation)
        for name, *tensors in zip(("y", "act", "pre_act"), ours, ffn_results(args, activation), exact, strict=True):
            assert_accurate(name, *tensors)
        assert_same(ours, ffn_few_tokens(*args, activation, True, config))


def test_out_dtype_and_missing_biases(device):
    x, w1, b1, w2, b2 = ffn_operands(randn, FEW_TOKENS, "gelu", torch.bfloat16, device)
    for biases in ((b1, b2), (b1, None), (None, b2), (None, None)):
        y, act, _ = ffn_few_tokens(x, w1, biases[0], w2, biases[1], "gelu", False, SLICES, torch.float32)
        exact = [None if t is None else t.double() for t in (x, w1, biases[0], w2, biases[1])]
        assert_accurate("act", act, F.gelu(F.linear(x, w1, biases[0])), F.gelu(F.linear(*exact[:3])))
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), F.linear(act.double(), *exact[3:]), rtol=1e-5, atol=1e-5)


def test_launches_leave_the_counters_at_zero(device):
    """Many in a row, their sizes changing: nothing of one reaches the next."""
    for M, slices in ((5, 4), (32, 2), (1, 1), (32, 4)):
        args = ffn_operands(randn, (M, *FEW_TOKENS[1:]), "gelu", torch.bfloat16, device)
        config = replace(ROW, SPLIT_K=slices)
        assert_same(ffn_few_tokens(*args, "gelu", True, config), ffn_few_tokens(*args, "gelu", True, config))
        assert not any(kept.any() for kept in _counters._of_stream.values())


@pytest.mark.cpu_only
@pytest.mark.parametrize("slices", [1, 4])
def test_what_is_prefetched(slices, monkeypatch):
    """Each program of stage 2: whole lines from the start of its slice of its rows of w2, nothing outside of them."""
    found = []
    inline_asm = InterpreterBuilder.create_inline_asm

    def recorded(self, asm, constraints, values, *args):
        if asm.startswith("prefetch"):
            found.append(values[0].data.astype("int64"))
        return inline_asm(self, asm, constraints, values, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", recorded)
    N, H_ = 320, 48
    args = ffn_operands(randn, (5, 64, N, H_), "gelu", torch.bfloat16, "cpu")
    wide = torch.zeros(H_, N + 64, dtype=torch.bfloat16)
    wide[:, :N] = args[3]
    args[3] = wide[:, :N]
    ffn_few_tokens(*args, "gelu", False, replace(ROW, SPLIT_K=slices, PREFETCH_K=128))
    assert len(found) == 2 * slices, "a program for each of two tiles of y and each slice"
    length = -(-N // (32 * slices)) * 32
    for number, addresses in enumerate(found):
        tile, part = divmod(number, slices)
        offsets = (addresses - args[3].data_ptr()) // 2
        rows, cols = offsets // (N + 64), offsets % (N + 64)
        assert addresses.shape == (32, 2)
        assert {*rows.ravel().tolist()} == {*range(32 * tile, min(32 * tile + 32, H_))}
        end = min((part + 1) * length, N)
        assert {*cols.ravel().tolist()} == {min(part * length + step, end - 1) for step in (0, 64)}


def test_rejected(device):
    args = ffn_operands(randn, FEW_TOKENS, "gelu", torch.bfloat16, device)
    with pytest.raises(ValueError, match="24 tokens do not fit into one tile of Config"):
        ffn_few_tokens(*args, "gelu", False, replace(ROW, BLOCK_M=16))
    with pytest.raises(ValueError, match="no split epilogue for few tokens"):
        ffn_few_tokens(*args, "gelu", False, replace(ROW, SPLIT_EPILOGUE=True))
    with pytest.raises(ValueError, match="inner dims differ"):
        ffn_few_tokens(args[0][:, 8:], *args[1:], "gelu", False, ROW)
    with pytest.raises(ValueError, match="0 tokens"):
        ffn_few_tokens(args[0][:0], *args[1:], "gelu", False, ROW)
    with pytest.raises(ValueError, match="TMA cannot address"):
        ffn_few_tokens(args[0][:, 1:].contiguous(), args[1][:, 1:].contiguous(), *args[2:], "gelu", False, TMA)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["few_tokens", "gated_few_tokens"])
def test_the_row_is_the_least_tall_that_fits_and_fills_the_gpu(kernel, arch):
    like = torch.empty(0, dtype=torch.bfloat16)
    rows = _configs.TABLES[arch][kernel, "16bit"]
    for M in (1, 16, 17, 33, 64):
        for cols in (512, 1024, 3584, 8192, 16384):
            config = _configs.select_for_few_tokens(kernel, like, M, cols, 8192, arch)
            assert min(row.BLOCK_M for row in rows if row.BLOCK_M >= M) == config.BLOCK_M
            tall = [row for row in rows if row.BLOCK_M == config.BLOCK_M]
            programs = [-(-min(cols, 8192) // row.BLOCK_N) * row.SPLIT_K for row in tall]
            enough = [row for row, n in zip(tall, programs, strict=True) if n >= 0.75 * _configs.PROCESSORS[arch]]
            assert config == (enough or tall[-1:])[0]
    # A wide layer needs no slices, a narrow one does.
    assert _configs.select_for_few_tokens(kernel, like, 1, 16384, 8192, arch).SPLIT_K == 1
    assert _configs.select_for_few_tokens(kernel, like, 1, 512, 8192, arch).SPLIT_K > 1
    # So does one that is wide inside: y has few tiles.
    assert _configs.select_for_few_tokens(kernel, like, 1, 16384, 1024, arch).SPLIT_K > 1
    assert _configs.select_for_few_tokens(kernel, like, 65, 3584, 8192, arch) is None
    assert _configs.select_for_few_tokens(kernel, like.float(), 1, 3584, 8192, arch) is None


@pytest.mark.gpu
def test_ten_thousand_replays():
    """Of launches with and without slices, captured in one graph."""
    problems = [
        ffn_operands(randn, (M, 256, F_, 512), "gelu", torch.bfloat16, "cuda") for M, F_ in ((1, 512), (33, 4096))
    ]
    configs = [_configs.select_for_few_tokens("few_tokens", p[0], len(p[0]), len(p[1]), 256) for p in problems]
    calls = [lambda p=p, c=c: ffn_few_tokens(*p, "gelu", False, c)[0] for p, c in zip(problems, configs, strict=True)]
    expected = [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ys = [call() for call in calls]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for y in ys:
            y.zero_()
        graph.replay()
        for y, right in zip(ys, expected, strict=True):
            different += (y != right).sum()
    assert different.item() == 0
