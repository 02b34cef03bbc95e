"""What ranks do with FusedFFNParallel, as functions for rank_pool.py: four ranks as a mesh (dp, tp)."""

import copy

import pytest
import torch
from ffn_cases import assert_all_accurate, draw, eager, exact
from mlp_modules import as_module, build, names_of
from rank_pool import use
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from tpffn_triton.parallel_style import FusedFFNParallel
from tpffn_triton.reference import ACTIVATIONS

LEAD, H, FFN = (4, 6), 32, 48
_meshes: dict = {}


def mesh_of(tp, device_type="cpu"):
    """Return the mesh (dp, tp) of all ranks; one a layout, for groups made anew each time would pile up."""
    world_size = torch.distributed.get_world_size()
    if (tp, device_type) not in _meshes:
        _meshes[tp, device_type] = init_device_mesh(device_type, (world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    return _meshes[tp, device_type]


def stock(mlp):
    """Return torch's own plan for an MLP."""
    fc1, (fc2,) = names_of(mlp)["w1"], names_of(mlp)["w2"]
    return {name.removesuffix(".weight"): ColwiseParallel() for name in fc1} | {
        fc2.removesuffix(".weight"): RowwiseParallel()
    }


def equals_reference(rank, world_size, implementation, tp, activation, dtype, layout, conv1d=False, device="cpu"):
    """Apply the acceptance rules to y, dx and every gradient; layout: of x and y, "replicate", or the dim cut."""
    use(implementation)
    mesh = mesh_of(tp, device)["tp"]
    place, group = mesh.get_local_rank(), mesh.get_group() if tp > 1 else None
    device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    problem = draw(LEAD, H, FFN, activation=activation, dtype=dtype, device=device)
    mlp = as_module(problem, conv1d)
    names = names_of(mlp)  # by the class that it has before
    placement = Replicate() if layout == "replicate" else Shard(layout)
    parallelize_module(mlp, mesh, FusedFFNParallel(input_layouts=placement))
    x, dy = (distribute_tensor(t, mesh, [placement]).to_local() for t in (problem.x, problem.dy))
    x.requires_grad_()
    y = mlp(x)
    y.backward(dy)

    y, dx = (DTensor.from_local(t, mesh, [placement], run_check=False).full_tensor() for t in (y.detach(), x.grad))
    found = [
        torch.cat([mlp.get_parameter(name).grad.to_local() for name in names[ours]])
        for ours in ("w1", "w2", "b1", "b2")
    ]
    found = [t.t() if conv1d and t.dim() == 2 else t for t in found]
    assert_all_accurate((y, dx, *found), eager(problem, place, tp, group), exact(problem, place, tp))


def placements_are_stock(rank, world_size, tp, activation):
    """Names, placements, shapes and bits of the parameters are those of ColwiseParallel and RowwiseParallel."""
    use("native")
    mesh = mesh_of(tp)["tp"]
    ours = as_module(draw(LEAD, H, FFN, activation=activation))
    if rank % tp:
        with torch.no_grad():  # rank 0's values count
            for parameter in ours.parameters():
                parameter.zero_()
    theirs = copy.deepcopy(ours)
    parallelize_module(theirs, mesh, stock(theirs))
    parallelize_module(ours, mesh, FusedFFNParallel())
    theirs = dict(theirs.named_parameters())
    assert list(theirs) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert parameter.placements == theirs[name].placements, name
        assert parameter.shape == theirs[name].shape, name
        assert torch.equal(parameter.to_local(), theirs[name].to_local()), name


def hands_over_what_it_holds(rank, world_size, tp):
    """Gate and up go to the kernels as they lie in memory, also after to() and to_empty(), and in a deep copy; where
    they no longer do, they are copied."""
    use("native")
    mesh = mesh_of(tp)["tp"]
    problem = draw(LEAD, H, FFN, activation="swiglu")
    mlp = as_module(problem)
    parallelize_module(mlp, mesh, FusedFFNParallel())
    right = mlp(problem.x)

    def adjacent(module):
        """Say whether a call returns the same, and copies no two weights together for it."""
        joined = []

        class Cats(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                joined.extend(t for t in args[0] if t.dim() == 2) if function is torch.ops.aten.cat.default else None
                return function(*args, **(kwargs or {}))

        with Cats():
            found = module(problem.x)
        assert torch.equal(found, right)
        return not joined

    assert adjacent(mlp)
    twin = copy.deepcopy(mlp)
    assert adjacent(twin)
    assert twin.gate_proj.weight is not mlp.gate_proj.weight
    assert adjacent(mlp.to(torch.float64).to(torch.float32))
    # Apart again: still right, by a copy.
    alone = mlp.up_proj.weight.to_local().detach().clone()
    mlp.up_proj.weight = nn.Parameter(DTensor.from_local(alone, mesh, [Shard(0)], run_check=False))
    assert not adjacent(mlp)
    with torch.device("meta"):
        empty = build(H, FFN, "swiglu")
    parallelize_module(empty, mesh, FusedFFNParallel())
    empty.to_empty(device="cpu")
    empty.load_state_dict(twin.state_dict())
    assert adjacent(empty)


def takes_dtensors(rank, world_size, tp):
    """x may be a DTensor of any placement, y is one on demand; their gradients too."""
    use("native")
    mesh = mesh_of(tp)["tp"]
    problem = draw(LEAD, H, FFN)
    mlp, plain = as_module(problem), as_module(problem)
    style = FusedFFNParallel(input_layouts=Shard(0), use_local_output=False)
    parallelize_module(mlp, mesh, style)
    x = distribute_tensor(problem.x, mesh, [Shard(1)]).requires_grad_()
    y = mlp(x)
    assert y.placements == (Shard(0),)
    y.redistribute(placements=[Replicate()]).to_local().backward(problem.dy)
    leaf = problem.x.clone().requires_grad_()
    right = plain(leaf)
    right.backward(problem.dy)
    torch.testing.assert_close(y.full_tensor(), right)
    torch.testing.assert_close(x.grad.full_tensor(), leaf.grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mlp.get_parameter(name).grad.full_tensor(), parameter.grad)


class Block(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(H), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def compiles_whole(rank, world_size, tp, activation, layout):
    """torch.compile(fullgraph=True) of a block: y and every gradient as in eager mode."""
    use("native")
    mesh = mesh_of(tp)["tp"]
    block = Block(as_module(draw(LEAD, H, FFN, activation=activation)))
    placement = Replicate() if layout == "replicate" else Shard(layout)
    parallelize_module(block, mesh, {"mlp": FusedFFNParallel(input_layouts=placement)})
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    x, dy = torch.randn(LEAD[0], 2, H), torch.randn(LEAD[0], 2, H)

    def results(module):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in block.parameters()]
        return y.detach(), leaf.grad, *(g.clone() for g in grads)

    for mine, right in zip(results(compiled), results(block), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def trains_as_dense(rank, world_size, activation, layout):
    """FSDP2 over dp around tensor parallelism, 2 × 2: the losses and the weights of one process, batch by batch."""
    use("native")
    mesh = mesh_of(2)
    problem = draw(LEAD, H, FFN, activation=activation)
    torch.manual_seed(5)
    blocks = nn.Sequential(*(Block(as_module(problem)) for _ in range(2)))
    dense = copy.deepcopy(blocks)
    placement = Replicate() if layout == "replicate" else Shard(layout)
    style = FusedFFNParallel(input_layouts=placement)
    parallelize_module(blocks, mesh["tp"], {"*.mlp": style})
    if layout != "replicate":
        # The norms before it work on whole tokens here: slices enter and leave at each MLP.
        for block in blocks:
            cut_tokens(block.mlp, mesh["tp"], placement)
    for block in blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(blocks, mesh=mesh["dp"])
    losses = []
    for model, own in ((blocks, slice(mesh["dp"].get_local_rank(), None, 2)), (dense, slice(None))):
        torch.manual_seed(6)
        optimizer, log = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(5):
            x, target = torch.randn(*LEAD, H), torch.randn(*LEAD, H)
            loss = (model(x[own]) - target[own]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            log.append(mean.item() / world_size)
        losses.append(log)
    for name, parameter in dense.named_parameters():
        whole = blocks.get_parameter(name)
        assert isinstance(whole, DTensor), name
        torch.testing.assert_close(whole.full_tensor(), parameter.detach(), rtol=2e-4, atol=2e-4)
    return losses


def cut_tokens(mlp, mesh, placement):
    """Have a sequence-parallel MLP take and return whole tensors."""

    def enter(_, inputs):
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False).redistribute(placements=[placement])

    def leave(_, inputs, y):
        return DTensor.from_local(y, mesh, [placement], run_check=False).full_tensor()

    mlp.register_forward_pre_hook(enter, prepend=True)
    mlp.register_forward_hook(leave)


def gradients_move_along(rank, world_size, tp):
    """to() takes a gradient with its parameter, also where that is laid beside another again."""
    use("native")
    problem = draw(LEAD, H, FFN, activation="swiglu")
    mlp = as_module(problem)
    parallelize_module(mlp, mesh_of(tp)["tp"], FusedFFNParallel())
    mlp(problem.x).backward(problem.dy)
    before = {name: parameter.grad.to_local().clone() for name, parameter in mlp.named_parameters()}
    parameters = list(mlp.parameters())
    mlp.to(torch.float64)
    assert all(parameter is known for parameter, known in zip(mlp.parameters(), parameters, strict=True))
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter.grad.to_local(), before[name].double()), name


def sizes_of_linears(rank, world_size, tp):
    mlp = parallelize_module(build(8, 24, "swiglu"), mesh_of(tp)["tp"], FusedFFNParallel())
    return [(each.in_features, each.out_features) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def one_rank_differs(rank, world_size, change):
    """Rank 1 has another MLP: another activation, one that is not known, no biases, another dtype."""
    mlp = build(H, FFN, "gelu")
    if rank == 1:
        if change in ACTIVATIONS:
            mlp.act = ACTIVATIONS[change]
        elif change == "selu":
            mlp.act = torch.nn.functional.selu
        elif change == "bias":
            mlp.fc2.bias = None
        else:
            mlp.bfloat16()
    before = dict(mlp.named_parameters())
    try:
        parallelize_module(mlp, mesh_of(4)["tp"], FusedFFNParallel())
    finally:
        assert all(parameter is before[name] for name, parameter in mlp.named_parameters())


def draws_anew(rank, world_size, tp):
    """reset_parameters as torch's recipe for the meta device calls it: of the full sizes, and nothing is left out."""
    for conv1d, activation in ((False, "gelu"), (True, "gelu"), (False, "swiglu")):
        with torch.device("meta"):
            mlp = build(H, FFN, activation, conv1d)
        fc1 = names_of(mlp)["w1"][0]
        parallelize_module(mlp, mesh_of(tp)["tp"], FusedFFNParallel())
        mlp.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in mlp.parameters():
                parameter.fill_(float("nan"))
        torch.manual_seed(0)
        for module in mlp.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert all(torch.isfinite(parameter.full_tensor()).all() for parameter in mlp.parameters())
        spread = mlp.get_parameter(fc1).full_tensor().std().item()
        assert spread == pytest.approx(0.02 if conv1d else (1 / 3 / H) ** 0.5, rel=0.1)


def goes_on_after_a_copy(rank, world_size, tp):
    """A copy has gradients too; x may be given by any name."""
    use("native")
    mesh = mesh_of(tp)["tp"]
    problem = draw(LEAD, H, FFN, activation="swiglu")
    mlp = as_module(problem)
    parallelize_module(mlp, mesh, FusedFFNParallel())
    y = mlp(hidden_states=problem.x)
    assert torch.equal(y, mlp(problem.x))
    y.backward(problem.dy)
    twin = copy.deepcopy(mlp)
    for name, parameter in mlp.named_parameters():
        other = twin.get_parameter(name)
        assert torch.equal(other.grad.to_local(), parameter.grad.to_local())
        assert other.grad.to_local().data_ptr() != parameter.grad.to_local().data_ptr()
    for inputs, named in (((), {}), ((problem.x, problem.x), {})):
        with pytest.raises(TypeError, match="takes one tensor x"):
            mlp(*inputs, **named)
