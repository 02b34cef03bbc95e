"""Generate with a model of Hugging Face transformers before and after its MLPs are replaced: the same tokens.

    pip install 'tpffn-triton[huggingface]'
    torchrun --nproc-per-node 2 examples/generate_huggingface.py --family llama

builds a small model with random weights; --model takes a folder with a pretrained one:

    torchrun --nproc-per-node 4 examples/generate_huggingface.py --model folder --bf16 --prompt "Once upon a time"

Replacing is one line, parallelize(model, group); its report is printed. With --save the model is written as
transformers would have written it, for from_pretrained.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_process import end, start
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tpffn_triton.huggingface import parallelize

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 512, "n_embd": 128, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
# family → (class of the model, class of its configuration, what the small one is made of)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 32}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL | {"num_key_value_heads": 1, "head_dim": 32}),
}


def build(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Return the model, the same on every rank, and its tokenizer; a random model has none."""
    import transformers

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if args.model is not None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(args.seed)
    kind, config, sizes = FAMILIES[args.family]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return model.to(device, dtype).eval(), None


def generate(model: Any, inputs: Any, count: int) -> tuple[torch.Tensor, float]:
    """Return the most likely tokens and the seconds they took."""
    begin = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    tokens = tokens.cpu()  # waits for the GPU
    return tokens, time.perf_counter() - begin


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    description, examples = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of the random model (default llama)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a pretrained model in place of a random one")
    parser.add_argument("--prompt", default="Tensor parallelism", help="for a pretrained model")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="to generate (default 24)")
    parser.add_argument("--bf16", action="store_true", help="(default fp32)")
    parser.add_argument("--seed", type=int, default=0, help="of the random model (default 0)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the model there")
    args = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        parser.exit(2, "this example needs transformers: pip install 'tpffn-triton[huggingface]'\n")
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: the docstring above has the commands (--help shows it)")
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    if not args.prompt:
        parser.error("--prompt needs at least one character")
    if args.model is not None and not (args.model / "config.json").exists():
        parser.error(f"--model {args.model} is not a folder with a config.json")
    return args


def main() -> int:
    """Generate, replace, generate again; return 1 if tokens differ in fp32, where they must not."""
    args = parse_arguments()
    device = start()
    model, tokenizer = build(args, device)
    if tokenizer is None:
        inputs: Any = {"input_ids": torch.arange(2, 10, device=device)[None]}
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    before, seconds_before = generate(model, inputs, args.tokens)

    report = parallelize(model, dist.group.WORLD)  # the one line

    after, seconds_after = generate(model, inputs, args.tokens)
    equal = int((before == after).sum())
    if args.save is not None:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            model.save_pretrained(args.save, state_dict=state)
    if dist.get_rank() == 0:
        print(report)
        print(f"tokens: {equal} of {before.numel()} as before")
        print(tokenizer.decode(after[0]) if tokenizer else " ".join(map(str, after[0].tolist())))
        rate = args.tokens / seconds_before, args.tokens / seconds_after
        print(f"{rate[0]:.0f} tokens/s before, {rate[1]:.0f} after, first calls included", file=sys.stderr)
    return int(not args.bf16 and equal < before.numel())


if __name__ == "__main__":
    end(main())
