"""Which precision is used where: TF32, cheap Φ in 16 bits, one rounding per tensor, autocast, fp32 main_grad."""

import pytest
import torch
import triton
import triton.language as tl
from acceptance import assert_accurate
from ffn_cases import draw, exact, results

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs
from tpffn_triton.kernels.activations import ACTIVATIONS, activate_with_derivative
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, wgrad
from tpffn_triton.kernels.weight_grads import weight_grads
from tpffn_triton.reference import ACTIVATIONS as REFERENCE
from tpffn_triton.reference import ffn_reference

interpreter.install()
SIXTEEN_BIT = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_fp32_precision_follows_torch(setting):
    """By set_float32_matmul_precision and by the newer fp32_precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    expected = "ieee" if setting == "highest" else "tf32"
    try:
        torch.set_float32_matmul_precision(setting)
        assert _configs.arithmetic_of(torch.float32) == expected
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = expected
        assert _configs.arithmetic_of(torch.float32) == expected
        assert _configs.arithmetic_of(torch.bfloat16) == "16bit"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.matmul.fp32_precision = before[1]


@pytest.mark.parametrize("kernel", ["linear_act", "gated", "linear_dact", "linear", "dgrad", "wgrad", "weight_grads"])
def test_fp32_precision_reaches_every_kernel(kernel, device):
    """On the same operands TF32 gives other bits, and IEEE its own again: prepared launches are not mixed up."""
    x, w1, w2 = (torch.randn(s, generator=torch.manual_seed(0)).to(device) for s in ((32, 64), (48, 64), (64, 48)))
    call = {
        "linear_act": lambda: linear_act(x, w1, None, "relu", False)[0],
        "gated": lambda: linear_act(x, w1, None, "swiglu", False)[0],
        "linear_dact": lambda: linear_dact(x, w2, x[:, :48].contiguous(), "relu2", False, False)[0],
        "linear": lambda: linear(x, w1, None),
        "dgrad": lambda: dgrad(x, w2),
        "wgrad": lambda: wgrad(x, x),
        "weight_grads": lambda: weight_grads(x, x, x, x, None, None)[0],
    }[kernel]
    before = torch.get_float32_matmul_precision()
    results = []
    try:
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            results.append(call())
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(results[0], results[2])
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert 1e-5 < error < 2e-3


@triton.jit
def _evaluate(z_ptr, act_ptr, derivative_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < N, other=0.0)
    act, derivative = activate_with_derivative(z, ACTIVATION)
    tl.store(act_ptr + offs, act, mask=offs < N)
    tl.store(derivative_ptr + offs, derivative, mask=offs < N)


def test_cheap_gelu_is_as_close_as_its_formula_says(device):
    """Φ within the formula's 0.75e-7 and a few roundings of fp32, of which erf's way has as many."""
    z = torch.linspace(-12, 12, 100_001, device=device)
    exact_z = z.double().requires_grad_()
    exact_act = torch.nn.functional.gelu(exact_z)
    (exact_derivative,) = torch.autograd.grad(exact_act.sum(), exact_z)
    errors = {}
    for activation in ("gelu", "gelu_16bit"):
        act, derivative = torch.empty_like(z), torch.empty_like(z)
        _evaluate[(triton.cdiv(z.numel(), 4096),)](z, act, derivative, z.numel(), activation, 4096)
        phi_error = ((act.double() - exact_act) / z.abs().clamp(min=1)).abs().max().item()
        errors[activation] = phi_error, (derivative.double() - exact_derivative).abs().max().item()
    assert errors["gelu_16bit"][0] < 2e-7
    assert errors["gelu_16bit"][1] < 3e-7
    assert errors["gelu_16bit"][0] < 2 * errors["gelu"][0]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_stored_tensor_is_rounded_once(activation, dtype, device):
    """act, pre_act and d_pre are the exact result rounded to nearest, but for near-ties: an activation of the rounded
    pre-activation, or a rounding toward zero, would differ in a third of the elements."""
    M, N, K = 64, 96, 64
    problem = draw((M,), K, N, activation=activation, dtype=dtype, device=device)
    act, pre_act = linear_act(problem.x, problem.w1, problem.b1, activation, True)
    z = torch.nn.functional.linear(problem.x.double(), problem.w1.double(), problem.b1.double())
    stored = pre_act.double().requires_grad_()
    from_stored = REFERENCE[activation](stored)
    (d_pre,) = torch.autograd.grad(from_stored, stored, problem.dy.double() @ problem.w2.double())
    ours_d_pre, again, _ = linear_dact(problem.dy, problem.w2, pre_act, activation, True, False)
    for name, ours, exactly in (
        ("pre_act", pre_act, z),
        ("act", act, REFERENCE[activation](z)),
        ("act again", again, from_stored),
        ("d_pre", ours_d_pre, d_pre),
    ):
        differ = (ours != exactly.to(dtype)).double().mean().item()
        assert differ < 0.03, f"{name}: {differ:.1%} of the elements are not the rounded result"


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients(activation, device):
    """y as F.linear's under autocast; weight gradients come from the fp32 accumulators, not through bf16."""
    problem = draw((70,), 64, 96, activation=activation, device=device)

    def under_autocast(function):
        def run(*leaves):
            with torch.autocast(device, dtype=torch.bfloat16):
                return function(*leaves, activation=activation)

        return results(run, problem.leaves(), problem.dy.bfloat16())

    mine, eager = under_autocast(tp.ffn), under_autocast(ffn_reference)
    assert mine[0].dtype == eager[0].dtype == torch.bfloat16
    for name, ours, theirs, right in zip(
        ("y", "dx", "dw1", "dw2", "db1", "db2"), mine, eager, exact(problem), strict=True
    ):
        assert_accurate(name, ours, theirs, right)
        assert name == "y" or ours.dtype == torch.float32
        rounded = ours.float().bfloat16().float()
        assert name in ("y", "dx") or not torch.equal(ours.float(), rounded), f"{name} went through bf16"


