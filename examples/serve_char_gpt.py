"""Generate text with what train_char_gpt.py saved, at any number of ranks; on GPUs by replaying one CUDA graph.

    torchrun --nproc-per-node 2 examples/serve_char_gpt.py --model char_gpt --prompt "The kernel"

The forward of a whole window of S characters is one graph, its collectives included: a character then costs the host
one copy and one launch in place of hundreds. The time of both ways is printed. Without a GPU there is no graph, and the
model is called as it is.

    torchrun --nproc-per-node 4 examples/serve_char_gpt.py --model char_gpt --characters 200 --temperature 0.7 --bf16
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from char_gpt import CharGPT, Sizes
from rank_process import end, start
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from tpffn_triton.parallel_style import FusedFFNParallel

Forward = Callable[[Tensor], Tensor]


def load(folder: Path, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> CharGPT:
    """Return the saved model with its MLPs over all ranks: each reads its own shards, whatever P saved them."""
    with torch.device("meta"):
        model = CharGPT(sizes)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"blocks.*.mlp": FusedFFNParallel()})
    model.to_empty(device=device)
    state = {"model": get_model_state_dict(model)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    return model.to(dtype).eval()


def captured(model: CharGPT, tokens: Tensor) -> Forward:
    """Return the model as one CUDA graph: tokens of the same shape → logits, which the next call overwrites."""
    static = tokens.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and ranks compare their arguments before the capture
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(static)

    def replay(tokens: Tensor) -> Tensor:
        static.copy_(tokens)
        graph.replay()
        return logits

    return replay


@torch.inference_mode()
def generate(forward: Forward, prompt: Tensor, window: int, count: int, temperature: float) -> tuple[Tensor, float]:
    """Return prompt and `count` more tokens [S + count], and the seconds one took, the first ones left out.

    The window [1, S] holds the last S tokens, padded behind: attention is causal, so the padding is not seen.
    """
    tokens, times = prompt, []
    for _ in range(count):
        begin = time.perf_counter()
        last = tokens[-window:]
        padded = torch.nn.functional.pad(last, (0, window - len(last)))
        logits = forward(padded[None])[0, len(last) - 1].float()
        # The same on every rank: equal logits, and generators with one seed.
        chosen = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature > 0 else logits.argmax()[None]
        tokens = torch.cat([tokens, chosen])
        chosen.item()  # as a server would, which sends each character
        times.append(time.perf_counter() - begin)
    steady = sorted(times[5:] or times)
    return tokens, steady[len(steady) // 2]


def parse_arguments() -> argparse.Namespace:
    """Read the command line and what it names."""
    description, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="train_char_gpt.py --save FOLDER")
    parser.add_argument("--prompt", default="The ", help="(default 'The ')")
    parser.add_argument("--characters", type=int, default=120, metavar="N", help="to generate (default 120)")
    parser.add_argument("--temperature", type=float, default=0.5, help="0: the most likely (default 0.5)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: the docstring above has the commands (--help shows it)")
    if args.characters < 1:
        parser.error(f"--characters must be at least 1, got {args.characters}")
    if args.temperature < 0:
        parser.error(f"--temperature must be at least 0, got {args.temperature}")
    try:
        args.sizes = Sizes.load(args.model / "sizes.json")
        args.tokens = args.sizes.encode(args.prompt)
    except OSError as error:
        parser.error(f"--model: {error}: train_char_gpt.py --save {args.model} makes it")
    except (TypeError, ValueError) as error:
        parser.error(f"--model or --prompt: {error}")
    if not args.prompt:
        parser.error("--prompt needs at least one character")
    if args.sizes.ffn % (world_size := int(os.environ["WORLD_SIZE"])):
        parser.error(f"the model's F={args.sizes.ffn} is not divisible by the {world_size} processes")
    return args


def main() -> int:
    """Generate, with and without a graph; return 1 if the texts differ."""
    args = parse_arguments()
    device = start()
    model = load(args.model, args.sizes, device, torch.bfloat16 if args.bf16 else torch.float32)
    prompt, window = args.tokens.to(device), args.sizes.seq
    ways: dict[str, Forward] = {"called": model}
    if device.type == "cuda":
        with torch.inference_mode():
            ways["graph"] = captured(model, torch.zeros(1, window, dtype=torch.long, device=device))
    texts = []
    for name, forward in ways.items():
        torch.manual_seed(args.seed)
        tokens, seconds = generate(forward, prompt, window, args.characters, args.temperature)
        texts.append(args.sizes.decode(tokens))
        say(f"{name}: {1e3 * seconds:.2f} ms a character, {dist.get_world_size()} ranks on {device.type}")
    if device.type != "cuda":
        say("no CUDA graph: there is no GPU")
    if dist.get_rank() == 0:
        print(texts[0])
    if texts[-1] != texts[0]:
        say(f"the graph wrote something else: {texts[-1]!r}")
    return int(texts[-1] != texts[0])


def say(text: str) -> None:
    """Print on stderr, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    end(main())
