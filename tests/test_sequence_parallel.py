"""With sequence parallelism P ranks, each with a slice of dim 0, equal the unsharded reference."""

import copy

import pytest
import torch
import torch.distributed as dist
from ffn_cases import NAMES, draw, matches_reference, ours, results, shards, tokens
from launches import CountCollectives, RecordOperators
from rank_pool import use
from torch import nn

import tpffn_triton as tp
from tpffn_triton import passes, regions
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.reference import ffn_reference

pytestmark = pytest.mark.cpu_only
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORLD_SIZES = [2, 4]


@pytest.mark.parametrize(("implementation", "world_size"), [("triton", 2), ("native", 2), ("native", 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slices_equal_the_unsharded_reference(implementation, world_size, activation, dtype, ranks_of):
    save = "nothing" if activation in ("silu", "geglu") else "pre_act"
    options = {"save": save, "sequence_parallel": True}
    ranks_of(world_size).run(matches_reference, implementation, activation, dtype, options, ((8, 5), 64, 96))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_group_it_changes_nothing(activation):
    problem = draw((4, 3), 16, 24, activation=activation)
    plain, slices = ours(problem), ours(problem, sequence_parallel=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, slices, strict=True))


def counted(rank, world_size, save, frozen):
    use("native")
    problem = draw((8, 3), 32, 48)
    x, dy = tokens(problem, rank, world_size, True)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    leaves = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in leaves.items()}
    with CountCollectives() as forward:
        y = tp.ffn(*leaves.values(), tp_group=dist.group.WORLD, sequence_parallel=True, save=save)
    with CountCollectives() as backward:
        y.backward(dy)
    return forward.counts, backward.counts


GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


@pytest.mark.parametrize(
    ("save", "frozen", "gathers", "scatters"),
    [
        ("pre_act", "", 2, 1),
        ("nothing", "", 2, 1),
        ("pre_act", "x", 2, 0),
        ("pre_act", "w1", 1, 1),
        ("nothing", "w1", 2, 1),
        ("pre_act", ("x", "w1", "b1"), 1, 0),
        ("pre_act", ("x", "w1", "b1", "w2"), 0, 0),
    ],
)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives_and_their_bytes(world_size, save, frozen, gathers, scatters, ranks_of):
    """Forward gathers x and reduce-scatters y; backward gathers dy and x and reduce-scatters dx, as far as needed."""
    whole = 8 * 3 * 32 * 4
    part = whole // world_size
    expected = {GATHER: [gathers, gathers * part], SCATTER: [scatters, scatters * whole]}
    for forward, backward in ranks_of(world_size).run(counted, save, frozen):
        assert forward == {GATHER: [1, part], SCATTER: [1, whole]}
        assert backward == {name: count for name, count in expected.items() if count[0]}


def order_of_backward(rank, world_size, save):
    use("native")
    events = []
    names = ("start_all_gather", "start_reduce_scatter", "wait")
    originals = {name: getattr(passes, name) for name in names}

    def recorded(name, function):
        return lambda *args: events.append(name) or function(*args)

    problem = draw((4, 8), 32, 48)
    x, dy = tokens(problem, rank, world_size, True)
    w1, b1, w2, b2 = (t.clone().requires_grad_() for t in shards(problem, rank, world_size))
    y = tp.ffn(x.requires_grad_(), w1, w2, b1, b2, tp_group=dist.group.WORLD, sequence_parallel=True, save=save)
    try:
        for name, function in originals.items():
            setattr(passes, name, recorded(name, function))
        with RecordOperators(events):
            y.backward(dy)
    finally:
        for name, function in originals.items():
            setattr(passes, name, function)
    return events


def test_gathers_and_the_scatter_are_in_flight_behind_gemms(ranks_of):
    """x's gather behind linear_dact, dgrad, db1 and dw2; dx's reduce-scatter behind every weight and bias gradient."""
    gather, gradients = "start_all_gather", ["dgrad", "start_reduce_scatter"]
    for events in ranks_of(2).run(order_of_backward, "pre_act"):
        before = [gather, "wait", gather, "linear_dact"]
        assert events == [*before, *gradients, "column_sum", "wgrad", "wait", "wgrad", "column_sum", "wait"]
    for events in ranks_of(2).run(order_of_backward, "nothing"):
        before = [gather, "wait", gather, "linear_act", "wait", "linear_dact"]
        assert events == [*before, *gradients, "weight_grads", "wait"]


def saved_tensors(rank, world_size):
    use("native")
    problem = draw((4, 8), 32, 48)
    x, _ = tokens(problem, rank, world_size, True)
    w1, b1, w2, b2 = (t.clone().requires_grad_() for t in shards(problem, rank, world_size))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        tp.ffn(x, w1, w2, b1, b2, tp_group=dist.group.WORLD, sequence_parallel=True)
    return saved


def test_x_is_saved_as_a_slice(ranks_of):
    """Beside w2: this rank's part of x, and pre_act of all tokens."""
    x, w2, pre_act = (2, 8, 32), (32, 24), (32, 24)
    assert ranks_of(2).run(saved_tensors) == [[x, w2, pre_act]] * 2


class Block(nn.Module):
    """A norm on this rank's tokens, then the layer."""

    def __init__(self, group, sequence_parallel):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.ffn = tp.TensorParallelFFN(32, 48, tp_group=group, sequence_parallel=sequence_parallel)
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def block_between_regions(rank, world_size):
    """Scatter, a block on slices, gather: the output and, once reduced, every gradient equal those of whole tensors."""
    use("native")
    group = dist.group.WORLD
    problem = draw((8, 3), 32, 48)
    slices, whole = Block(group, True), Block(group, False)
    x = problem.x.clone().requires_grad_()
    y = regions.gather_from_sp_region(slices(regions.scatter_to_sp_region(x, group)), group, reduce_grad=False)
    y.backward(problem.dy)
    other = problem.x.clone().requires_grad_()
    expected = whole(other)
    expected.backward(problem.dy)
    own = slices.ffn.linear_fc2.bias.grad
    torch.testing.assert_close(own, tokens(problem, rank, world_size, True)[1].flatten(0, -2).sum(0))
    tp.reduce_replicated_grads(slices)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)
    for (name, mine), theirs in zip(slices.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_block_between_scatter_and_gather(ranks_of):
    ranks_of(4).run(block_between_regions)


def gradients_of_regions(rank, world_size):
    """Each region's backward is the other direction's collective, also of gradients that are not contiguous."""
    group = dist.group.WORLD
    whole = torch.arange(24.0).view(4, 6)
    total = sum(range(1, world_size + 1))
    own = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    mine = (whole * (rank + 1)).t().contiguous().t()
    everyone = torch.cat([part * (r + 1) for r, part in enumerate(whole.chunk(world_size))])
    part = (whole[own] * (rank + 1)).t().contiguous().t()
    for region, x, dy, y, dx in (
        (regions.gather_from_sp_region, part, mine, everyone, (whole * total)[own]),
        (lambda t, g: regions.gather_from_sp_region(t, g, reduce_grad=False), part, mine, everyone, mine[own]),
        (regions.reduce_scatter_to_sp_region, mine, part, (whole * total)[own], everyone),
        (regions.scatter_to_sp_region, mine, part, mine[own], everyone),
    ):
        leaf = x.clone().requires_grad_()
        out = region(leaf, group)
        out.backward(dy)
        assert torch.equal(out, y)
        assert torch.equal(leaf.grad, dx)
        assert region(x, None) is x
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(region(leaf, group).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_gradients_of_regions(ranks_of):
    ranks_of(2).run(gradients_of_regions)


def reduced_gradients(rank, world_size):
    use("native")
    group = dist.group.WORLD
    model = nn.ModuleList([Block(group, True), Block(group, True).bfloat16(), nn.LayerNorm(3)])
    model[1].norm.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, rank + 1.0) if parameter.requires_grad else None
    model[0].norm.bias.grad = None
    model[0].norm.weight.grad = torch.full((64,), rank + 1.0)[::2]
    with CountCollectives() as collectives:
        tp.reduce_replicated_grads(model)
    total = sum(range(1, world_size + 1))
    summed = {"0.norm.weight": total, "0.norm.bias": 0, "0.ffn.linear_fc2.bias": total}
    summed |= {"1.norm.bias": total, "1.ffn.linear_fc2.bias": total, "1.norm.weight": None}
    for name, parameter in model.named_parameters():
        expected = summed.get(name, rank + 1)
        assert parameter.grad is None if expected is None else bool((parameter.grad == expected).all()), name
    # One message for each dtype.
    assert collectives.counts == {"all_reduce_": [2, 3 * 32 * 4 + 2 * 32 * 2]}
    pair = nn.ModuleList([Block(group, True), Block(dist.new_group(list(range(world_size))), True)])
    with pytest.raises(ValueError, match=r"layers of 2 tensor-parallel groups \(.*\): give tp_group"):
        tp.reduce_replicated_grads(pair)
    tp.reduce_replicated_grads(pair, group)
    # Layers without sequence parallelism do not count.
    tp.reduce_replicated_grads(nn.ModuleList([pair[0], Block(dist.new_group(list(range(world_size))), False).ffn]))
    tp.reduce_replicated_grads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no TensorParallelFFN with sequence_parallel beside weight, bias: give"):
        tp.reduce_replicated_grads(pair[0].norm)
    moved = Block(group, True)
    moved.norm.requires_grad_(False)
    moved.ffn.linear_fc2.bias.main_grad = torch.full((32,), rank + 1.0)  # Megatron-LM's DDP moves gradients there
    tp.reduce_replicated_grads(moved)
    assert moved.ffn.linear_fc2.bias.grad is None
    assert (moved.ffn.linear_fc2.bias.main_grad == total).all()
    moved.ffn.linear_fc2.bias.requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=r"disagree:\n  rank 0: gradients of ffn.*\n  rank 1: gradients of nothing"):
        tp.reduce_replicated_grads(moved, dist.new_group(list(range(world_size))))


