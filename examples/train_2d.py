"""Train a small model over several machines: tensor parallelism inside a node, data parallelism across nodes.

Two machines with 8 GPUs each, the same command on both; HOST is one of the two:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_2d.py --tp 8

One machine, 4 processes, over NCCL if it has GPUs, else over gloo:

    torchrun --standalone --nproc-per-node 4 examples/train_2d.py --tp 2 --data-parallel fsdp2

Ranks form a mesh (dp, tp). torchrun numbers the ranks of a node consecutively and tp is the inner dim, so where tp
divides the processes per node, a tp group stays inside one: it all-reduces activations in every layer, forward and
backward; dp communicates weights and gradients only.

    x                           [B / dp, H]      this replica's tokens, the same on every rank of a tp group
    linear_fc1, linear_fc2      F / tp features  one shard per tp rank; see tpffn_triton.TensorParallelFFN
    norms, head, linear_fc2.bias                 replicated over tp: equal inputs give equal gradients, bit for bit

With --sequence-parallel the blocks work on slices of the tokens, [B / dp / tp, H]: an all-gather and a reduce-scatter
take each all-reduce's place, and norms and linear_fc2.bias see one slice, so their gradients are summed over tp.

ddp     each rank keeps its tp shards whole; gradients are averaged over dp
fsdp2   each rank keeps 1/dp of its tp shards (DTensors over dp); they are gathered around the forward and the backward
        of a block, and gradients are averaged and scattered. Shard blocks, not linear_fc1 and linear_fc2 themselves:
        those only hand out their weights, and FSDP would take them back before the FFN has used them.

torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without it, restarts mostly hang.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import tpffn_triton as tp
from tpffn_triton.regions import gather_from_sp_region, scatter_to_sp_region
from tpffn_triton.sharding import unshard_ffn

FFN_PARAMETERS = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")


class Block(nn.Module):
    """x + FFN(LayerNorm(x)), the residual block of a pre-norm transformer without its attention; x, y [..., H]."""

    def __init__(self, args: argparse.Namespace, tp_mesh: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(args.hidden, device=device)
        self.ffn = tp.TensorParallelFFN(
            args.hidden,
            args.ffn,
            activation=args.activation,
            tp_group=tp_mesh,
            sequence_parallel=args.sequence_parallel,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., H]."""
        return x + self.ffn(self.norm(x))


class Region(nn.Module):
    """Enter or leave the part of the model that works on slices."""

    def __init__(self, function: Callable[..., Tensor], **arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor) -> Tensor:
        """Return the slice of x, or what the slices x join to."""
        return self.function(x, **self.arguments)


def build_model(args: argparse.Namespace, tp_mesh: DeviceMesh, device: torch.device) -> nn.Sequential:
    """Build blocks, final norm and head. The seed is the same on every rank: so are the full weights, at every tp."""
    torch.manual_seed(args.seed)
    layers: dict[str, nn.Module] = {f"block{i}": Block(args, tp_mesh, device) for i in range(args.layers)}
    if args.sequence_parallel:
        group = tp_mesh.get_group()
        enter = Region(scatter_to_sp_region, group=group)
        # What follows is replicated: every rank has the whole gradient, and keeps its slice.
        layers = {"enter": enter, **layers, "leave": Region(gather_from_sp_region, group=group, reduce_grad=False)}
    layers["norm"] = nn.LayerNorm(args.hidden, device=device)
    layers["head"] = nn.Linear(args.hidden, args.hidden, device=device)
    return nn.Sequential(OrderedDict(layers))


def mark_norms_on_slices(model: nn.Sequential) -> None:
    """Let reduce_replicated_grads find them. After FSDP2, which makes new parameters."""
    for block in model:
        if isinstance(block, Block):
            parameters: Any = block.norm.parameters()
            for parameter in parameters:
                parameter.sequence_parallel = True


def parallelize(model: nn.Sequential, args: argparse.Namespace, dp_mesh: DeviceMesh) -> nn.Module:
    """Make backward average gradients over dp: wraps the model (ddp) or changes it in place (fsdp2)."""
    if args.data_parallel == "ddp":
        return DistributedDataParallel(model, process_group=dp_mesh.get_group())
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if args.bf16 else MixedPrecisionPolicy()
    for block in model:
        if isinstance(block, Block):
            fully_shard(block, mesh=dp_mesh, mp_policy=policy)
    fully_shard(model, mesh=dp_mesh, mp_policy=policy)
    return model


def batches(args: argparse.Namespace, dp_mesh: DeviceMesh) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this replica's (x, target), both [B/dp, H], for ever; global batches are the same at every dp and tp.

    The task is target_i = |x_i| − x_(i−1); a linear map cannot get below a loss of 1 − 2/π = 0.36. Sampling goes by the
    rank in dp, not the global one: the ranks of a tp group compute one result together and must see the same tokens.
    """
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randn(8 * args.batch, args.hidden, generator=generator)
    data = TensorDataset(x, x.abs() - x.roll(1, 1))
    sampler: DistributedSampler = DistributedSampler(data, dp_mesh.size(), dp_mesh.get_local_rank(), seed=args.seed)
    loader = DataLoader(data, args.batch // dp_mesh.size(), sampler=sampler)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def train(args: argparse.Namespace, model: nn.Module, mesh: DeviceMesh, device: torch.device) -> list[dict]:
    """Run the steps; returns [{"step", "loss"}], the loss of the global batch before that step's update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    log = []
    for step, batch in enumerate(itertools.islice(batches(args, mesh["dp"]), args.steps)):
        x, target = (t.to(device) for t in batch)
        autocast = args.bf16 and args.data_parallel == "ddp"  # FSDP2 casts by its own policy
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            y = model(x)
        loss = nn.functional.mse_loss(y.float(), target)
        loss.backward()
        if args.sequence_parallel:
            tp.reduce_replicated_grads(model, mesh["tp"])
        optimizer.step()
        optimizer.zero_grad()
        if step % args.log_every == 0 or step == args.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=mesh["dp"].get_group())
            log.append({"step": step, "loss": mean.item() / mesh["dp"].size()})
            say(f"step {step:4d}  loss {log[-1]['loss']:.6f}")
    return log


