"""Train a character-level GPT dense and tensor-parallel, step by step: the same losses.

    pip install 'tpffn-triton[examples]'
    torchrun --nproc-per-node 4 examples/train_char_gpt.py --tp 2,4

Over NCCL if the machine has GPUs, else over gloo. The text is this project's documentation. Each model begins with the
same weights and sees the same text; each step is taken by all of them in turns. One rank computes the dense model by
itself, P ranks the one of --tp P; the ranks that P leaves do the same in groups of their own.

Tensor parallelism is one line, torch's parallelize_module with a FusedFFNParallel for each block's MLP.

    torchrun --nproc-per-node 4 examples/train_char_gpt.py --tp 4 --gated --json out.json --plot out.png
    torchrun --nproc-per-node 2 examples/train_char_gpt.py --tp 2 --steps 1000 --save char_gpt

--save writes a distributed checkpoint of the last model, for serve_char_gpt.py at any number of ranks.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import loss_report
import torch
import torch.distributed as dist
import torch.nn.functional as F
from char_gpt import TEXT, CharGPT, Sizes, read_text
from rank_process import end, start
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from tpffn_triton.parallel_style import FusedFFNParallel


class Trainer:
    """A model and its optimizer. tp: ranks that share its MLPs; 1: the model as it is, dense."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes, tp: int, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.model = CharGPT(sizes).to(device)
        if tp > 1:
            mesh = init_device_mesh(device.type, (dist.get_world_size() // tp, tp), mesh_dim_names=("same", "tp"))
            parallelize_module(self.model, mesh["tp"], {"blocks.*.mlp": FusedFFNParallel()})  # the one line
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)

    def step(self, tokens: Tensor) -> Tensor:
        """Take one step; tokens [B, S + 1]. Returns the loss before it."""
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def batch(args: argparse.Namespace, text: Tensor, step: int) -> Tensor:
    """Return a step's tokens [B, S + 1], the same on every rank."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.seq, (args.batch, 1), generator=generator)
    return text[starts + torch.arange(args.seq + 1)]


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Take the steps, and report each one's losses before its update, and its times in ms."""
    from tqdm import tqdm

    sizes = Sizes(
        "".join(sorted(set(args.characters))), args.layers, args.hidden, args.ffn, args.heads, args.seq, args.gated
    )
    titles = {"dense": "dense"} | {f"tp{tp}": f"P = {tp}" for tp in args.tp}
    trainers = {name: Trainer(args, sizes, tp, device) for name, tp in zip(titles, [1, *args.tp], strict=True)}
    text = sizes.encode(args.characters)
    rows: list[dict[str, float]] = []
    shown = 0
    # Not on a terminal, and on other ranks, there is no bar.
    bar = tqdm(range(args.steps), unit="step", disable=True if dist.get_rank() else None)
    show(bar, loss_report.header(list(titles)))
    for step in bar:
        tokens = batch(args, text, step).to(device)
        row: dict[str, float] = {"step": step}
        for name in list(titles)[:: 1 if step % 2 == 0 else -1]:
            before = now(device)
            loss = trainers[name].step(tokens)
            row[f"ms_{name}"] = 1e3 * (now(device) - before)
            row[f"loss_{name}"] = loss.item()
        row["difference"] = max(abs(row[f"loss_{name}"] - row["loss_dense"]) for name in titles)
        rows.append(row)
        bar.set_postfix(loss=f"{row['loss_dense']:.3f}", difference=f"{row['difference']:.0e}")
        if step % args.log_every == 0 or step == args.steps - 1:
            show(bar, loss_report.line(rows[shown:], list(titles)))
            shown = len(rows)
    bar.close()
    classes = {name: type(trainer.model.blocks[0].mlp).__name__ for name, trainer in trainers.items()}
    report(args, rows, titles, classes, device)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        model = list(trainers.values())[-1].model
        checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=args.save)
        if dist.get_rank() == 0:
            sizes.save(args.save / "sizes.json")