def bias_without_its_mark(rank, world_size):
    """As where something, FSDP for one, has replaced the parameter."""
    layer = tp.TensorParallelFFN(32, 48, tp_group=dist.group.WORLD, sequence_parallel=True)
    layer.linear_fc2.bias = nn.Parameter(torch.zeros(32))
    layer.linear_fc2.bias.grad = torch.ones(32)
    tp.reduce_replicated_grads(layer)
    assert (layer.linear_fc2.bias.grad == world_size).all()


def test_a_bias_without_its_mark_is_summed(ranks_of):
    ranks_of(2).run(bias_without_its_mark)


def test_replicated_gradients_are_summed_once_for_each_dtype(ranks_of):
    ranks_of(2).run(reduced_gradients)


def marks(rank, world_size):
    use("native")
    group = dist.group.WORLD
    layer = tp.TensorParallelFFN(32, 48, tp_group=group, sequence_parallel=True)
    fc1, fc2 = nn.Linear(32, 48), nn.Linear(48, 32)
    made = tp.TensorParallelFFN.from_dense(fc1, fc2, tp_group=group, sequence_parallel=True)
    for each in (layer, made, copy.deepcopy(layer)):
        marked = [name for name, p in each.named_parameters() if getattr(p, "sequence_parallel", False)]
        assert marked == ["linear_fc2.bias"]
    assert not tp.TensorParallelFFN(32, 48, tp_group=group).linear_fc2.bias.sequence_parallel


