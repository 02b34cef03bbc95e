"""Train a small GPT of Megatron-Core twice, step by step: with Megatron's MLP, and with FusedMLP in its place.

    pip install 'tpffn-triton[megatron]'
    torchrun --nproc-per-node 4 examples/train_gpt_megatron.py --tp 2 --sequence-parallel

Over NCCL if the machine has GPUs, else over gloo. What is compared, and where it goes:

    torchrun --nproc-per-node 4 examples/train_gpt_megatron.py --tp 4 --activation swiglu --json out.json --plot out.png
    torchrun --nproc-per-node 8 examples/train_gpt_megatron.py --tp 8 --bf16 --hidden 4096 --ffn 16384 --heads 32 \\
        --seq 2048 --batch 4 --steps 50 --lr 1e-4

Both models begin with the same weights and see the same bytes of text. Each step is taken with one and then with the
other, in turns, so that whatever slows the machine down slows both. Printed are the losses, their difference, and the
median time of a step since the line before.

    data parallelism over the ranks that --tp leaves, with gradients reduced behind backward, and the distributed
    optimizer, which gathers parameters behind forward

--recompute mlp     FusedMLP is computed again in backward; Megatron's MLP is not, since it recurses for ever then
--recompute full    whole layers, of both
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import loss_report
import megatron_without_gpu
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tpffn_triton import reference

ROOT = Path(__file__).resolve().parents[1]
TEXT = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
TITLES = {"megatron": "Megatron's MLP", "fused": "FusedMLP"}
# activation_func, gated_linear_unit, bias_activation_fusion, with which Megatron's gelu is the tanh approximation.
ACTIVATIONS: dict[str, tuple[Any, bool, bool]] = {
    "gelu": (F.gelu, False, False),
    "gelu_tanh": (F.gelu, False, True),
    "silu": (F.silu, False, False),
    "relu": (F.relu, False, False),
    "relu2": (reference.ACTIVATIONS["relu2"], False, False),
    "geglu": (F.gelu, True, False),
    "geglu_tanh": (F.gelu, True, True),
    "swiglu": (F.silu, True, True),
}


def batch(args: argparse.Namespace, text: Tensor, step: int, replica: int, replicas: int) -> Tensor:
    """Return this replica's part [B / dp, S + 1] of a step's bytes; the whole is the same at every dp and tp."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.seq, (args.batch,), generator=generator)
    mine = starts.chunk(replicas)[replica]
    return text[mine[:, None] + torch.arange(args.seq + 1)]


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Take the steps, and report each one's losses before its update, over all replicas, and its times in ms."""
    from gpt_from_megatron import Trainer, parallel_state

    names = [name for name in TITLES if args.mlp in (name, "both")]
    trainers = {name: Trainer(args, name == "fused", device) for name in names}
    text = torch.frombuffer(bytearray(args.bytes), dtype=torch.uint8).long()
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows: list[dict[str, float]] = []
    shown = 0
    show(loss_report.header(names))
    for step in range(args.steps):
        tokens = batch(args, text, step, replica, replicas).to(device)
        row: dict[str, float] = {"step": step}
        for name in names if step % 2 == 0 else reversed(names):
            before = now(device)
            loss = trainers[name].step(tokens)
            row[f"ms_{name}"] = 1e3 * (now(device) - before)
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
            row[f"loss_{name}"] = loss.item() / replicas
        if len(names) == 2:
            row["difference"] = abs(row["loss_fused"] - row["loss_megatron"])
        rows.append(row)
        if step % args.log_every == 0 or step == args.steps - 1:
            show(loss_report.line(rows[shown:], names))
            shown = len(rows)
    report(args, rows, {name: trainers[name].mlp.__name__ for name in names}, device)


