"""Both GEMMs in one launch: against fp64 and eager, and bit for bit against the two launches it replaces.

That it cannot race or hang is shown by test_single_launch_schedules.py, test_protocol_model.py and compile_gate.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from acceptance import assert_accurate, assert_exact
from kernel_cases import (
    DTYPES,
    FFN_SHAPES,
    SPLIT,
    TINY,
    TMA,
    assert_same,
    ffn_operands,
    ffn_results,
    integers,
    need_sm_90,
    randn,
    rows_of,
    running,
)

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels import _counters
from tpffn_triton.kernels._configs import TABLES
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.kernels.ffn_single_launch import ffn_single_launch
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.matmul import linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreter.install()


def two_launches(args, activation, out_dtype=None, config=None) -> tuple:
    """Return (y, act, pre_act) by the two kernels."""
    x, w1, b1, w2, b2 = args
    act, pre_act = linear_act(x, w1, b1, activation, True, config)
    return linear(act, w2, b2, out_dtype, config), act, pre_act


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", FFN_SHAPES)
def test_against_fp64(shape, activation, dtype, device):
    args = ffn_operands(randn, FFN_SHAPES[shape], activation, dtype, device)
    ours = ffn_single_launch(*args, activation, True)
    exact = ffn_results([t.double() for t in args], activation)
    for name, *tensors in zip(("y", "act", "pre_act"), ours, ffn_results(args, activation), exact, strict=True):
        assert_accurate(name, *tensors)
    y, act, absent = ffn_single_launch(*args, activation, False)
    assert absent is None
    assert_same((y, act), ours[:2])


@pytest.mark.parametrize("config", [None, TINY, TMA], ids=["table", "tiny", "tma"])
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_small_integers_are_exact(activation, config, device):
    """act of relu is rounded to bf16, so y is compared with the fp64 product of that."""
    if config is TMA:
        need_sm_90(device, "TMA")
    args = ffn_operands(integers, FFN_SHAPES["tiles"], activation, torch.bfloat16, device)
    y, act, pre_act = ffn_single_launch(*args, activation, True, torch.float32, config)
    _, exact, exact_pre_act = ffn_results([t.double() for t in args], activation)
    assert_exact("pre_act", pre_act, exact_pre_act)
    assert_exact("act", act, exact)
    assert_exact("y", y, F.linear(act.double(), args[3].double(), args[4].double()))


@pytest.mark.parametrize(("kernel", "arithmetic", "config"), rows_of("ffn", "gated_ffn"))
def test_every_configuration_row(kernel, arithmetic, config, device):
    """Two tiles and a bit in every direction, bit for bit as two launches with the same tiles."""
    activation = "swiglu" if kernel.startswith("gated") else "gelu"
    shape = (config.BLOCK_M + 8, 2 * config.BLOCK_K + 16, config.BLOCK_N + 16, 2 * config.BLOCK_N + 16)
    with running(config, arithmetic, device) as dtype:
        args = ffn_operands(randn, shape, activation, dtype, device)
        ours = ffn_single_launch(*args, activation, True, config=config)
        assert_same(ours, two_launches(args, activation, config=config))


@pytest.mark.slow
def test_analysed_shard(device):
    """B=8 S=128 H=1024 F=4096 P=4 in bf16, with the row of sm_90's table for it."""
    config = next(row for row in TABLES["sm_90"]["ffn", "16bit"] if row.BLOCK_N == 64)
    need_sm_90(device, "TMA")
    args = ffn_operands(randn, (1024, 1024, 1024, 1024), "gelu", torch.bfloat16, device)
    ours = ffn_single_launch(*args, "gelu", True, config=config)
    assert_same(ours, two_launches(args, "gelu", config=config))
    exact = ffn_results([t.double() for t in args], "gelu")
    for name, *tensors in zip(("y", "act", "pre_act"), ours, ffn_results(args, "gelu"), exact, strict=True):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_launches_leave_the_counters_at_zero(activation, device):
    """Many in a row, M changing: nothing of one reaches the next."""
    for M in (5, 300, 64, 300, 33, 1):
        args = ffn_operands(randn, (M, 48, 80, 64), activation, torch.bfloat16, device)
        first = ffn_single_launch(*args, activation, True, config=TINY)
        assert_same(first, two_launches(args, activation, config=TINY))
        assert_same(first, ffn_single_launch(*args, activation, True, config=TINY))
    assert not any(kept.any() for kept in _counters._of_stream.values())


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("config", [TINY, TMA, SPLIT], ids=["tiny", "tma", "split"])
def test_ticket_orders(config, group, device):
    """Row blocks in groups of any size, the last one smaller, give the same bits."""
    if config.USE_TMA:
        need_sm_90(device, "TMA")
    args = ffn_operands(randn, (200, 64, 96, 80), "gelu_tanh", torch.bfloat16, device)
    ours = ffn_single_launch(*args, "gelu_tanh", True, config=replace(config, GROUP_M=group))
    assert_same(ours, two_launches(args, "gelu_tanh", config=config))


