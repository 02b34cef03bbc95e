"""P ranks in each of the four partitionings equal the unsharded reference: forward and every gradient."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from acceptance import assert_exact
from ffn_cases import NAMES, assert_all_accurate, draw, eager_partitioned, exact, ours, shards, small_integers
from rank_pool import use

from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.partitioned import partitioned_ffn
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.sharding import unshard_ffn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def shape_for(world_size, activation):
    """Two terms have one sum in any order. Four have not, and the norms of few errors differ by chance, most of all
    where relu's derivative jumps: hence more features, and more tokens."""
    if world_size == 2:
        return (3, 20), 64, 96
    return (3, 160 if activation == "relu" else 20), 64, 768


def joined(mine, world_size, activation, partitioning):
    """Return the full (y, dx, dw1, dw2, db1, db2) of every rank's; what is replicated has the same bits."""
    everywhere = [None] * world_size
    dist.all_gather_object(everywhere, [None if t is None else t.cpu() for t in mine])
    y, dx, *_ = everywhere[0]
    assert all(torch.equal(other[0], y) and torch.equal(other[1], dx) for other in everywhere)
    gradients = [(dw1, db1, dw2, db2) for _, _, dw1, dw2, db1, db2 in everywhere]
    dw1, db1, dw2, db2 = unshard_ffn(gradients, activation=activation, partitioning=partitioning)
    return y, dx, dw1, dw2, db1, db2


def matches_reference(rank, world_size, implementation, partitioning, activation, dtype, shape, device="cpu"):
    """Apply the acceptance rules to what the ranks hold together. Eager's error depends on the order in which terms are
    added, which a collective does not promise and a ring changes within a tensor: the largest of P orders counts."""
    use(implementation)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    problem = draw(*shape, activation=activation, dtype=dtype, device=device)
    mine, again = (ours(problem, rank, world_size, dist.group.WORLD, partitioning=partitioning) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "bits differ from run to run"
    together = joined(mine, world_size, activation, partitioning)
    if rank == 0:
        right = exact(problem)
        orders = [eager_partitioned(problem, world_size, partitioning, first) for first in range(world_size)]
        worst = [
            max(terms, key=lambda t, exact_=exact_: (t.double() - exact_).norm())
            for *terms, exact_ in zip(*orders, right, strict=True)
        ]
        assert_all_accurate([t.to(device) for t in together], worst, right)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("implementation", "world_size"), [("triton", 2), ("native", 2), ("native", 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_ranks_equal_the_unsharded_reference(partitioning, activation, dtype, implementation, world_size, ranks_of):
    case = implementation, partitioning, activation, dtype, shape_for(world_size, activation)
    ranks_of(world_size).run(matches_reference, *case)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_gpus_equal_the_unsharded_reference(partitioning, activation, dtype, nccl_ranks):
    case = "triton", partitioning, activation, dtype, ((4, 40), 256, 512)
    nccl_ranks.run(matches_reference, *case, "cuda")


def column_row_beside_ffn(rank, world_size, implementation, dtype, activation, bias):
    use(implementation)
    problem = draw((5, 7), 32, 48, activation=activation, dtype=dtype, bias=bias)
    place = rank, world_size, dist.group.WORLD
    one, other = ours(problem, *place), ours(problem, *place, partitioning="column_row")
    for name, a, b in zip(NAMES, one, other, strict=True):
        assert a is b is None or torch.equal(a, b), name


@pytest.mark.cpu_only
@pytest.mark.parametrize(("implementation", "world_size"), [("triton", 2), ("native", 4)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "gelu"), (torch.bfloat16, "swiglu")], ids=str)
def test_column_row_has_the_bits_of_ffn(implementation, world_size, dtype, activation, bias, ranks_of):
    ranks_of(world_size).run(column_row_beside_ffn, implementation, dtype, activation, bias)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_without_a_group_every_partitioning_is_ffn(partitioning, device):
    problem = draw((5, 7), 32, 48, activation="geglu", dtype=torch.bfloat16, device=device)
    for name, a, b in zip(NAMES, ours(problem), ours(problem, partitioning=partitioning), strict=True):
        assert torch.equal(a, b), name


def assert_exactly(problem, rank, world_size, partitioning):
    mine = ours(problem, rank, world_size, dist.group.WORLD, partitioning=partitioning)
    for name, a, b in zip(
        NAMES, joined(mine, world_size, problem.activation, partitioning), exact(problem), strict=True
    ):
        assert_exact(name, a, b)


def integers(rank, world_size, implementation, partitioning):
    use(implementation)
    for activation in ("relu", "relu2", "geglu"):
        assert_exactly(small_integers(draw((3, 7), 24, 40, activation=activation)), rank, world_size, partitioning)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("implementation", "world_size"), [("triton", 2), ("native", 4)])
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_small_integers_are_exact(implementation, world_size, partitioning, ranks_of):
    """Every tensor is the exact result: no term is dropped, doubled or rounded in between."""
    ranks_of(world_size).run(integers, implementation, partitioning)


def one_hot_biases(rank, world_size, partitioning):
    """x = 0 leaves the biases alone to be seen. relu2 of two is four: a bias that is added once more shows."""
    use("native")
    H, F = 4, 12
    for activation in ("relu2", "geglu"):
        problem = small_integers(draw((3,), H, F, activation=activation))
        problem.x.zero_()
        for feature in range(F):
            problem.b1.zero_()
            problem.b2.zero_()
            # A gate of 128 lets 2 through as 256.
            problem.b1[feature::F] = torch.tensor([2.0] if activation == "relu2" else [128.0, 2.0])
            problem.b2[feature % H] = 1
            assert_exactly(problem, rank, world_size, partitioning)


@pytest.mark.cpu_only
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_a_one_hot_bias_is_added_once_and_at_its_feature(partitioning, ranks_of):
    ranks_of(4).run(one_hot_biases, partitioning)


def laid_out(t, layout):
    """Return t with other strides: of 2 in the last dim; or the last dim the slowest."""
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]
    return t.movedim(-1, 0).contiguous().movedim(0, -1) if layout == "transposed" else t


