"""The operator as a citizen of PyTorch: compile, export, checkpoints, saved tensors, FLOPs, torch.func, CUDA graphs."""

import shutil

import pytest
import torch
from ffn_cases import draw, ours, results
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tpffn_triton as tp
from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.reference import ffn_reference


def width(activation, F):
    """Columns of the pre-activation."""
    return halves(activation) * F


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("options", [{}, {"save": "nothing"}], ids=["pre_act", "nothing"])
def test_compiled_whole_at_any_number_of_tokens(activation, options, device):
    """torch.compile(fullgraph=True), the second size included: dynamo then traces symbolic shapes."""
    compiled = torch.compile(
        lambda *t: tp.ffn(*t, activation=activation, **options), fullgraph=True, backend="aot_eager"
    )
    for tokens in (6, 9, 17):
        problem = draw((tokens,), 32, 48, activation=activation, device=device)
        for mine, right in zip(results(compiled, problem.leaves(), problem.dy), ours(problem, **options), strict=True):
            assert torch.equal(mine, right)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiled_by_inductor(device):
    """The default backend, in a module, with work before and after."""
    layer = tp.TensorParallelFFN(32, 48, activation="geglu", device=device)
    x = torch.randn(2, 5, 32, device=device)

    def step(x):
        return layer(x.sin()).square()

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_exported_with_dynamic_batch(activation, device):
    layer = tp.TensorParallelFFN(32, 48, activation=activation, device=device)
    example, other = torch.randn(2, 6, 32, device=device), torch.randn(7, 6, 32, device=device)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert torch.equal(program.module()(other), layer(other))
    assert "tpffn.ffn_forward.default" in {str(node.target) for node in program.graph.nodes}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_and_retain_graph(reentrant, device):
    problem = draw((6,), 32, 48, activation="swiglu", device=device)
    plain = ours(problem)

    def ffn(*leaves):
        return tp.ffn(*leaves, activation="swiglu")

    leaves = [t.detach().requires_grad_() for t in problem.leaves()]
    checkpoint(ffn, *leaves, use_reentrant=reentrant).backward(problem.dy)
    assert all(torch.equal(t.grad, right) for t, right in zip(leaves, plain[1:], strict=True))

    leaves = [t.detach().requires_grad_() for t in problem.leaves()]
    y = ffn(*leaves)
    y.backward(problem.dy, retain_graph=True)
    y.backward(problem.dy)
    assert all(torch.equal(t.grad, 2 * right) for t, right in zip(leaves, plain[1:], strict=True))


def saved_bytes(function, leaves):
    """Return the bytes that backward keeps beside the leaves, each storage once."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*leaves)
    for t in leaves:
        saved.pop(t.untyped_storage().data_ptr(), None)
    del y
    return sum(saved.values())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_bytes(activation, device):
    """Beside x and the parameters: one pre_act, at most half of what eager keeps, or nothing at all."""
    M, H, F = 64, 32, 48
    problem = draw((M,), H, F, activation=activation, dtype=torch.bfloat16, device=device)
    kept = {
        save: saved_bytes(lambda *t, s=save: tp.ffn(*t, activation=activation, save=s), problem.leaves())
        for save in ("pre_act", "nothing")
    }
    assert kept == {"pre_act": 2 * M * width(activation, F), "nothing": 0}
    by_eager = saved_bytes(lambda *t: ffn_reference(*t, activation=activation), problem.leaves())
    # F.relu keeps its output alone, which Linear2 keeps anyway.
    assert kept["pre_act"] <= by_eager / (1 if activation == "relu" else 2)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops(activation, device):
    """Six GEMMs; save="nothing" computes Linear1 again, torch's checkpointing both linears."""
    M, H, F = 6, 32, 48
    problem = draw((2, 3), H, F, activation=activation, device=device)
    linear1, linear2 = 2 * M * H * width(activation, F), 2 * M * H * F

    def flops(function):
        leaves = [t.detach().requires_grad_() for t in problem.leaves()]
        with FlopCounterMode(display=False) as counter:
            function(*leaves).backward(problem.dy)
        return counter.get_total_flops()

    def ffn(*leaves, save="pre_act"):
        return tp.ffn(*leaves, activation=activation, save=save)

    assert flops(ffn) == 3 * linear1 + 3 * linear2
    assert flops(lambda *t: ffn(*t, save="nothing")) == 4 * linear1 + 3 * linear2
    assert flops(lambda *t: checkpoint(ffn, *t, use_reentrant=False)) == 4 * linear1 + 4 * linear2
    assert flops(lambda *t: ffn_reference(*t, activation=activation)) == 3 * linear1 + 3 * linear2


