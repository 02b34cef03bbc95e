"""Measure what a call costs the host: fused against F.linear + activation + F.linear, forward.

examples:
  python bench/host_cost.py
  python bench/host_cost.py --activation swiglu --tokens 16 --json host_cost.json

On a CUDA machine both are real calls, enqueued without waiting: the ratio that counts. Elsewhere launches are missing
from both. Of the fused call, all is there up to the compiled kernel's call (stubbed_launches.py). The three torch
operations run on the CPU with one token of 8 features and without oneDNN, which builds a primitive for every gelu:
what is left is dispatch and allocation. Rounds alternate; figures are the least of all rounds: what the host needs when
nothing disturbs it.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401
import stubbed_launches
import torch
from environment import describe
from ranks import Rank

import tpffn_triton as tp
from tpffn_triton.kernels.activations import ACTIVATIONS, halves
from tpffn_triton.reference import ffn_reference

CALLS = 100  # a round's; launches of that many calls fit in CUDA's queue
ROUNDS = 60


def leaves(tokens: int, size: int, activation: str, device: str, grad: bool) -> tuple[torch.Tensor, ...]:
    """Return (x, w1, w2, b1, b2) with H = F = size, in bf16."""
    width = halves(activation) * size
    shapes = ((tokens, size), (width, size), (size, size), (width,), (size,))
    return tuple(torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=grad) for s in shapes)


def microseconds(function: Callable[[], object], device: str) -> float:
    """Return the host's time for one of CALLS calls."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - begin) / CALLS * 1e6


def compare(fused: Callable[[], object], unfused: Callable[[], object], device: str) -> dict[str, float]:
    """Return the least of alternating rounds in µs, and the ratio."""
    for function in (fused, unfused):
        microseconds(function, device)
    rounds = [(microseconds(fused, device), microseconds(unfused, device)) for _ in range(ROUNDS)]
    fused_us, unfused_us = (min(times) for times in zip(*rounds, strict=True))
    return {"fused_us": fused_us, "unfused_us": unfused_us, "ratio": fused_us / unfused_us}


def main() -> None:
    """Measure without and with gradients; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    parser.add_argument("--tokens", type=int, default=16, help="default: 16; more cost no launch more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and the environment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        stubbed_launches.stub("sm_90")
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    rows = []
    for grad in (False, True):
        ours = leaves(args.tokens, 1024, args.activation, device, grad)
        theirs = ours if device == "cuda" else leaves(1, 8, args.activation, device, grad)
        with torch.set_grad_enabled(grad):
            figures = compare(
                functools.partial(tp.ffn, *ours, activation=args.activation),
                functools.partial(ffn_reference, *theirs, activation=args.activation),
                device,
            )
        rows.append({"mode": "with gradients" if grad else "no gradients", **figures})
    print(f"host µs a forward, {args.activation}, {'launches missing from both' if device == 'cpu' else 'CUDA'}")
    print(f"{'':16}{'fused':>8}{'unfused':>9}{'ratio':>7}")
    for row in rows:
        print(f"{row['mode']:16}{row['fused_us']:8.1f}{row['unfused_us']:9.1f}{row['ratio']:7.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"activation": args.activation, "tokens": args.tokens, "launches_stubbed": device == "cpu"}
        environment = describe(Rank(0, 1, torch.device(device), 1, None))
        if device == "cpu":
            environment["backend"] = "triton for sm_90, launches missing"
        facts |= {"rows": rows, "environment": environment}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
