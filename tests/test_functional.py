"""ffn() on one rank: values, every gradient, and how it behaves as an autograd citizen."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from acceptance import assert_accurate, assert_exact
from ffn_cases import NAMES, assert_all_accurate, draw, eager, exact, ours, results, small_integers
from launches import RecordOperators, count_launches

import tpffn_triton as tp
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.reference import ffn_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, dtype, save, implementation, device):
    problem = draw((3, 40), 64, 96, activation=activation, dtype=dtype, device=device)
    assert_all_accurate(ours(problem, save=save), eager(problem), exact(problem))


@pytest.mark.usefixtures("implementation")
def test_no_bias(device):
    problem = draw((2, 9), 48, 80, dtype=torch.bfloat16, device=device, bias=False)
    assert_all_accurate(ours(problem), eager(problem), exact(problem))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["relu", "relu2", "geglu"])
def test_small_integers_are_exact(activation, device):
    """Every tensor is the exact result, rounded once: nothing is dropped, doubled or rounded in between."""
    problem = small_integers(draw((5, 7), 24, 40, activation=activation, device=device))
    for name, mine, right in zip(NAMES, ours(problem), exact(problem), strict=True):
        assert_exact(name, mine, right)


SIZES = st.one_of(st.integers(0, 70), st.sampled_from([1, 2, 31, 64, 97, 128, 131, 160]))


@hypothesis.given(
    tokens=SIZES,
    H=SIZES,
    F=SIZES,
    # relu2 and geglu multiply past what 16 bits hold exactly; with relu only the store rounds.
    activation_and_dtype=st.sampled_from(
        [("relu2", torch.float32), ("geglu", torch.float32), *(("relu", dtype) for dtype in DTYPES)]
    ),
    bias=st.booleans(),
    save=st.sampled_from(["pre_act", "nothing"]),
)
# On a GPU each new divisibility of H and F compiles its own variants.
@hypothesis.settings(max_examples=8 if torch.cuda.is_available() else 40, deadline=None)
def test_any_shape_is_exact_on_small_integers(tokens, H, F, activation_and_dtype, bias, save):
    """From nothing to several tiles, primes included, H and F/P by themselves."""
    activation, dtype = activation_and_dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bias = bias or activation == "geglu"
    problem = draw((tokens,), H, F, activation=activation, dtype=dtype, device=device, bias=bias)
    for name, mine, right in zip(NAMES, ours(small_integers(problem), save=save), exact(problem), strict=True):
        if right is not None:
            assert_exact(name, mine, right)


@hypothesis.given(row_gap=st.integers(0, 9), offset=st.integers(0, 9), step=st.integers(1, 3), transposed=st.booleans())
@hypothesis.settings(max_examples=8 if torch.cuda.is_available() else 40, deadline=None)
def test_any_strides_are_exact_on_small_integers(row_gap, offset, step, transposed):
    """x, dy and both weights as slices of wider, shifted, strided or transposed tensors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = small_integers(draw((33,), 40, 24, activation="relu", dtype=torch.bfloat16, device=device))

    def strided(t):
        rows, cols = t.shape[::-1] if transposed else t.shape
        wide = torch.full((rows, offset + step * cols + row_gap), float("nan"), dtype=t.dtype, device=device)
        view = wide[:, offset : offset + step * cols : step]
        return (view.t() if transposed else view).copy_(t)

    right = exact(problem)
    leaves = [strided(t) for t in (problem.x, problem.w1, problem.w2)]
    leaves = [t.requires_grad_() for t in (*leaves, problem.b1.clone(), problem.b2.clone())]
    y = tp.ffn(*leaves, activation="relu")
    for name, mine, expected in zip(
        NAMES, (y, *torch.autograd.grad(y, leaves, strided(problem.dy))), right, strict=True
    ):
        assert_exact(name, mine, expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 8:56],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.permute(0, 2, 1),
        lambda x: x[0, 0],
        lambda x: x[0],
    ],
    ids=["transposed", "strided", "column-slice", "expanded", "last-dim-strided", "vector", "matrix"],
)
def test_layouts_of_x_and_dy(make, device):
    """Any strides and any number of leading dims: same values as a contiguous copy, dx in x's shape."""
    x = make(torch.randn(4, 64, 64, device=device))
    dy = make(torch.randn(4, 64, 64, device=device))
    problem = draw((1,), x.shape[-1], 32, device=device)
    leaves = problem.leaves()[1:]

    def run(x, dy):
        return results(lambda *t: tp.ffn(*t), (x, *leaves), dy)

    for strided, contiguous in zip(run(x, dy), run(x.contiguous(), dy.contiguous()), strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.usefixtures("implementation")
def test_layouts_of_parameters(device):
    """Transposed weights and expanded biases give what contiguous copies give."""
    x, dy = torch.randn(5, 32, device=device), torch.randn(5, 32, device=device)
    w1, w2 = torch.randn(32, 48, device=device).t(), torch.randn(48, 32, device=device).t()
    b1, b2 = torch.randn(1, device=device).expand(48), torch.randn(64, device=device)[::2]

    def run(*leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = tp.ffn(*leaves)
        with torch.no_grad():
            assert torch.equal(tp.ffn(*leaves), y)
        return y, *torch.autograd.grad(y, leaves, dy)

    strided = run(x, w1, w2, b1, b2)
    for a, b in zip(strided, run(x, *(t.contiguous() for t in (w1, w2, b1, b2))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("implementation")
def test_gradient_of_a_sum_has_zero_strides(device):
    problem = draw((6,), 32, 48, device=device)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    from_sum = torch.autograd.grad(tp.ffn(*leaves).sum(), leaves)
    from_ones = torch.autograd.grad(tp.ffn(*leaves), leaves, torch.ones(6, 32, device=device))
    assert all(torch.equal(a, b) for a, b in zip(from_sum, from_ones, strict=True))


@pytest.mark.usefixtures("implementation")
def test_one_layer_used_twice(device):
    """Gradients of both uses add up, as with the reference."""
    problem = draw((6,), 32, 48, device=device)

    def twice(function):
        return lambda x, *weights: function(function(x, *weights), *weights)

    mine = results(twice(tp.ffn), problem.leaves(), problem.dy)
    right = results(twice(ffn_reference), problem.leaves(), problem.dy)
    for name, a, b in zip(NAMES, mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# What each set of wanted gradients may launch in backward, and how many [tokens, ·] or weight tensors it may save.
FROZEN = [
    ("x", {"linear_dact": 1, "dgrad": 1}, 3),
    ("w1", {"linear_dact": 1, "wgrad": 1}, 3),
    ("w2", {"wgrad": 1}, 1),
    ("b1", {"linear_dact": 1, "column_sum": 1}, 2),
    ("b2", {"column_sum": 1}, 0),
    ("w1 w2", {"linear_dact": 1, "weight_grads": 1}, 3),
    ("x w1 w2 b1 b2", {"linear_dact": 1, "dgrad": 1, "weight_grads": 1}, 4),
]


@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize(("wanted", "expected", "saved_count"), FROZEN, ids=[f[0] for f in FROZEN])
def test_frozen_tensors_cost_nothing(wanted, expected, saved_count, save, implementation, device):
    """Only what a wanted gradient needs is computed and saved, and it is the full run's gradient."""
    problem = draw((6,), 32, 48, device=device)
    full = dict(zip(NAMES, ours(problem, save=save), strict=True))
    leaves = dict(zip(("x", "w1", "w2", "b1", "b2"), (t.detach().clone() for t in problem.leaves()), strict=True))
    for name in wanted.split():
        leaves[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = tp.ffn(**leaves, save=save)
    calls = []
    with RecordOperators(calls):
        y.backward(problem.dy)
    if save == "nothing" and wanted != "b2":
        expected = expected | {"linear_act": 1}
        assert not any(t.shape == (6, 48) for t in saved), "an activation was saved"
    else:
        assert len(saved) == saved_count
    assert {op: calls.count(op) for op in calls} == expected
    for name, t in leaves.items():
        assert (t.grad is not None) == (name in wanted.split())
        if t.grad is not None:
            assert torch.equal(t.grad, full[f"d{name}"])


@pytest.mark.usefixtures("implementation")
def test_no_grad_saves_nothing(device):
    problem = draw((6,), 32, 48, device=device)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = tp.ffn(*leaves)
    assert not saved
    assert not y.requires_grad
    assert_accurate("y", y, eager(problem)[0], exact(problem)[0])


def test_kernel_launches(device):
    """One launch forward, of as few tiles as here; one backward for all weight and bias gradients."""
    problem = draw((130,), 64, 96, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    with count_launches() as forward:
        y = tp.ffn(*leaves)
    assert forward == {"ffn_kernel": 1}
    with count_launches() as backward:
        y.backward(problem.dy)
    assert backward == {"linear_dact_kernel": 1, "matmul_kernel": 1, "weight_grads_kernel": 1}
