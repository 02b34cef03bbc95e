"""ffn() on one rank: values, every gradient, and how it behaves as an autograd citizen."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from acceptance import assert_accurate, assert_exact
from ffn_cases import NAMES, assert_all_accurate, draw, eager, exact, ours, results
from launches import count_launches
from torch.utils.checkpoint import checkpoint

import tpffn_triton as tp
from tpffn_triton import ops
from tpffn_triton.kernels.activations import PLAIN_ACTIVATIONS
from tpffn_triton.reference import ffn_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def small_integers(problem):
    """Replace the values of a problem by their signs."""
    for name in ("x", "dy", "w1", "w2", "b1", "b2"):
        setattr(problem, name, getattr(problem, name).sign())
    return problem


@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
def test_values_and_gradients(activation, dtype, save, implementation, device):
    problem = draw((3, 40), 64, 96, activation=activation, dtype=dtype, device=device)
    assert_all_accurate(ours(problem, save=save), eager(problem), exact(problem))


@pytest.mark.usefixtures("implementation")
def test_no_bias(device):
    problem = draw((2, 9), 48, 80, dtype=torch.bfloat16, device=device, bias=False)
    assert_all_accurate(ours(problem), eager(problem), exact(problem))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_small_integers_are_exact(activation, device):
    """Every tensor is the exact result, rounded once: nothing is dropped, doubled or rounded in between."""
    problem = small_integers(draw((5, 7), 24, 40, activation=activation, device=device))
    for name, mine, right in zip(NAMES, ours(problem), exact(problem), strict=True):
        assert_exact(name, mine, right)


@hypothesis.given(
    tokens=st.integers(0, 70),
    H=st.integers(1, 70),
    F=st.integers(1, 70),
    activation_and_dtype=st.sampled_from([("relu2", torch.float32), *(("relu", dtype) for dtype in DTYPES)]),
)
# On a GPU each new divisibility of H and F compiles its own variants.
@hypothesis.settings(max_examples=8 if torch.cuda.is_available() else 30, deadline=None)
def test_any_shape_is_exact_on_small_integers(tokens, H, F, activation_and_dtype):
    """relu2 squares past what 16 bits hold exactly; everywhere else only the store rounds."""
    activation, dtype = activation_and_dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = small_integers(draw((tokens,), H, F, activation=activation, dtype=dtype, device=device))
    for name, mine, right in zip(NAMES, ours(problem), exact(problem), strict=True):
        assert_exact(name, mine, right)


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
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_and_retain_graph(reentrant, device):
    problem = draw((6,), 32, 48, device=device)
    plain = ours(problem)
    leaves = [t.detach().requires_grad_() for t in problem.leaves()]
    y = checkpoint(tp.ffn, *leaves, use_reentrant=reentrant)
    y.backward(problem.dy)
    assert all(torch.equal(t.grad, right) for t, right in zip(leaves, plain[1:], strict=True))

    leaves = [t.detach().requires_grad_() for t in problem.leaves()]
    y = tp.ffn(*leaves)
    y.backward(problem.dy, retain_graph=True)
    y.backward(problem.dy)
    assert all(torch.equal(t.grad, 2 * right) for t, right in zip(leaves, plain[1:], strict=True))


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
    ("b1", {"linear_dact": 1}, 2),
    ("b2", {"column_sum": 1}, 0),
    ("x w1 w2 b1 b2", {"linear_dact": 1, "dgrad": 1, "wgrad": 2, "column_sum": 1}, 4),
]


def recorded(calls, name, function):
    """Wrap a function so that each call appends its name to `calls`."""
    return lambda *args: calls.append(name) or function(*args)


@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize(("wanted", "expected", "saved_count"), FROZEN, ids=[f[0] for f in FROZEN])
def test_frozen_tensors_cost_nothing(wanted, expected, saved_count, save, implementation, device, monkeypatch):
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
    for op in ("linear_act", "linear", "linear_dact", "dgrad", "wgrad", "column_sum"):
        monkeypatch.setattr(ops, op, recorded(calls, op, getattr(ops, op)))
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


@pytest.mark.usefixtures("implementation")
def test_save_modes_keep_what_they_say(device):
    """Beside x and the parameters: one [M, F/P] tensor, or nothing."""
    problem = draw((6,), 32, 48, device=device)
    for save, kept in (("pre_act", 1), ("nothing", 0)):
        leaves = [t.detach().requires_grad_() for t in problem.leaves()]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            tp.ffn(*leaves, save=save)
        own = {t.data_ptr() for t in leaves}
        assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(6, 48)] * kept


def test_double_backward_is_refused(device):
    problem = draw((6,), 32, 48, device=device)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    (dx,) = torch.autograd.grad(tp.ffn(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_kernel_launches(device):
    """One launch forward for Linear1, bias and activation; three for Linear2's and Linear1's data gradients."""
    problem = draw((130,), 64, 96, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    with count_launches() as forward:
        y = tp.ffn(*leaves)
    assert forward == {"linear_act_kernel": 1, "matmul_kernel": 1}
    with count_launches() as backward:
        y.backward(problem.dy)
    # db1's partials need one pass, db2's 130 rows two.
    assert backward == {"linear_dact_kernel": 1, "matmul_kernel": 1, "wgrad_kernel": 2, "column_sum_kernel": 3}


@pytest.mark.cpu_only
def test_fp64_on_the_native_path(monkeypatch):
    monkeypatch.setattr("tpffn_triton.interpreter.interpreting", lambda: False)
    problem = draw((4,), 6, 8, activation="gelu_tanh", dtype=torch.float64)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    assert torch.autograd.gradcheck(lambda *t: tp.ffn(*t, activation="gelu_tanh"), leaves)


@pytest.mark.usefixtures("implementation")
def test_compiled_whole_at_any_number_of_tokens(device):
    """torch.compile(fullgraph=True), the second size included: dynamo then traces symbolic shapes."""
    compiled = torch.compile(tp.ffn, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9, 17):
        problem = draw((tokens,), 32, 48, device=device)
        for mine, right in zip(results(compiled, problem.leaves(), problem.dy), ours(problem), strict=True):
            assert torch.equal(mine, right)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_does_not_change_the_dtype_half_way(dtype):
    problem = draw((6,), 32, 48, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(problem)
    for mine, right in zip(inside, ours(problem), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.gpu
def test_cuda_graph_replays_bit_for_bit():
    """Forward and backward in one graph."""
    problem = draw((256,), 256, 512, dtype=torch.bfloat16, device="cuda")
    right = ours(problem)
    leaves = [t.requires_grad_() for t in problem.leaves()]

    def step():
        y = tp.ffn(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, right, strict=True))