@pytest.mark.usefixtures("implementation")
def test_backward_inside_autocast_changes_nothing(device):
    """Nor does autocast reach into an operator: the fp32 weight gradients would go through bf16."""
    problem = draw((70,), 64, 96, device=device)
    found = []
    for inside in (False, True):
        leaves = [t.clone().requires_grad_() for t in problem.leaves()]
        with torch.autocast(device, dtype=torch.bfloat16):
            y = tp.ffn(*leaves)
            gradients = torch.autograd.grad(y, leaves, problem.dy.bfloat16()) if inside else None
        found.append(gradients or torch.autograd.grad(y, leaves, problem.dy.bfloat16()))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("implementation")
def test_autocast_leaves_other_dtypes_as_torch_does(device, monkeypatch):
    """fp16 tensors are cast like fp32 ones; fp64 stays; integers, and fp64 beside others, are refused."""
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tp.ffn(*draw((3,), 8, 16, dtype=torch.float16, device=device).leaves()).dtype == torch.bfloat16
        mixed = [
            t.to(d)
            for t, d in zip(
                draw((3,), 8, 16, device=device).leaves(), [*SIXTEEN_BIT, *[torch.float32] * 3], strict=True
            )
        ]
        assert tp.ffn(*mixed).dtype == torch.bfloat16
        if tp.backend(device) == "native":
            assert tp.ffn(*draw((3,), 8, 16, dtype=torch.float64).leaves()).dtype == torch.float64
        with pytest.raises(TypeError, match=r"torch.int64 is not one of"):
            tp.ffn(*(t.long() for t in mixed))
        with pytest.raises(TypeError, match=r"w1 torch.int64"):
            tp.ffn(mixed[0], mixed[1].long(), *mixed[2:])
        with pytest.raises(TypeError, match=r"w1 torch.float64"):
            tp.ffn(mixed[0], mixed[1].double(), *mixed[2:])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_accumulates_in_fp32(activation, dtype, device):
    """Over micro-batches: the sum of the fp32 weight gradients, which bf16 gradients added in bf16 are far from."""
    layer = tp.TensorParallelFFN(
        64, 96, activation=activation, gradient_accumulation_fusion=True, device=device, dtype=dtype
    )
    plain = tp.TensorParallelFFN(64, 96, activation=activation, device=device, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    weights = layer.linear_fc1.weight, layer.linear_fc2.weight
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape, device=device)
    weights[1].grad_added_to_main_grad = False
    total = [torch.zeros(w.shape, dtype=torch.float64, device=device) for w in weights]
    for step in range(4):
        problem = draw((5, 7), 64, 96, dtype=dtype, device=device, seed=step)
        layer(problem.x).backward(problem.dy)
        plain(problem.x).backward(problem.dy)
        leaves = [p.detach().double() for p in plain.parameters()]
        for which, right in enumerate(
            results(
                lambda x, w1, b1, w2, b2: ffn_reference(x, w1, w2, b1, b2, activation=activation),
                (problem.x.double(), *leaves),
                problem.dy.double(),
            )[2:5:2]
        ):
            total[which] += right
    for weight, right, other in zip(weights, total, (plain.linear_fc1.weight, plain.linear_fc2.weight), strict=True):
        error, separately = (weight.main_grad - right).norm(), (other.grad.double() - right).norm()
        assert error <= separately
        assert error <= 4e-3 * right.norm() if dtype == torch.bfloat16 else error <= 1e-6 * right.norm()
    # The attribute asks for a gradient that hooks can see; without it there is none. Biases are as ever.
    assert weights[0].grad is None
    assert weights[1].grad_added_to_main_grad
    assert not weights[1].grad.any()
    for mine, theirs in (
        (layer.linear_fc1.bias, plain.linear_fc1.bias),
        (layer.linear_fc2.bias, plain.linear_fc2.bias),
    ):
        assert torch.equal(mine.grad, theirs.grad)


def test_main_grad_of_a_frozen_weight_is_left_alone(device):
    layer = tp.TensorParallelFFN(8, 16, gradient_accumulation_fusion=True, device=device)
    layer.linear_fc2.weight.requires_grad_(False)
    layer.linear_fc1.weight.main_grad = torch.zeros(16, 8, device=device)
    layer(torch.randn(3, 8, device=device)).sum().backward()
    assert layer.linear_fc1.weight.main_grad.any()


@pytest.mark.parametrize(
    "main_grad",
    [None, torch.zeros(8, 16), torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(8, 16).t()],
    ids=["missing", "shape", "dtype", "strides"],
)
def test_main_grad_that_does_not_fit_is_refused(main_grad, device):
    layer = tp.TensorParallelFFN(8, 16, gradient_accumulation_fusion=True, device=device)
    if main_grad is not None:
        layer.linear_fc1.weight.main_grad = main_grad.to(device)
    with pytest.raises(ValueError, match=r"needs w1.main_grad, contiguous \[16, 8\] torch.float32"):
        layer(torch.randn(3, 8, device=device))


def test_main_grad_under_compile_is_refused(device):
    layer = tp.TensorParallelFFN(8, 16, gradient_accumulation_fusion=True, device=device)
    with pytest.raises(Exception, match=r"not under torch.compile"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(3, 8, device=device))