@torch.no_grad()
def full_weights(model: nn.Module, tp_mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the full weights by name, on every rank: gathered over dp by DTensor (fsdp2), then over tp.

    Raises: ValueError: a replicated linear_fc2.bias that differs inside the tp group.
    """
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p.detach()) for name, p in model.named_parameters()
    }
    for name, module in model.named_modules():
        if isinstance(module, tp.TensorParallelFFN):
            names = [f"{name}.{parameter}" for parameter in FFN_PARAMETERS]
            w1s, b1s, w2s, b2s = (gather(weights[n], tp_mesh) for n in names)
            shards = list(zip(w1s, b1s, w2s, b2s, strict=True))
            for full_name, full in zip(names, unshard_ffn(shards, activation=module.activation), strict=True):
                assert full is not None  # the layers have biases
                weights[full_name] = full
    return {name: weight.cpu() for name, weight in weights.items()}


def gather(t: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """Return every rank's t, which has one shape over the mesh."""
    everywhere = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(everywhere, t.contiguous(), group=mesh.get_group())
    return everywhere


def describe_ranks(weights: dict[str, Tensor], mesh: DeviceMesh, device: torch.device) -> list[dict]:
    """Return each rank's node, place in the mesh, and SHA-256 of its full weights: equal where replicas are."""
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in weights.values())).digest()
    node = int(os.environ.get("GROUP_RANK", 0))  # as torchrun numbers them
    mine = torch.tensor([node, *(mesh.get_local_rank(dim) for dim in ("dp", "tp")), *digest], device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [
        {"rank": rank, "node": node, "dp": dp, "tp": tp_rank, "sha256": bytes(sha).hex()}
        for rank, (node, dp, tp_rank, *sha) in enumerate(row.tolist() for row in rows)
    ]


def placement_warning(tp_size: int, local_world_size: int) -> str | None:
    """Say so if tp groups, runs of tp_size consecutive ranks, cross nodes of local_world_size ranks."""
    if local_world_size % tp_size == 0:
        return None
    return (
        f"warning: --tp {tp_size} does not divide the {local_world_size} processes of a node: tensor-parallel groups "
        "cross nodes, and every layer's all-reduces go over the network between them"
    )


def say(text: str) -> None:
    """Print progress on stderr, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line and check it against torchrun's number of processes."""
    description, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-parallel", choices=["ddp", "fsdp2"], default="ddp", help="(default ddp)")
    parser.add_argument("--tp", type=int, default=1, metavar="P", help="ranks per tensor-parallel group (default 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="blocks on slices of the tokens")
    parser.add_argument("--steps", type=int, default=200, help="(default 200)")
    parser.add_argument("--batch", type=int, default=512, help="tokens in a global batch, over all of dp (default 512)")
    parser.add_argument("--hidden", type=int, default=64, metavar="H", help="features of a token (default 64)")
    parser.add_argument("--ffn", type=int, default=256, metavar="F", help="features inside an FFN (default 256)")
    parser.add_argument("--layers", type=int, default=2, help="(default 2)")
    parser.add_argument("--activation", default="gelu", help="see tpffn_triton.ffn (default gelu)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights and optimizer stay fp32")
    parser.add_argument("--lr", type=float, default=1.0, help="of SGD with momentum 0.9 (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write losses and ranks there")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the full weights there, for torch.load")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: the docstring above has the commands (--help shows it)")
    for name in ("tp", "steps", "batch", "hidden", "ffn", "layers", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % args.tp:
        parser.error(f"--tp {args.tp} does not divide the {world_size} processes")
    if args.ffn % args.tp:
        parser.error(f"--tp {args.tp} does not divide --ffn {args.ffn}")
    if args.batch % (world_size // args.tp):
        parser.error(f"--batch {args.batch} is not divisible by the {world_size // args.tp} data-parallel replicas")
    if args.sequence_parallel and args.batch % world_size:
        parser.error(f"--sequence-parallel cuts --batch {args.batch} into {world_size} equal parts")
    return args


def main() -> None:
    """Train, then write what was asked for."""
    args = parse_arguments()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    world_size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size // args.tp, args.tp), mesh_dim_names=("dp", "tp"))
    say(f"{world_size // args.tp} × {args.tp} mesh (dp, tp), {args.data_parallel}, {tp.backend(device)}")
    if warning := placement_warning(args.tp, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))):
        say(warning)

    model = build_model(args, mesh["tp"], device)
    parallel = parallelize(model, args, mesh["dp"])
    if args.sequence_parallel:
        mark_norms_on_slices(model)
    log = train(args, parallel, mesh, device)
    weights = full_weights(model, mesh["tp"])
    ranks = describe_ranks(weights, mesh, device)
    if dist.get_rank() == 0:
        if args.save:
            torch.save(weights, args.save)
        if args.json:
            args.json.write_text(json.dumps({"losses": log, "ranks": ranks}, indent=1))
    say(f"replicas hold {'the same bits' if len({r['sha256'] for r in ranks}) == 1 else 'DIFFERENT weights'}")


if __name__ == "__main__":
    main()
    # Outside of main, whose model holds the groups: gloo's threads end with their group, and one that outlives the
    # interpreter may abort the process.
    dist.destroy_process_group()