def any_shape(rank, world_size, partitioning, activation, lead, H, F, biases, layouts):
    use("native")
    problem = draw(lead, H, F, activation=activation, dtype=torch.float64)
    problem.b1, problem.b2 = (t if wanted else None for t, wanted in zip((problem.b1, problem.b2), biases, strict=True))
    right = exact(problem)
    w1, b1, w2, b2 = shards(problem, rank, world_size, partitioning)
    x, dy = (laid_out(t, layout) for t, layout in zip((problem.x, problem.dy), layouts, strict=True))
    leaves = [None if t is None else t.requires_grad_() for t in (x, w1, w2, b1, b2)]
    options = {"partitioning": partitioning, "activation": activation, "tp_group": dist.group.WORLD}
    y = partitioned_ffn(*leaves, **options)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    mine = y.detach(), *(None if t is None else next(found) for t in leaves)
    for name, a, b in zip(NAMES, joined(mine, world_size, activation, partitioning), right, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12), name
        assert a is None or a.shape == b.shape, name


@pytest.mark.cpu_only
@hypothesis.given(
    partitioning=st.sampled_from([*PARTITIONINGS]),
    activation=st.sampled_from(ACTIVATIONS),
    lead=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    H=st.integers(0, 5).map(lambda n: 2 * n),
    F=st.integers(0, 5).map(lambda n: 2 * n),
    biases=st.tuples(st.booleans(), st.booleans()),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "strided", "transposed"])] * 2),
)
# reshape takes a token's single features apart without a copy.
@hypothesis.example(
    partitioning="row_row", activation="geglu", lead=(), H=2, F=2, biases=(True, True), layouts=("contiguous",) * 2
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_shape_and_strides(partitioning, activation, lead, H, F, biases, layouts, ranks_of):
    """In fp64: from nothing to three leading dims, a vector included."""
    ranks_of(2).run(any_shape, partitioning, activation, lead, H, F, biases, layouts)


def one_feature(rank, world_size, implementation, partitioning):
    """Parts of a single feature lie contiguously whatever their strides say, and kernels ask for the strides."""
    use(implementation)
    for activation in ("gelu", "geglu"):
        for H, F in ((1, 1), (1, 3), (3, 1)):
            problem = draw((3,), H * world_size, F * world_size, activation=activation)
            mine = ours(problem, rank, world_size, dist.group.WORLD, partitioning=partitioning)
            assert mine[0].is_contiguous()
            for name, a, b in zip(
                NAMES, joined(mine, world_size, activation, partitioning), exact(problem), strict=True
            ):
                torch.testing.assert_close(a, b.float(), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.cpu_only
@pytest.mark.parametrize("implementation", ["triton", "native"])
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_a_rank_may_have_one_feature(implementation, partitioning, ranks_of):
    ranks_of(2).run(one_feature, implementation, partitioning)


@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_compiled_around_it_runs_eagerly_and_transforms_are_refused(partitioning):
    x, w1, w2 = torch.randn(3, 4), torch.randn(6, 4), torch.randn(4, 6)

    def layer(x):
        return partitioned_ffn(x * 1, w1, w2, partitioning=partitioning) + 1

    torch._dynamo.reset()  # what is compiled belongs to the code, with and without fullgraph
    with pytest.raises(torch._dynamo.exc.Unsupported, match="partitioned_ffn is there to be compared"):
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))
    with pytest.raises(RuntimeError, match=r"not for torch\.func's transforms"):
        torch.func.vmap(layer)(x[None])


def like_any_operator(rank, world_size, partitioning):
    """y may be changed in place; backward runs twice; a tensor without gradient changes no other's; nothing is saved
    without a gradient; autocast."""
    use("native")
    options = {"partitioning": partitioning, "activation": "geglu", "tp_group": dist.group.WORLD}
    for lead in ((), (1,), (6,), (2, 3)):
        problem = draw(lead, 32, 48, activation="geglu")
        expected = ours(problem, rank, world_size, dist.group.WORLD, partitioning=partitioning)
        w1, b1, w2, b2 = shards(problem, rank, world_size, partitioning)
        leaves = [t.clone().requires_grad_() for t in (problem.x, w1, w2, b1, b2)]
        y = partitioned_ffn(*leaves, **options)
        y += problem.x
        assert torch.equal(y.detach(), expected[0] + problem.x)
        for _ in range(2):
            gradients = torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1:], strict=True))
    for wanted in range(5):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        partitioned_ffn(*leaves, **options).backward(problem.dy)
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
        assert torch.equal(leaves[wanted].grad, expected[1 + wanted])
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert torch.equal(partitioned_ffn(*leaves, **options), expected[0])
    assert not saved
    leaves = [t.detach().requires_grad_() for t in leaves]
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        y = partitioned_ffn(*leaves, **options)
    assert y.dtype == torch.bfloat16
    weights = {t.data_ptr() for t in leaves[1:3]}
    assert weights <= {t.data_ptr() for t in saved}, "a copy in autocast's dtype is kept"
    gradients = torch.autograd.grad(y, leaves, problem.dy.bfloat16())
    for mine, right in zip((y.float(), *gradients), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0.05, atol=0.05 * right.abs().max().item())


@pytest.mark.cpu_only
@pytest.mark.parametrize("partitioning", PARTITIONINGS)
def test_it_behaves_like_any_operator(partitioning, ranks_of):
    ranks_of(2).run(like_any_operator, partitioning)
