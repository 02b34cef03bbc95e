"""Data parallelism around the sharded FFN: four ranks as a 2 × 2 mesh (dp, tp), under DDP and FSDP2.

Each dp replica sees half of the tokens; gradients are the mean over the replicas of the unsharded reference's.
"""

import pytest
import torch
import torch.distributed as dist
from acceptance import assert_accurate
from ffn_cases import NAMES, draw, eager, exact
from rank_pool import use
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tpffn_triton as tp

pytestmark = pytest.mark.cpu_only
PARAMETERS = ("linear_fc1.weight", "linear_fc2.weight", "linear_fc1.bias", "linear_fc2.bias")  # as NAMES[2:]


def make_mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def make_layer(problem, mesh):
    """Return the problem's layer, sharded over tp."""
    fc1, fc2 = (nn.Linear(w.shape[1], w.shape[0]) for w in (problem.w1, problem.w2))
    for linear, weight, bias in ((fc1, problem.w1, problem.b1), (fc2, problem.w2, problem.b2)):
        linear.load_state_dict({"weight": weight, "bias": bias})
    return tp.TensorParallelFFN.from_dense(fc1, fc2, activation=problem.activation, tp_group=mesh["tp"])


def halved(problem, mesh):
    """Return the problem with this replica's half of the tokens."""
    rows = slice(mesh["dp"].get_local_rank(), None, 2)
    x, dy = problem.x[rows], problem.dy[rows]
    return type(problem)(x, dy, *problem.leaves()[1:], problem.activation)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients_are_the_mean(rank, world_size, implementation, activation, data_parallel):
    use(implementation)
    mesh = make_mesh()
    problem = draw((18,), 32, 48, activation=activation)
    half, tp_rank = halved(problem, mesh), mesh["tp"].get_local_rank()
    layer = make_layer(problem, mesh)
    dtype = torch.float32
    if data_parallel == "ddp":
        model = DistributedDataParallel(layer, process_group=mesh["dp"].get_group())
    elif data_parallel == "fsdp2":
        model = fully_shard(layer, mesh=mesh["dp"])
    else:
        dtype = torch.bfloat16
        model = fully_shard(layer, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    y = model(half.x)
    assert y.dtype == dtype
    y.backward(half.dy.to(dtype))

    in_dtype = [t.to(dtype) for t in (half.x, half.dy, half.w1, half.w2, half.b1, half.b2)]
    separate = eager(type(half)(*in_dtype, activation), tp_rank, 2, mesh["tp"].get_group())[2:]
    problem.dy /= 2
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    for name, ours_name, reference, right in zip(
        NAMES[2:], PARAMETERS, separate, exact(problem, tp_rank, 2)[2:], strict=True
    ):
        mean = reference.float()
        dist.all_reduce(mean, group=mesh["dp"].get_group())
        # As in ffn_cases: the interpreter adds the rows of a tile one after the other.
        noise = 2 * right.abs() if name == "db1" else None
        assert_accurate(name, whole(gradients[ours_name]), mean / 2, right, noise)
    return whole(gradients["linear_fc2.bias"])


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2", "fsdp2 bf16"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("implementation", ["triton", "native"])
def test_gradients_are_the_mean_over_the_full_batch(implementation, activation, data_parallel, ranks_of):
    """And that of the bias that tp replicates has the same bits on all four ranks."""
    db2 = ranks_of(4).run(gradients_are_the_mean, implementation, activation, data_parallel)
    assert all(torch.equal(db2[0], other) for other in db2)


def state_dict_comes_back(rank, world_size):
    use("native")
    mesh = make_mesh()
    problem = draw((6,), 32, 48)
    plain, sharded = make_layer(problem, mesh), fully_shard(make_layer(problem, mesh), mesh=mesh["dp"])
    state = sharded.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, t in plain.state_dict().items():
        assert state[name].to_local().numel() == t.numel() // 2, f"{name} is not shared out over dp"
        assert torch.equal(whole(state[name]), t), name
    saved = {name: t.clone() for name, t in state.items()}
    with torch.no_grad():
        for p in sharded.parameters():
            p.zero_()
    sharded.load_state_dict(saved)
    assert torch.equal(sharded(problem.x), plain(problem.x))


def test_fsdp2_state_dict_has_the_plain_names_and_values(ranks_of):
    ranks_of(4).run(state_dict_comes_back)


def linears_sharded_alone(rank, world_size, reshard_after_forward):
    use("triton")  # whose launch would be handed a null pointer
    mesh = make_mesh()
    problem = draw((6,), 32, 48)
    layer = make_layer(problem, mesh)
    right = layer(problem.x).detach()
    for linear in (layer.linear_fc1, layer.linear_fc2):
        fully_shard(linear, mesh=mesh["dp"], reshard_after_forward=reshard_after_forward)
    return torch.equal(layer(problem.x), right)


def test_fsdp2_of_the_linears_alone_is_refused_where_it_frees_their_weights(ranks_of):
    for ok, error in ranks_of(4).outcomes(linears_sharded_alone, True):
        assert not ok
        assert error[0] == "ValueError", error[2]
        assert error[1].startswith("the memory of linear_fc1.weight [24, 32] was freed before its use: apply FSDP to ")
    assert ranks_of(4).run(linears_sharded_alone, False) == [True] * 4