def now(device: torch.device) -> float:
    """Return the time in seconds at which everything launched so far has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(
    args: argparse.Namespace, rows: list[dict[str, float]], classes: dict[str, str], device: torch.device
) -> None:
    """Print the summary, and write the files that were asked for."""
    names = list(classes)
    found = loss_report.summary(rows, names)
    times = ", ".join(f"{TITLES[name]} {found[f'ms_{name}']:.1f} ms" for name in names)
    show(f"\nmedian step: {times}")
    if len(names) == 2:
        show(f"largest difference of the losses: {found['largest_difference']:.1e}")
    if dist.get_rank():
        return
    about: dict[str, Any] = loss_report.environment(device)
    about |= {"ranks": dist.get_world_size(), "tp": args.tp, "collectives": dist.get_backend()}
    about |= {"mlp": classes, "distributed_optimizer": args.distributed_optimizer}
    about |= {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    about |= {"text_bytes": len(args.bytes), "text_sha256": hashlib.sha256(args.bytes).hexdigest()}
    if args.json:
        args.json.write_text(json.dumps({"about": about, "summary": found, "steps": rows}, indent=1) + "\n")
    if args.plot:
        dtype = "bf16" if args.bf16 else "fp32"
        model = f"{args.layers} layers, H={args.hidden}, F={args.ffn}, {args.activation}, {dtype}"
        where = f"{about['ranks']} ranks, TP={args.tp}{' with sequence parallelism' * args.sequence_parallel}"
        title = f"GPT of megatron-core {about['megatron-core']}: {model}\n{where}, {about['collectives']}"
        title += f", {about['device']}"
        loss_report.plot(rows, {name: TITLES[name] for name in names}, title, args.plot, unit="nats a byte")


def show(text: str) -> None:
    """Print the table, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def say(text: str) -> None:
    """Print what is not the table on stderr, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def is_installed(name: str) -> bool:
    """Say whether a module is there, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def parse_arguments() -> argparse.Namespace:
    """Read the command line and check it against torchrun's number of processes."""
    description, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag: Any = argparse.BooleanOptionalAction
    parser.add_argument("--mlp", choices=["both", *TITLES], default="both", help="(default both)")
    parser.add_argument("--tp", type=int, default=1, metavar="P", help="ranks per tensor-parallel group (default 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="norms and residuals on slices of the tokens")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="(default gelu, which is erf)")
    parser.add_argument("--layers", type=int, default=2, help="(default 2)")
    parser.add_argument("--hidden", type=int, default=64, metavar="H", help="features of a token (default 64)")
    parser.add_argument("--ffn", type=int, default=256, metavar="F", help="features inside an MLP (default 256)")
    parser.add_argument("--heads", type=int, default=4, help="of attention (default 4)")
    parser.add_argument("--seq", type=int, default=64, metavar="S", help="bytes in a sequence (default 64)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a global batch (default 16)")
    parser.add_argument("--steps", type=int, default=120, help="(default 120)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of Adam (default 3e-3)")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bf16, gradients summed in fp32")
    parser.add_argument(
        "--distributed-optimizer", action=flag, help="cut the optimizer over the replicas (default: where it works)"
    )
    parser.add_argument("--recompute", choices=["mlp", "full"], help="in backward (default: nothing)")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXT, metavar="FILE", help="(default: this project's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="(default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step and the environment there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses there; needs matplotlib")
    args = parser.parse_args()
    args.activation_options = ACTIVATIONS[args.activation]
    if not is_installed("megatron.core"):
        parser.exit(2, "this example needs megatron-core: pip install 'tpffn-triton[megatron]'\n")
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: the docstring above has the commands (--help shows it)")
    for name in ("tp", "layers", "hidden", "ffn", "heads", "seq", "batch", "steps", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % args.tp:
        parser.error(f"--tp {args.tp} does not divide the {world_size} processes")
    for name in ("ffn", "heads", *(["seq"] if args.sequence_parallel else [])):
        if getattr(args, name) % args.tp:
            parser.error(f"--tp {args.tp} does not divide --{name} {getattr(args, name)}")
    if 256 % args.tp:
        parser.error(f"--tp {args.tp} does not divide the vocabulary of 256 bytes")
    if args.hidden % args.heads:
        parser.error(f"--heads {args.heads} does not divide --hidden {args.hidden}")
    if args.batch % (world_size // args.tp):
        parser.error(f"--batch {args.batch} is not divisible by the {world_size // args.tp} data-parallel replicas")
    if args.recompute == "mlp" and args.mlp == "megatron":
        parser.error("--recompute mlp: Megatron's own MLP recurses for ever with it; --recompute full works")
    if args.plot and not is_installed("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        args.bytes = b"".join(path.read_bytes() for path in args.text)
    except OSError as error:
        parser.error(f"--text: {error}")
    if len(args.bytes) <= args.seq:
        parser.error(f"--text has {len(args.bytes)} bytes, --seq {args.seq} needs one more than that")
    return args


def main() -> None:
    """Train both, then write what was asked for."""
    args = parse_arguments()
    # Theirs, once a rank, of functions deprecated in torch and of APEX.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed|megatron_without_gpu")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap relies on the order of launches
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        megatron_without_gpu.run_on_cpu()
    import gpt_from_megatron

    version, works = gpt_from_megatron.VERSION, gpt_from_megatron.distributed_optimizer_works()
    if args.distributed_optimizer and not works:
        print(f"--distributed-optimizer: megatron-core {version}'s needs Transformer Engine", file=sys.stderr)
        sys.exit(2)
    if args.distributed_optimizer is None:
        args.distributed_optimizer = works
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    gpt_from_megatron.start_parallelism(args)
    replicas = dist.get_world_size() // args.tp
    optimizer = "distributed optimizer" if args.distributed_optimizer else "whole optimizer on every replica"
    say(f"{replicas} × {args.tp} ranks (dp, tp), {dist.get_backend()}, megatron-core {version}, {optimizer}")
    if args.recompute == "mlp" and args.mlp == "both":
        say("--recompute mlp is for FusedMLP alone: with it Megatron's own MLP recurses for ever")
    train(args, device)
    gpt_from_megatron.parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
    # Outside of main, whose models hold the groups: gloo's threads end with their group, and one that outlives the
    # interpreter may abort the process.
    dist.destroy_process_group()