def test_out_dtype_and_missing_biases(device):
    """y in fp32, as partial sums are, is not rounded to 16 bits; and each bias is added where it is given."""
    x, w1, b1, w2, b2 = ffn_operands(randn, FFN_SHAPES["tiles"], "gelu", torch.bfloat16, device)
    for biases in ((b1, b2), (b1, None), (None, b2), (None, None)):
        args = (x, w1, biases[0], w2, biases[1])
        ours = ffn_single_launch(*args, "gelu", True, torch.float32, TINY)
        assert ours[0].dtype == torch.float32
        assert_same(ours, two_launches(args, "gelu", torch.float32, TINY))


def test_rejected(device):
    x, w1, b1, w2, b2 = ffn_operands(randn, FFN_SHAPES["smoke"], "gelu", torch.float32, device)
    with pytest.raises(ValueError, match=r"inner dims differ: \(24, 40\) and weight \(32, 39\)"):
        ffn_single_launch(x, w1, b1, w2[:, 1:], b2, "gelu", False)
    with pytest.raises(ValueError, match="activation must be one of"):
        ffn_single_launch(x, w1, b1, w2, b2, "gleu", False)
    with pytest.raises(ValueError, match="odd number"):
        ffn_single_launch(x, w1[1:], None, w2, b2, "swiglu", False)
    with pytest.raises(ValueError, match=r"b2: expected contiguous \(32,\)"):
        ffn_single_launch(x, w1, b1, w2, b2[1:], "gelu", False)
    with pytest.raises(ValueError, match="0 tokens"):
        ffn_single_launch(x[:0], w1, b1, w2, b2, "gelu", False)
    with pytest.raises(ValueError, match="no split epilogue"):
        ffn_single_launch(x, w1, b1, w2[:, :20], b2, "swiglu", False, config=SPLIT)


@pytest.mark.cpu_only
def test_a_launch_that_failed_leaves_no_counters(monkeypatch):
    """Its counters are where it left them; the next launch gets others."""
    args = ffn_operands(randn, FFN_SHAPES["smoke"], "relu", torch.float32, "cpu")
    expected_y, _, _ = ffn_single_launch(*args, "relu", False, config=TINY)
    (used,) = _counters._of_stream.values()

    def fail(self, *tensors):
        tensors[-1].fill_(7)
        raise KeyboardInterrupt

    monkeypatch.setattr("tpffn_triton.kernels._launch.Launch.__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        ffn_single_launch(*args, "relu", False, config=TINY)
    monkeypatch.undo()
    y, _, _ = ffn_single_launch(*args, "relu", False, config=TINY)
    assert torch.equal(y, expected_y)
    assert _counters._of_stream[used.device, 0] is not used


@pytest.mark.gpu
def test_streams_and_graphs_have_counters_of_their_own():
    args = ffn_operands(randn, (300, 64, 96, 80), "gelu", torch.bfloat16, "cuda")
    expected_y, _, _ = ffn_single_launch(*args, "gelu", False)
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, outputs = [], []
    torch.cuda.synchronize()
    for stream in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs += [ffn_single_launch(*args, "gelu", False)[0] for _ in range(3)]
        graphs.append(graph)
    for _ in range(200):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(ffn_single_launch(*args, "gelu", False)[0])
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected_y) for y in outputs)
    # All that was ever cut from the reserve is in front of what is left.
    assert not any(left._base.any() for left in _counters._reserves.values())


@pytest.mark.gpu
def test_ten_thousand_replays():
    """Of launches at several M, captured in one graph."""
    problems = [ffn_operands(randn, (M, 256, 512, 256), "gelu", torch.bfloat16, "cuda") for M in (64, 1000, 257)]
    expected_ys = [ffn_single_launch(*args, "gelu", False)[0] for args in problems]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ys = [ffn_single_launch(*args, "gelu", False)[0] for args in problems]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for y in ys:
            y.zero_()
        graph.replay()
        for y, expected_y in zip(ys, expected_ys, strict=True):
            different += (y != expected_y).sum()
    assert different.item() == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_torch_compile_with_cuda_graphs():
    """Their warm-up allocates from a pool that is reused afterwards: counters must not lie in it."""
    layer = tp.TensorParallelFFN(256, 512, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for M in (64, 300, 64):
            x = torch.randn(M, 256, device="cuda", dtype=torch.bfloat16)
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(x), layer(x))