@pytest.mark.cpu_only
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("save", ["pre_act", "nothing"])
def test_gradcheck_in_fp64_on_the_native_path(activation, save, monkeypatch):
    monkeypatch.setattr("tpffn_triton.interpreter.interpreting", lambda: False)
    problem = draw((2, 2), 6, 8, activation=activation, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in problem.leaves()]
    assert torch.autograd.gradcheck(lambda *t: tp.ffn(*t, activation=activation, save=save), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_cuda_graph_replays_bit_for_bit(activation):
    """Forward and backward in one graph."""
    problem = draw((256,), 256, 512, activation=activation, dtype=torch.bfloat16, device="cuda")
    right = ours(problem)
    leaves = [t.requires_grad_() for t in problem.leaves()]

    def step():
        y = tp.ffn(*leaves, activation=activation)
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


def transformed(activation):
    """Return ours and the reference as functions of (x, w1, w2, b1, b2)."""
    return (
        lambda *t: tp.ffn(*t, activation=activation),
        lambda *t: ffn_reference(*t, activation=activation),
    )


def assert_near(mine, right):
    """Compare tensors or tuples of them."""
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


ALL = (0, 1, 2, 3, 4)
X_ONLY = (0, None, None, None, None)
TRANSFORMS = {
    "grad": lambda f, p: grad(lambda *t: f(*t).square().sum(), argnums=ALL)(*p.leaves()),
    "vjp": lambda f, p: vjp(f, *p.leaves())[1](p.dy),
    "jacrev": lambda f, p: jacrev(f, argnums=(0, 3))(*p.leaves()),
    "jvp": lambda f, p: jvp(f, p.leaves(), tuple(t.cos() for t in p.leaves())),
    "jacfwd": lambda f, p: jacfwd(f, argnums=4)(*p.leaves()),
    "vmap": lambda f, p: vmap(f, in_dims=X_ONLY)(*p.leaves()),
    "vmap over the last dim": lambda f, p: vmap(lambda x: f(x.t(), *p.leaves()[1:]), in_dims=2)(
        torch.stack([p.x.t(), p.dy.t()], dim=2)
    ),
    "ensemble": lambda f, p: vmap(f, in_dims=(None, 0, None, 0, None))(
        p.x, torch.stack([p.w1, -p.w1]), p.w2, torch.stack([p.b1, p.b1]), p.b2
    ),
    "grad of vmap": lambda f, p: grad(lambda *t: vmap(f, in_dims=X_ONLY)(*t).square().sum(), argnums=ALL)(*p.leaves()),
    "grad of vmap, every bias its own dim": lambda f, p: grad(
        lambda *t: vmap(f, in_dims=(0, None, None, 1, 1))(*t).square().sum(), argnums=ALL
    )(torch.stack([p.x, p.dy, p.x]), p.w1, p.w2, torch.stack([p.b1] * 3, 1), torch.stack([p.b2] * 3, 1)),
    "jvp of vmap": lambda f, p: jvp(vmap(f, in_dims=X_ONLY), p.leaves(), tuple(t.cos() for t in p.leaves())),
    "vmap of jvp": lambda f, p: vmap(lambda x: jvp(lambda w: f(x, w, *p.leaves()[2:]), (p.w1,), (p.w1.cos(),)))(p.x),
    "gradients per sample": lambda f, p: vmap(
        grad(lambda *t: f(*t).square().sum(), argnums=(1, 2, 3, 4)), in_dims=X_ONLY
    )(*p.leaves()),
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform, activation, device):
    problem = draw((3,), 8, 16, activation=activation, device=device)
    mine, right = (TRANSFORMS[transform](f, problem) for f in transformed(activation))
    assert_near(mine, right)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (4,), (0, 2), ALL])
