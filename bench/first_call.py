"""Measure how long a new process waits for its first result: forward and backward of the analysed model's shard.

examples:
  python bench/first_call.py
  python bench/first_call.py --activation swiglu --json first_call.json

Twice, each in a process of its own: with the compiler's cache empty, where kernels are compiled, and with the cache
that this leaves, as in every later process. Nothing is tuned. From the call on: imports and CUDA's own start are not in
it. On a machine without a GPU kernels are compiled for sm_90, or read, and launches are missing
(stubbed_launches.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401
import stubbed_launches
import tables
import torch
from environment import describe
from ranks import Rank

import tpffn_triton as tp
from tpffn_triton.kernels.activations import ACTIVATIONS

M, H, F = 1024, 1024, 1024


def first_call(activation: str) -> float:
    """Return the seconds of the first forward and backward in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        stubbed_launches.stub("sm_90")
    layer = tp.TensorParallelFFN(H, F, activation=activation, device=device, dtype=torch.bfloat16)
    x = torch.randn(M, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    layer(x).backward(dy)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_a_process(activation: str, cache: str) -> float:
    """Return the same of a new process whose compiler keeps its results in the folder `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--in-this-process", "--activation", activation]
    found = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(found.stdout)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and the environment")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(first_call(args.activation))
        return
    with tempfile.TemporaryDirectory(prefix="first_call_") as cache:
        seconds = {state: in_a_process(args.activation, cache) for state in ("empty", "full")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = "" if device.type == "cuda" else ", sm_90, launches missing"
    print(f"seconds to the first forward and backward, M={M} H={H} F/P={F}, {args.activation}, bf16{missing}")
    for state, value in seconds.items():
        print(f"  compiler's cache {state:6}{value:7.2f}")
    if args.json:
        facts = {"activation": args.activation, "tokens": M, "hidden": H, "ffn_per_rank": F, "seconds": seconds}
        facts |= {"launches_stubbed": device.type == "cpu", "environment": describe(Rank(0, 1, device, 1, None))}
        tables.write_text(args.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
