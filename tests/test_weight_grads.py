"""All weight and bias gradients in one launch: against eager and fp64, against a launch each, and which is chosen."""

from functools import partial

import pytest
import torch
from acceptance import assert_accurate, assert_exact
from ffn_cases import draw
from kernel_cases import DTYPES, TINY, TMA, compare_exact, integers, randn, rows_of, running
from launches import count_launches

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs
from tpffn_triton.kernels._launch import Operand, fresh
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.matmul import wgrad
from tpffn_triton.kernels.weight_grads import form_of, weight_grads, weight_grads_accumulate

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreter.install()

# M, W, H, F: inside one tile of the smallest row, over several, gated, and at odd strides.
SHAPES = {
    "smoke": (24, 40, 32, 40),
    "tiles": (130, 152, 200, 136),
    "gated": (96, 208, 80, 104),
    "odd": (67, 71, 45, 39),
}
ONE_LAUNCH = {"weight_grads_kernel": 1}
NAMES = ("dw1", "dw2", "db1", "db2")


def operands(draw_values, shape, dtype, device) -> tuple:
    """Return (d_pre, x, dy, act, db_partial, db2_src); db2_src is of fewer tokens, as with sequence parallelism."""
    M, W, H, F = shape
    of = partial(draw_values, dtype=dtype, device=device)
    matrices = of(M, W), of(M, H, seed=1), of(M, H, seed=2), of(M, F, seed=3)
    partials = draw_values(-(-M // 32), W, dtype=torch.float32, device=device, seed=4)
    return *matrices, partials, of(max(M // 2, 1), H, seed=5)


def eager(d_pre, x, dy, act, db_partial, db2_src) -> tuple:
    """Return (dw1, dw2, db1, db2) by separate torch operations."""
    return d_pre.t() @ x, dy.t() @ act, db_partial.sum(0), db2_src.sum(0)


def check(draw_values, compare, shape, dtype, device, config=None) -> None:
    """Compare results of the operands' dtype and of fp32, added to and not."""
    given = operands(draw_values, shape, dtype, device)
    exact = eager(*(t.double() for t in given))
    with count_launches() as launches:
        ours = weight_grads(*given, dtype, dtype, dtype, dtype, config)
    assert launches == ONE_LAUNCH
    for name, *tensors in zip(NAMES, ours, (t.to(dtype) for t in eager(*given)), exact, strict=True):
        compare(name, *tensors)
    fp32 = torch.float32
    in_fp32 = weight_grads(*given, fp32, fp32, fp32, fp32, config)
    for name, *tensors in zip(NAMES, in_fp32, eager(*(t.float() for t in given)), exact, strict=True):
        compare(f"{name} in fp32", *tensors)
    dw1, dw2 = (t.clone() for t in in_fp32[:2])
    sums = weight_grads_accumulate(dw1, dw2, *given, fp32, fp32, config)
    for mine, once in zip((dw1, dw2, *sums), (2 * in_fp32[0], 2 * in_fp32[1], *in_fp32[2:]), strict=True):
        assert torch.equal(mine, once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, dtype, device):
    check(randn, assert_accurate, SHAPES[shape], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [None, TINY], ids=["table", "tiny"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_integers_are_exact(shape, config, dtype, device):
    """A tile of one gradient computed from the other's operands, a lost row or a second rounding shows in the bits."""
    check(integers, compare_exact, SHAPES[shape], dtype, device, config)


@pytest.mark.parametrize("absent", [("db_partial",), ("db2_src",), ("db_partial", "db2_src")], ids=" ".join)
@pytest.mark.parametrize("shape", ["smoke", "gated"])
def test_without_biases(shape, absent, device):
    """What is not wanted is None, and the rest as it was."""
    names = ("d_pre", "x", "dy", "act", "db_partial", "db2_src")
    given = dict(zip(names, operands(randn, SHAPES[shape], torch.bfloat16, device), strict=True))
    expected = weight_grads(**given)
    with count_launches() as launches:
        ours = weight_grads(**given | dict.fromkeys(absent))
    assert launches == ONE_LAUNCH
    for source, mine, right in zip((None, None, "db_partial", "db2_src"), ours, expected, strict=True):
        assert mine is None if source in absent else torch.equal(mine, right)


@pytest.mark.parametrize(("kernel", "arithmetic", "config"), rows_of("weight_grads"))
def test_every_configuration_row(kernel, arithmetic, config, device):
    """Two tiles and a bit of each gradient in every direction, for each row of sm_80 and sm_90."""
    shape = 2 * config.BLOCK_K + 16, config.BLOCK_M + 8, config.BLOCK_N + 16, config.BLOCK_N + 32
    with running(config, arithmetic, device) as dtype:
        check(integers, compare_exact, shape, dtype, device, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 31, 255, 257, 3000])
def test_sums_of_many_rows(tokens, dtype, device):
    """As accurate as torch.sum, and exact on integers, whatever is left over of a step."""
    matrices = [randn(4, 8, dtype=dtype, device=device)] * 4
    for draw_values, compare in ((randn, assert_accurate), (integers, compare_exact)):
        partials = draw_values(tokens, 8, dtype=torch.float32, device=device)
        src = draw_values(tokens, 8, dtype=dtype, device=device, seed=1)
        *_, db1, db2 = weight_grads(*matrices, partials, src)
        compare("db1", db1, partials.sum(0), partials.double().sum(0))
        compare("db2", db2, src.sum(0), src.double().sum(0))


def test_launches_repeat_bit_for_bit(device):
    given = operands(randn, (300, 96, 64, 96), torch.bfloat16, device)
    first = weight_grads(*given)
    for again in (weight_grads(*given) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("in_several_launches")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_launch_each_is_as_accurate(shape, dtype, device):
    """The other form of the operators, and the same tiles in one launch bit for bit."""
    given = operands(randn, SHAPES[shape], dtype, device)
    exact = eager(*(t.double() for t in given))
    with count_launches() as launches:
        several = weight_grads(*given)
    assert launches == {"wgrad_kernel": 2, "column_sum_kernel": 2}
    for name, *tensors in zip(NAMES, several, eager(*given), exact, strict=True):
        assert_accurate(name, *tensors)
    d_pre, x, dy, act, db_partial, db2_src = given
    one = weight_grads(*given, config=TINY)
    launched = wgrad(d_pre, x, config=TINY), wgrad(dy, act, config=TINY), column_sum(db_partial), column_sum(db2_src)
    for name, a, b in zip(NAMES, one, launched, strict=True):
        assert torch.equal(a, b), name
    sums = [torch.ones_like(t, dtype=torch.float32) for t in several[:2]]
    with count_launches() as launches:
        biases = weight_grads_accumulate(*sums, *given)
    assert launches == {"wgrad_kernel": 2, "column_sum_kernel": 2}
    for name, *tensors in zip(NAMES[:2], sums, (1 + t.float() for t in eager(*given)[:2]), exact[:2], strict=True):
        assert_accurate(name, *tensors[:2], 1 + tensors[2])
    assert all(torch.equal(a, b) for a, b in zip(biases, several[2:], strict=True))


def test_which_form_and_why():
    """By sizes, dtypes and architecture alone; nothing is launched."""

    def form(M, W, H, F, arch, w2_dtype=torch.bfloat16, config=None):
        like = Operand((M, W), (W, 1), torch.bfloat16, torch.device("cpu"), 0)
        matrices = (fresh(M, size, like) for size in (W, H, H, F))
        return form_of(*matrices, fresh(W, H, like), fresh(H, F, like, w2_dtype), config=config, arch=arch)

    small = form(1024, 1024, 1024, 1024, "sm_90")
    # 64 tiles each, of both together as many as three quarters of the processors need.
    assert (small.config.BLOCK_M, small.config.BLOCK_N, small.config.USE_TMA) == (128, 128, True)
    assert small.why == "64 tiles of the larger gradient on 132 processors, at most 4 on each"
    assert form(1024, 1024, 1024, 1024, "sm_80").config == _configs.TABLES["sm_80"]["weight_grads", "16bit"][0]
    assert form(1024, 1000, 1024, 1000, "sm_80").config == _configs.odd_strides("weight_grads", "16bit")
    large = form(1024, 8192, 8192, 8192, "sm_90")
    assert large == (None, "2048 tiles of the larger gradient on 132 processors, more than 4 on each")
    assert form(1024, 8192, 8192, 64, "sm_90").why.startswith("2048 tiles")
    asked = form(1024, 8192, 8192, 8192, "sm_90", config=TINY)
    assert asked == (TINY, "asked for; 65536 tiles of the larger gradient on 132 processors")
    assert form(1024, 1024, 1024, 1024, "gfx942").config is None
    assert form(0, 16, 16, 16, "sm_90") == (None, "nothing to multiply: M=0, W=16, H=16, F=16")
    two = form(64, 16, 16, 16, "sm_90", w2_dtype=torch.float32)
    assert two == (None, "dw1 is torch.bfloat16, dw2 torch.float32")


def test_gradients_of_two_dtypes(device):
    given = operands(integers, SHAPES["tiles"], torch.bfloat16, device)
    dw1, dw2, *_ = weight_grads(*given, torch.float32, torch.bfloat16)
    exact = eager(*(t.double() for t in given))
    assert (dw1.dtype, dw2.dtype) == (torch.float32, torch.bfloat16)
    assert_exact("dw1", dw1, exact[0])
    assert_exact("dw2", dw2, exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_apart_misaligned_or_the_same(dtype, device):
    """Column slices of wider tensors, bases that are not 16-byte aligned, rows that overlap."""
    wide = integers(40, 96, dtype=dtype, device=device)
    apart, odd_base, same_row = wide[:, 16:80], wide[:, 1:65], wide[:1, :64].expand(40, 64)
    for odd in ({}, {1: odd_base, 3: same_row}, {0: same_row, 2: odd_base}, {3: odd_base}):
        d_pre, x, dy, act = (odd.get(i, apart) for i in range(4))
        with count_launches() as launches:
            ours = weight_grads(d_pre, x, dy, act, d_pre.float()[:2], dy)
        assert launches == ONE_LAUNCH
        exact = eager(*(t.double() for t in (d_pre, x, dy, act, d_pre[:2], dy)))
        for name, mine, right in zip(NAMES, ours, exact, strict=True):
            assert_exact(name, mine, right)


@pytest.mark.parametrize(
    ("M", "W", "H", "F"), [(0, 8, 12, 8), (5, 0, 12, 0), (5, 8, 0, 8), (5, 8, 12, 0), (0, 0, 0, 0)]
)
def test_empty_dims(M, W, H, F, device):
    """No tokens or no features: gradients are zero or empty, and main_grads keep what they hold."""
    given = operands(integers, (M, W, H, F), torch.float32, device)
    grads = torch.ones(W, H, device=device), torch.ones(H, F, device=device)
    sums = weight_grads_accumulate(*grads, *given)
    for mine, right in zip((*grads, *sums), (1 + a if i < 2 else a for i, a in enumerate(eager(*given))), strict=True):
        assert torch.equal(mine, right)
    for mine, right in zip(weight_grads(*given), eager(*given), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_backward_is_three_launches(activation, device):
    """An eighth of the analysed shard's sizes, with biases; as many where the weights have a main_grad."""
    problem = draw((128,), 128, 128, activation=activation, dtype=torch.bfloat16, device=device)
    dact = "linear_dact_kernel" if activation == "gelu" else "gated_linear_dact_kernel"

    def weights_after_backward(fuse):
        leaves = [t.detach().requires_grad_() for t in problem.leaves()]
        for weight in leaves[1:3]:
            weight.main_grad = torch.ones(weight.shape, device=device)
        y = tp.ffn(*leaves, activation=activation, gradient_accumulation_fusion=fuse)
        with count_launches() as launches:
            y.backward(problem.dy)
        assert launches == {dact: 1, "matmul_kernel": 1, "weight_grads_kernel": 1}
        return leaves[1:3]

    for returned, added in zip(weights_after_backward(False), weights_after_backward(True), strict=True):
        assert added.grad is None
        torch.testing.assert_close(added.main_grad - 1, returned.grad.float(), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (5, 6)}, r"d_pre \(4, 8\), x \(5, 6\), dy \(4, 6\), act \(4, 8\) differ in tokens"),
        ({"x": (4, 7)}, r"x and dy differ in features .* x \(4, 7\), dy \(4, 6\)"),
        ({"act": (8,)}, r"act: expected a 2-D tensor .* got \(8,\)"),
        ({"db_partial": (1, 7)}, r"db_partial: expected 8 columns on .*, got \(1, 7\)"),
        ({"db2_src": (4, 8)}, r"db2_src: expected 6 columns on .*, got \(4, 8\)"),
        ({"w2_dtype": torch.float64}, "dw2: dtype torch.float64 is not"),
        ({"b1_dtype": torch.int32}, "sum of db_partial: dtype torch.int32 is not"),
        ({"config": TMA}, r"weight_grads: TMA cannot address every one of .*\(4, 6\)"),
    ],
)
def test_operands_that_do_not_fit_are_rejected(change, message, device):
    arguments = {"d_pre": (4, 8), "x": (4, 6), "dy": (4, 6), "act": (4, 8), "db_partial": (1, 8), "db2_src": (4, 6)}
    arguments = {
        k: torch.ones(v, device=device) if isinstance(v, tuple) else v for k, v in (arguments | change).items()
    }
    with pytest.raises(ValueError, match=message):
        weight_grads(**arguments)


def test_main_grads_that_do_not_fit_are_rejected(device):
    given = operands(integers, SHAPES["smoke"], torch.bfloat16, device)
    dw1, dw2 = torch.ones(40, 32, device=device), torch.ones(32, 40, device=device)
    with pytest.raises(ValueError, match=r"dw2: expected contiguous \(32, 40\) torch.float32 .* torch.bfloat16"):
        weight_grads_accumulate(dw1, dw2.bfloat16(), *given)
    with pytest.raises(ValueError, match=r"dw1: expected contiguous \(40, 32\).* with strides \(1, 40\)"):
        weight_grads_accumulate(dw2.t(), dw2, *given)