def now(device: torch.device) -> float:
    """Return the time in seconds at which everything launched so far has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show(bar: Any, text: str) -> None:
    """Print a line of the table, on rank 0 alone, above the bar."""
    if dist.get_rank() == 0:
        bar.write(text, file=sys.stdout)
        sys.stdout.flush()


def report(
    args: argparse.Namespace,
    rows: list[dict[str, float]],
    titles: dict[str, str],
    classes: dict[str, str],
    device: torch.device,
) -> None:
    """Print the summary, and write the files that were asked for."""
    if dist.get_rank():
        return
    found = loss_report.summary(rows, list(titles))
    print("\nmedian step: " + ", ".join(f"{title} {found[f'ms_{name}']:.1f} ms" for name, title in titles.items()))
    print(f"largest difference from dense: {found['largest_difference']:.1e}")
    about: dict[str, Any] = loss_report.environment(device)
    about |= {"ranks": dist.get_world_size(), "tp": args.tp, "collectives": dist.get_backend(), "mlps": classes}
    about |= {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    octets = args.characters.encode()
    about |= {"text_bytes": len(octets), "text_sha256": hashlib.sha256(octets).hexdigest()}
    if args.json:
        args.json.write_text(json.dumps({"about": about, "summary": found, "steps": rows}, indent=1) + "\n")
    if args.plot:
        model = f"{args.layers} layers, H={args.hidden}, F={args.ffn}, {'swiglu' if args.gated else 'gelu'}, fp32"
        title = f"Character-level GPT: {model}\n{about['ranks']} ranks, {about['collectives']}, {about['device']}"
        loss_report.plot(rows, titles, title, args.plot, unit="nats a character")


def parse_arguments() -> argparse.Namespace:
    """Read the command line and check it against torchrun's number of processes."""
    description, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", default="2", metavar="P[,P]", help="ranks that share an MLP, a model each (default 2)")
    parser.add_argument("--gated", action="store_true", help="MLPs of three linears, swiglu (default: two, gelu)")
    parser.add_argument("--layers", type=int, default=3, help="(default 3)")
    parser.add_argument("--hidden", type=int, default=96, metavar="H", help="features of a token (default 96)")
    parser.add_argument("--ffn", type=int, default=384, metavar="F", help="features inside an MLP (default 384)")
    parser.add_argument("--heads", type=int, default=4, help="of attention (default 4)")
    parser.add_argument("--seq", type=int, default=64, metavar="S", help="characters in a sequence (default 64)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (default 16)")
    parser.add_argument("--steps", type=int, default=200, help="(default 200)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW (default 3e-3)")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXT, metavar="FILE", help="(default: this project's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="(default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step and the environment there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses there")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the last model there")
    args = parser.parse_args()
    for name in ("tqdm", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            parser.exit(2, f"this example needs {name}: pip install 'tpffn-triton[examples]'\n")
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: the docstring above has the commands (--help shows it)")
    try:
        args.tp = [int(tp) for tp in args.tp.split(",")]
    except ValueError:
        parser.error(f"--tp takes numbers with commas between them, got {args.tp!r}")
    for name in ("layers", "hidden", "ffn", "heads", "seq", "batch", "steps", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    world_size = int(os.environ["WORLD_SIZE"])
    if min(args.tp) < 2 or len(set(args.tp)) < len(args.tp):
        parser.error(f"--tp takes different numbers from 2 on, got {args.tp}: the dense model is always there")
    for tp in args.tp:
        if world_size % tp:
            parser.error(f"--tp {tp} does not divide the {world_size} processes")
        if args.ffn % tp:
            parser.error(f"--tp {tp} does not divide --ffn {args.ffn}")
    if args.hidden % args.heads:
        parser.error(f"--heads {args.heads} does not divide --hidden {args.hidden}")
    try:
        args.characters = read_text(args.text)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text: {error}")
    if len(args.characters) <= args.seq:
        parser.error(f"--text has {len(args.characters)} characters, --seq {args.seq} needs one more than that")
    return args


def main() -> None:
    """Train all models, then write what was asked for."""
    args = parse_arguments()
    device = start()
    train(args, device)


if __name__ == "__main__":
    main()
    end()
