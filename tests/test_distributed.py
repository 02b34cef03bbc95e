"""P ranks over gloo (NCCL where there are GPUs) equal the unsharded reference: forward and every gradient."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from ffn_cases import assert_all_accurate, draw, eager, exact, matches_reference, ours, shards
from launches import CountCollectives, RecordOperators, count_launches
from rank_pool import use
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tpffn_triton as tp
from tpffn_triton import collectives, functional, passes, regions
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.sharding import unshard_ffn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORLD_SIZES = [2, 4]


@pytest.mark.cpu_only
@pytest.mark.parametrize("implementation", ["triton", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_equal_the_unsharded_reference(world_size, activation, dtype, implementation, ranks_of):
    save = "nothing" if activation in ("silu", "geglu") else "pre_act"
    ranks_of(world_size).run(matches_reference, implementation, activation, dtype, {"save": save})


@pytest.mark.multi_gpu
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "slices"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpus_equal_the_unsharded_reference(activation, dtype, sequence_parallel, nccl_ranks):
    options = {"sequence_parallel": sequence_parallel}
    nccl_ranks.run(matches_reference, "triton", activation, dtype, options, ((4, 40), 256, 512), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"reduce_dtype": torch.float32}, {"forward_chunks": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ranks_that_share_a_gpu_over_gloo(activation, dtype, options, ranks_of):
    """gloo reduces CUDA tensors; NCCL refuses two ranks on one GPU."""
    shape = (4, 64), 256, 512
    ranks_of(2).run(matches_reference, "triton", activation, dtype, options, shape, "cuda:0")


def analysed_model(rank, world_size):
    use("triton")
    problem = draw((8, 128), 1024, 4096, dtype=torch.bfloat16)
    with count_launches() as launches:
        mine = ours(problem, rank, world_size, dist.group.WORLD)
    assert_all_accurate(mine, eager(problem, rank, world_size, dist.group.WORLD), exact(problem, rank, world_size))
    return dict(launches), [tuple(t.shape) for t in mine]


@pytest.mark.slow
@pytest.mark.cpu_only
def test_analysed_model_at_p4_through_the_triton_kernels(ranks_of):
    """B=8, S=128, H=1024, F=4096, P=4, bf16: real shapes, forward and backward, every launch counted."""
    for launches, shapes in ranks_of(4).run(analysed_model):
        assert launches == {
            "ffn_kernel": 1,
            "matmul_kernel": 1,
            "linear_dact_kernel": 1,
            "weight_grads_kernel": 1,
        }
        x, w1, w2 = (8, 128, 1024), (1024, 1024), (1024, 1024)
        assert shapes == [x, x, w1, w2, (1024,), (1024,)]


def module_equals_dense(rank, world_size, device_mesh):
    use("native")
    torch.manual_seed(5)
    fc1, fc2 = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)
    tp_group = init_device_mesh("cpu", (world_size,)) if device_mesh else dist.group.WORLD
    torch.manual_seed(5)
    layer = tp.TensorParallelFFN(32, 48, tp_group=tp_group)
    converted = tp.TensorParallelFFN.from_dense(fc1, fc2, tp_group=tp_group)
    own = [p.detach() for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(own, converted.parameters(), strict=True))
    w1, b1, w2, b2 = own
    everywhere = [None] * world_size
    dist.all_gather_object(everywhere, (w1, b1, w2, b2))
    full = unshard_ffn(everywhere, activation="gelu")
    assert all(torch.equal(a, b) for a, b in zip(full, (fc1.weight, fc1.bias, fc2.weight, fc2.bias), strict=True))
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), fc2(torch.nn.functional.gelu(fc1(x))))
    return repr(layer)


@pytest.mark.cpu_only
@pytest.mark.parametrize("device_mesh", [False, True], ids=["ProcessGroup", "DeviceMesh"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_same_seed_gives_the_same_full_weights_at_every_p(world_size, device_mesh, ranks_of):
    texts = ranks_of(world_size).run(module_equals_dense, device_mesh)
    assert f"rank={world_size - 1}, world_size={world_size}" in texts[-1]


def counted_collectives(rank, world_size):
    use("native")
    problem = draw((4, 8), 32, 48)
    with CountCollectives() as collectives:
        ours(problem, rank, world_size, dist.group.WORLD)
    return collectives.counts


@pytest.mark.cpu_only
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_all_reduce_forward_and_one_backward(world_size, ranks_of):
    for counts in ranks_of(world_size).run(counted_collectives):
        assert counts == {"all_reduce_": [2, 2 * (4 * 8 * 32 * 4)]}


def order_of_backward(rank, world_size):
    use("native")
    problem = draw((4, 8), 32, 48)
    events = []
    originals = {name: getattr(passes, name) for name in ("start_all_reduce", "wait")}

    def recorded(name, function):
        return lambda *args: events.append(name) or function(*args)

    try:
        for name, function in originals.items():
            setattr(passes, name, recorded(name, function))
        with RecordOperators(events):
            ours(problem, rank, world_size, dist.group.WORLD)
    finally:
        for name, function in originals.items():
            setattr(passes, name, function)
    return events


@pytest.mark.cpu_only
def test_dx_is_in_flight_behind_every_weight_gradient(ranks_of):
    for events in ranks_of(2).run(order_of_backward):
        backward = ["linear_dact", "dgrad", "start_all_reduce", "weight_grads", "wait"]
        assert events == ["ffn_forward", "start_all_reduce", "wait", *backward]


def frozen_input(rank, world_size):
    use("native")
    problem = draw((4,), 32, 48)
    w1, b1, w2, b2 = (t.requires_grad_() for t in shards(problem, rank, world_size))

    def step():
        tp.ffn(problem.x, w1, w2, b1, b2, tp_group=dist.group.WORLD).sum().backward()

    with CountCollectives() as collectives:
        step()
    return collectives.get_total_counts()


@pytest.mark.cpu_only
def test_no_dx_no_collective(ranks_of):
    """An x without gradient: backward communicates nothing (the one collective is y's)."""
    assert ranks_of(2).run(frozen_input) == [1, 1]


def zero_tokens(rank, world_size):
    use("triton")
    problem = draw((0,), 16, 8)
    y, dx, dw1, *_ = ours(problem, rank, world_size, dist.group.WORLD)
    assert y.shape == dx.shape == (0, 16)
    assert not dw1.any()


@pytest.mark.cpu_only
def test_zero_tokens(ranks_of):
    ranks_of(2).run(zero_tokens)


def group_of_one(rank, world_size):
    use("native")
    own_group = [dist.new_group([r]) for r in range(world_size)][rank]
    problem = draw((4,), 32, 48)
    alone = ours(problem)
    with CountCollectives() as counted:
        grouped = ours(problem, group=own_group)
    assert counted.get_total_counts() == 0
    assert all(torch.equal(a, b) for a, b in zip(alone, grouped, strict=True))
    assert collectives.resolve_group(own_group) is None


@pytest.mark.cpu_only
def test_a_group_of_one_rank_does_not_communicate(ranks_of):
    ranks_of(2).run(group_of_one)


# What one rank does wrong at a layer's first call, and what the rank itself and the others must say.
def wrong_rank(rank, world_size, fault):
    use("native")
    problem = draw((4, 2), 32, 48)
    x, dtype, activation = problem.x, torch.float32, "gelu"
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    if rank == 1:
        if fault == "hidden size":
            x = x[..., :31]
        elif fault == "tokens":
            x = x[:3]
        elif fault == "dtype":
            x, w1, b1, w2, b2 = (t.double() for t in (x, w1, b1, w2, b2))
        elif fault == "activation":
            activation = "relu"
        elif fault == "unknown activation":
            activation = "tanh"
        elif fault == "no bias":
            b2 = None
        elif fault == "shard of another size":
            w1, b1, w2 = w1[:12], b1[:12], w2[:, :12]
    group = dist.new_group(list(range(world_size)))
    fused = fault == "main_grad after an evaluation"
    if "after an evaluation" in fault:
        tp.ffn(x, w1, w2, b1, b2, tp_group=group)
        x, w1, w2 = (t.clone().requires_grad_() for t in (x, w1, w2))
        w1.main_grad, w2.main_grad = torch.zeros_like(w1), None if rank == 1 else torch.zeros_like(w2)
        x = x[..., :31] if rank == 1 and not fused else x
    options = {"activation": activation, "gradient_accumulation_fusion": fused}
    tp.ffn(x.to(dtype) if fault != "dtype" else x, w1, w2, b1, b2, tp_group=group, **options)


FAULTS = [
    ("hidden size", r"x must be \[..., H=32\].*x \[4, 2, 31\]", r"rank 1 rejected: x must be \[..., H=32\]"),
    ("unknown activation", "activation 'tanh' is not one of", "rank 1 rejected: activation 'tanh'"),
    ("tokens", r"disagree:\n  rank 0: x \[4, 2, 32\].*\n  rank 1: x \[3, 2, 32\]", None),
    ("dtype", r"rank 0: .*torch.float32.*\n  rank 1: .*torch.float64", None),
    ("activation", r"rank 0: .*, gelu,.*\n  rank 1: .*, relu,", None),
    ("no bias", r"rank 0: .*, b2,.*\n  rank 1: .*, no b2,", None),
    ("x after an evaluation", r"x must be", "rank 1 rejected: x must be"),
    ("main_grad after an evaluation", r"needs w2.main_grad", "rank 1 rejected: gradient_accumulation_fusion needs w2"),
    ("shard of another size", r"rank 0: .*w1 \[24, 32\].*\n  rank 1: .*w1 \[12, 32\]", None),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("fault", "own", "others"), FAULTS, ids=[f[0] for f in FAULTS])
def test_one_wrong_rank_leaves_nobody_hanging(fault, own, others, ranks_of):
    outcomes = ranks_of(2).outcomes(wrong_rank, fault, timeout=30)
    for rank, (ok, error) in enumerate(outcomes):
        assert not ok, f"rank {rank} did not notice"
        kind, message, _ = error
        expected = own if rank == 1 or others is None else others
        assert kind in ("ValueError", "TypeError")
        assert re.search(expected, message), message


def wrong_twice_and_later(rank, world_size):
    """Two failed first calls, a good one, then a first call with another layer that is wrong on rank 1 again, and the
    good one again."""
    use("native")
    group = dist.new_group(list(range(world_size)))
    seen = []
    for hidden_size, wrong in ((32, True), (32, True), (32, False), (16, True), (32, False)):
        problem = draw((4,), hidden_size, 48)
        w1, b1, w2, b2 = shards(problem, rank, world_size)
        x = problem.x[..., 1:] if wrong and rank == 1 else problem.x
        try:
            tp.ffn(x, w1, w2, b1, b2, tp_group=group)
            seen.append("computed")
        except ValueError as error:
            seen.append("itself" if str(error).startswith("x must be") else str(error).split(" rank")[0])
    return seen


@pytest.mark.cpu_only
def test_a_wrong_rank_is_noticed_again_and_for_every_layer(ranks_of):
    good, wrong = ranks_of(2).run(wrong_twice_and_later, timeout=30)
    assert good == ["another", "another", "computed", "another", "computed"]
    assert wrong == ["itself", "itself", "computed", "itself", "computed"]


def wrong_while_compiling(rank, world_size):
    """A compiled call compares nothing, so a rank that rejects its arguments must not send either."""
    use("native")
    sent = []
    originals = functional.reject, torch.compiler.is_compiling
    functional.reject, torch.compiler.is_compiling = lambda *args: sent.append(args), lambda: True
    try:
        problem = draw((4,), 32, 48)
        w1, b1, w2, b2 = shards(problem, rank, world_size)
        with pytest.raises(ValueError, match="x must be"):
            tp.ffn(problem.x[..., 1:], w1, w2, b1, b2, tp_group=dist.group.WORLD)
    finally:
        functional.reject, torch.compiler.is_compiling = originals
    assert not sent


@pytest.mark.cpu_only
def test_a_compiled_call_with_wrong_arguments_sends_nothing(ranks_of):
    ranks_of(2).run(wrong_while_compiling)


def sub_mesh_and_copies(rank, world_size):
    """mesh["tp"] of a 2 × 2 mesh; a deep copy shares the group; compiled equals eager."""
    use("native")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    layer = tp.TensorParallelFFN(16, 24, tp_group=mesh["tp"])
    torch.manual_seed(0)
    dense = tp.TensorParallelFFN(16, 24)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(rank // 2))
    torch.testing.assert_close(layer(x), dense(x))
    twin = copy.deepcopy(layer)
    assert twin.tp_group is layer.tp_group
    assert twin.linear_fc1.weight is not layer.linear_fc1.weight
    assert torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with pytest.raises(ValueError, match="not contiguous"):
        collectives.start_all_reduce(torch.ones(4, 4).t()[1:], layer.tp_group)


@pytest.mark.cpu_only
def test_sub_mesh_deep_copy_and_compile(ranks_of):
    ranks_of(4).run(sub_mesh_and_copies)


def regions_sum(rank, world_size):
    """Both regions sum over ranks, also what is not contiguous; only consume=True writes into what it was given."""
    group = dist.group.WORLD
    mine = torch.arange(6.0).view(2, 3) * (rank + 1)
    total = torch.arange(6.0).view(2, 3) * sum(range(1, world_size + 1))
    for consume in (False, True):
        for make in (torch.clone, lambda t: t.t().contiguous().t()):
            partial, dx = make(mine), make(mine)
            assert torch.equal(regions.reduce_from_tp_region(partial, group, consume=consume), total)
            x = torch.zeros(2, 3, requires_grad=True)
            regions.copy_to_tp_region(x, group, consume=consume).backward(dx)
            assert torch.equal(x.grad, total)
            written = total if consume and mine.stride() == partial.stride() else mine
            assert torch.equal(partial, written)
            assert torch.equal(dx, written)


@pytest.mark.cpu_only
def test_regions_sum_and_spare_what_they_were_given_unless_told(ranks_of):
    ranks_of(2).run(regions_sum)


def wrong_groups(rank, world_size):
    use("native")
    pair = dist.new_group([0, 1])
    mesh_of_two = DeviceMesh("cpu", [0, 1])
    with pytest.raises(ValueError, match="not divisible by the tensor-parallel world_size 4"):
        tp.TensorParallelFFN(8, 18, tp_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="must be a 1-D DeviceMesh, got 2 dims"):
        tp.TensorParallelFFN(8, 16, tp_group=init_device_mesh("cpu", (2, 2)))
    if rank > 1:
        with pytest.raises(ValueError, match=rf"does not contain this process \(global rank {rank}\)"):
            tp.TensorParallelFFN(8, 16, tp_group=pair)
        with pytest.raises(ValueError, match=rf"does not contain this process \(global rank {rank}\)"):
            tp.TensorParallelFFN(8, 16, tp_group=mesh_of_two)
    smaller = tp.TensorParallelFFN(8, 16, tp_group=pair if rank < 2 else None)
    with pytest.raises(RuntimeError, match=r"size mismatch for linear_fc1\.weight"):
        tp.TensorParallelFFN(8, 16, tp_group=dist.group.WORLD).load_state_dict(smaller.state_dict())


@pytest.mark.cpu_only
def test_groups_that_do_not_fit(ranks_of):
    ranks_of(4).run(wrong_groups)