def test_transforms_around_leaves_that_need_gradients(needing, save, device):
    """Autograd through vmap, and transforms over one argument while others need gradients outside of it."""
    problem = draw((4, 3), 8, 16, device=device)

    def outcomes(f):
        def leaves():
            return [t.clone().requires_grad_(i in needing) for i, t in enumerate(problem.leaves())]

        outer = leaves()
        vmap(f, in_dims=X_ONLY)(*outer).square().sum().backward()
        yield [t.grad for t in outer if t.requires_grad]
        for i, t in enumerate(problem.leaves()):
            others = leaves()

            def loss(t, i=i, others=others):
                return f(*others[:i], t, *others[i + 1 :]).square().sum()

            yield grad(loss)(t)

    assert_near(
        list(outcomes(lambda *t: tp.ffn(*t, save=save))),
        list(outcomes(ffn_reference)),
    )


@pytest.mark.usefixtures("implementation")
def test_gradient_that_never_comes(device):
    """Whatever follows may return no gradient for y."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(y):
            return y.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, dy):
            return None

    problem = draw((3,), 8, 16, device=device)
    loss = lambda x: Stop.apply(tp.ffn(x, *problem.leaves()[1:])).sum() + x.sum()  # noqa: E731
    assert torch.equal(grad(loss)(problem.x), torch.ones_like(problem.x))


@pytest.mark.usefixtures("implementation")
def test_output_can_be_modified_in_place(device):
    problem = draw((2, 3), 8, 16, device=device)
    leaves = [t.clone().requires_grad_() for t in problem.leaves()]
    y = tp.ffn(*leaves)
    y += problem.dy
    y.sum().backward()
    assert_near(y, ffn_reference(*leaves) + problem.dy)


@pytest.mark.usefixtures("implementation")
def test_functional_call_and_forward_mode_ad(device):
    problem = draw((3,), 8, 16, activation="geglu", device=device)
    layer = tp.TensorParallelFFN(8, 16, activation="geglu", device=device)
    names = ("linear_fc1.weight", "linear_fc2.weight", "linear_fc1.bias", "linear_fc2.bias")
    parameters = dict(zip(names, problem.leaves()[1:], strict=True))
    mine, right = transformed("geglu")
    assert torch.equal(functional_call(layer, parameters, (problem.x,)), mine(*problem.leaves()))
    for needs_grad in (False, True):
        leaves = [t.clone().requires_grad_(needs_grad) for t in problem.leaves()[1:]]
        tangents = []
        for f in (mine, right):
            with forward_ad.dual_level():
                y = f(forward_ad.make_dual(problem.x, problem.dy), *leaves)
                tangents.append(forward_ad.unpack_dual(y).tangent)
        assert_near(*tangents)


@pytest.mark.usefixtures("implementation")
def test_second_derivatives_are_refused(device):
    """By autograd, and by every nesting of torch.func: never silently wrong."""
    problem = draw((3,), 8, 16, device=device)
    leaves = [t.clone().requires_grad_() for t in problem.leaves()]
    (dx,) = torch.autograd.grad(tp.ffn(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

    def loss(x):
        return tp.ffn(x, *problem.leaves()[1:]).square().sum()

    for second in (
        lambda x: grad(lambda x: grad(loss)(x).sum())(x),
        hessian(loss),
        jacrev(jacrev(loss)),
        jacfwd(jacfwd(loss)),
        lambda x: jvp(grad(loss), (x,), (x,)),
        lambda x: jvp(lambda x: jvp(loss, (x,), (x.cos(),))[1], (x,), (x,)),
        lambda x: grad(lambda x: jvp(loss, (x,), (x.cos(),))[1])(x),
    ):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            second(problem.x)
    with forward_ad.dual_level():
        y = tp.ffn(forward_ad.make_dual(leaves[0], problem.dy), *leaves[1:])
        tangent = forward_ad.unpack_dual(y).tangent
        with pytest.raises(RuntimeError, match="no second derivatives"):
            tangent.sum().backward()