def test_the_replicated_bias_carries_megatrons_mark(ranks_of):
    ranks_of(2).run(marks)


def slices_of_different_size(rank, world_size):
    use("native")
    problem = draw((7, 3), 32, 48)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    with pytest.raises(ValueError, match=r"splits dim 0 into 2 equal parts; got a tensor of shape \[7, 3, 32\]"):
        regions.scatter_to_sp_region(problem.x, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"splits dim 0 into 2 equal parts; got a tensor of shape \[7, 3, 32\]"):
        regions.reduce_scatter_to_sp_region(problem.x, dist.group.WORLD)
    group = dist.new_group(list(range(world_size)))
    tp.ffn(problem.x.chunk(2)[rank], w1, w2, b1, b2, tp_group=group, sequence_parallel=True)


def test_a_sequence_that_p_does_not_divide(ranks_of):
    for ok, error in ranks_of(2).outcomes(slices_of_different_size, timeout=60):
        assert not ok
        assert error[0] == "ValueError"
        assert "x [4, 3, 32]" in error[1]
        assert "x [3, 3, 32]" in error[1]


def under_pytorch(rank, world_size):
    """Compiled whole; autocast with main_grad; transforms; checkpointing of strided slices."""
    use("native")
    group = dist.group.WORLD
    problem = draw((4, 3), 32, 48, activation="swiglu")
    x, dy = tokens(problem, rank, world_size, True)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    leaves = x, w1, w2, b1, b2

    def ffn(*t, **options):
        return tp.ffn(*t, activation="swiglu", tp_group=group, sequence_parallel=True, **options)

    plain = results(ffn, leaves, dy)
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(results(compiled, leaves, dy), plain, strict=True))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    again = results(lambda x, *t: torch.utils.checkpoint.checkpoint(ffn, x, *t, use_reentrant=False), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert torch.equal(ffn(strided, *leaves[1:]), plain[0])
    for mine, other in zip(torch.func.vjp(ffn, *leaves)[1](dy), plain[1:], strict=True):
        torch.testing.assert_close(mine, other)
    full = draw((4, 3), 32, 48, activation="swiglu", seed=1)
    d1, e1, d2, e2 = shards(full, rank, world_size)
    _, tangent = torch.func.jvp(ffn, leaves, (tokens(full, rank, world_size, True)[0], d1, d2, e1, e2))
    _, right = torch.func.jvp(lambda *t: ffn_reference(*t, activation="swiglu"), problem.leaves(), full.leaves())
    torch.testing.assert_close(tangent, right.chunk(world_size)[rank], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="vmap over sequence_parallel"):
        torch.func.vmap(lambda x: ffn(x, *leaves[1:]))(torch.stack([x, dy]))
    with pytest.raises(RuntimeError, match="vmap over sequence_parallel"):
        torch.func.jacrev(lambda x: ffn(x, *leaves[1:]))(x)


def test_under_pytorchs_modes(ranks_of):
    ranks_of(2).run(under_pytorch)


def autocast_and_main_grad(rank, world_size):
    use("native")
    group = dist.group.WORLD
    problem = draw((4, 3), 32, 48)
    problem.dy = problem.dy.bfloat16()
    x, dy = tokens(problem, rank, world_size, True)
    w1, b1, w2, b2 = shards(problem, rank, world_size)

    def ffn(*t, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tp.ffn(*t, tp_group=group, sequence_parallel=True, **options)

    with CountCollectives() as collectives:
        plain = results(ffn, (x, w1, w2, b1, b2), dy)
    for name, gradient in zip(NAMES[2:], plain[2:], strict=True):
        assert not torch.equal(gradient, gradient.bfloat16().float()), f"{name} went through bf16"
    whole, part = 4 * 3 * 32 * 2, 4 * 3 * 32 * 2 // world_size
    assert collectives.counts == {GATHER: [3, 3 * part], SCATTER: [2, 2 * whole]}, "sent in autocast's dtype"
    x, w1, w2, b1, b2 = (t.detach().clone().requires_grad_() for t in (x, w1, w2, b1, b2))
    w1.main_grad, w2.main_grad = torch.ones_like(w1), torch.ones_like(w2)
    ffn(x, w1, w2, b1, b2, gradient_accumulation_fusion=True).backward(dy)
    for name, mine, gradient in zip(NAMES[1:], (x.grad, w1.main_grad - 1, w2.main_grad - 1), plain[1:], strict=False):
        torch.testing.assert_close(mine, gradient, msg=name)


def test_autocast_and_main_grad(ranks_of):
    ranks_of(2).run(autocast_and_main_grad)
