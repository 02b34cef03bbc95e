"""P ranks under PyTorch's modes: compile, autocast, torch.func, checkpointing, main_grad; and bitwise determinism."""

import pytest
import torch
import torch.distributed as dist
from ffn_cases import NAMES, assert_all_accurate, draw, eager, exact, ours, results, shards
from rank_pool import use
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tpffn_triton as tp
from tpffn_triton.reference import ffn_reference

pytestmark = pytest.mark.cpu_only


def own_leaves(problem, rank, world_size):
    """Return this rank's (x, w1, w2, b1, b2)."""
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    return problem.x, w1, w2, b1, b2


def compiled_equals_eager(rank, world_size, implementation, activation):
    use(implementation)
    torch._dynamo.reset()

    def ffn(*t):
        return tp.ffn(*t, activation=activation, tp_group=dist.group.WORLD)

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(ffn, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (6, 9):
        problem = draw((tokens,), 32, 48, activation=activation, dtype=torch.bfloat16)
        leaves = own_leaves(problem, rank, world_size)
        for name, a, b in zip(
            NAMES, results(compiled, leaves, problem.dy), results(ffn, leaves, problem.dy), strict=True
        ):
            assert torch.equal(a, b), name
    return len(graphs)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("implementation", ["triton", "native"])
def test_compiled_without_graph_breaks_at_p4(implementation, activation, ranks_of):
    """One graph, collectives inside, forward and backward; a second number of tokens compiles nothing."""
    assert ranks_of(4).run(compiled_equals_eager, implementation, activation, timeout=200) == [1] * 4


def autocast_and_main_grad(rank, world_size):
    """fp32 master weights, bf16 compute and communication, weight gradients added to main_grad."""
    use("triton")
    group = dist.group.WORLD
    problem = draw((33,), 32, 48, activation="geglu")

    def run(function):
        def under_autocast(*t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*t)

        return under_autocast

    problem.dy = problem.dy.bfloat16()
    leaves = own_leaves(problem, rank, world_size)
    mine = results(run(lambda *t: tp.ffn(*t, activation="geglu", tp_group=group)), leaves, problem.dy)
    rounded = draw((33,), 32, 48, activation="geglu", dtype=torch.bfloat16)
    in_bf16 = eager(rounded, rank, world_size, group)
    right = exact(problem, rank, world_size)
    assert [t.dtype for t in mine] == [torch.bfloat16, *[torch.float32] * 5]
    assert_all_accurate([t.float() for t in mine], [t.float() for t in in_bf16], right)

    x, w1, w2, b1, b2 = (t.detach().clone().requires_grad_() for t in leaves)
    for w in (w1, w2):
        w.main_grad = torch.ones(w.shape)
    fused = run(lambda *t: tp.ffn(*t, activation="geglu", tp_group=group, gradient_accumulation_fusion=True))(
        x, w1, w2, b1, b2
    )
    fused.backward(problem.dy)
    assert torch.equal(x.grad, mine[1])
    for w, gradient in ((w1, mine[2]), (w2, mine[3])):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, 1 + gradient)


def test_autocast_and_main_grad_at_p2(ranks_of):
    ranks_of(2).run(autocast_and_main_grad)


def transforms_and_checkpoint(rank, world_size):
    use("triton")
    group = dist.group.WORLD
    problem = draw((5,), 16, 24, activation="swiglu")
    leaves = own_leaves(problem, rank, world_size)

    def ffn(*t):
        return tp.ffn(*t, activation="swiglu", tp_group=group)

    plain = ours(problem, rank, world_size, group)
    again = results(lambda *t: checkpoint(ffn, *t, use_reentrant=False), leaves, problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for mine, other in zip(torch.func.vjp(ffn, *leaves)[1](problem.dy), plain[1:], strict=True):
        torch.testing.assert_close(mine, other)
    # The tangent of the full reference along what the ranks' shards move in.
    full = draw((5,), 16, 24, activation="swiglu", seed=1)
    tangents = own_leaves(full, rank, world_size)
    _, tangent = torch.func.jvp(ffn, leaves, tangents)
    _, right = torch.func.jvp(lambda *t: ffn_reference(*t, activation="swiglu"), problem.leaves(), full.leaves())
    torch.testing.assert_close(tangent, right, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(lambda x: torch.func.jvp(ffn, (x, *leaves[1:]), tangents)[1].sum())(leaves[0])
    batch = torch.stack([leaves[0], problem.dy])
    rows = torch.func.vmap(lambda x: ffn(x, *leaves[1:]))(batch)
    torch.testing.assert_close(rows, torch.stack([ffn(x, *leaves[1:]) for x in batch]))


def test_transforms_and_checkpoint_at_p2(ranks_of):
    ranks_of(2).run(transforms_and_checkpoint)


def first_call_with_fake_tensors(rank, world_size):
    """The exchange of arguments is real, and no part of what a mode sees."""
    use("native")
    group = dist.new_group(list(range(world_size)))
    leaves = own_leaves(draw((5,), 16, 24), rank, world_size)
    with FakeTensorMode() as mode:
        y = tp.ffn(*(mode.from_tensor(t) for t in leaves), tp_group=group)
    assert y.shape == (5, 16)
    other = dist.new_group(list(range(world_size)))
    graph = make_fx(lambda *t: tp.ffn(*t, tp_group=other))(*leaves).graph
    assert not any("gather" in str(node.target) for node in graph.nodes)


def test_first_call_with_fake_tensors_at_p2(ranks_of):
    ranks_of(2).run(first_call_with_fake_tensors)


def exported(rank, world_size):
    use("native")
    torch.manual_seed(0)
    layer = tp.TensorParallelFFN(32, 48, activation="swiglu", tp_group=dist.group.WORLD)
    example, x = torch.randn(2, 6, 32), torch.randn(7, 6, 32)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert torch.equal(program.module()(x), layer(x))


def test_exported_at_p2(ranks_of):
    ranks_of(2).run(exported)
