"""Make one mistake at a time in how programs of one launch pass their tiles on, and see what the compile gate says.

    python tests/lint_mutants.py sm_90

Compiles a copy of kernels/ffn_single_launch.py or ffn_few_tokens.py each, with pointers for sm_80 and TMA for sm_90.
Prints one JSON object: name → problems, with the kernel as it is under "right"; and triton's version.

Run it in a process without TRITON_INTERPRET.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import compile_gate as gate
import triton

from tpffn_triton.kernels import ffn_few_tokens, ffn_single_launch

KERNELS = {
    "ffn": (ffn_single_launch, "ffn_kernel"),
    "few_tokens": (ffn_few_tokens, "few_tokens_kernel"),
}
# name → (text, replacement); each text stands once in the source.
MUTANTS = {
    "no barrier": ("    tl.debug_barrier()\n", ""),
    "relaxed flag": ('sem="release", scope="gpu"', 'sem="relaxed", scope="gpu"'),
    "flag for one program": ('sem="release", scope="gpu"', 'sem="release", scope="cta"'),
    "relaxed poll": ('sem="acquire", scope="gpu"', 'sem="relaxed", scope="gpu"'),
    "poll for one program": ('sem="acquire", scope="gpu"', 'sem="acquire", scope="cta"'),
    "no wait": ('    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < act_tiles:\n        pass\n', ""),
}
SCALARS = (
    "tile_m, tile_n, M, N, K, stride_x, stride_w1,\n                "
    "ACTIVATION, HAS_B1, SAVE_PRE_ACT, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_EPILOGUE, "
)
OF_TMA = {
    "no fence before publishing": ("        # It is read by TMA.\n        fence_async_proxy()\n", "        pass\n"),
    "no fence after waiting": ("        pass\n    if USE_TMA:\n        fence_async_proxy()\n", "        pass\n"),
    "stored by TMA": (
        f"x, w1, act_ptr, pre_act, b1_ptr, {SCALARS}USE_TMA, False,",
        f"x, w1, act, pre_act, b1_ptr, {SCALARS}USE_TMA, USE_TMA,",
    ),
}


OF_SLICES = {
    "slice as it is": ("def is_last_slice(",) * 2,
    "slice counted relaxed": ('sem="acq_rel", scope="gpu"', 'sem="relaxed", scope="gpu"'),
    "slice counted for one program": ('sem="acq_rel", scope="gpu"', 'sem="acq_rel", scope="cta"'),
}
OF_SLICES_BY_TMA = {"slice without a fence": ("        fence_async_proxy()\n", "        pass\n")}


def problems(arch: str, kernel: str, text: str, replacement: str) -> list[str]:
    """Return what the gate finds in the last 16-bit row of the architecture."""
    original, function = KERNELS[kernel]
    source = Path(original.__file__).read_text()
    if source.count(text) != 1:
        raise ValueError(f"stands {source.count(text)} times in the source: {text!r}")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source.replace(text, replacement))
        file.flush()
        # A sibling of the kernels, for its relative imports.
        spec = importlib.util.spec_from_file_location("tpffn_triton.kernels.mutant", file.name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        gate.SPECS[kernel] = getattr(module, function), gate.SPECS[kernel][1]
        config = gate.TABLES[arch][kernel, "16bit"][-1]
        variant = gate.Variant(arch, kernel, config, "16bit", "bf16", "relu", "all", "bf16", gate.OPTIONS[kernel])
        return gate.check(variant)["problems"]


if __name__ == "__main__":
    (arch,) = sys.argv[1:]
    mutants = {"right": ("def publish(",) * 2} | MUTANTS | (OF_TMA if arch == "sm_90" else {})
    found = {name: problems(arch, "ffn", *change) for name, change in mutants.items()}
    mutants = OF_SLICES | (OF_SLICES_BY_TMA if arch == "sm_90" else {})
    found |= {name: problems(arch, "few_tokens", *change) for name, change in mutants.items()}
    print(json.dumps({"triton": triton.__version__, "problems": found}))
