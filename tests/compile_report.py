"""The configuration rows there are, and the table of what they compile to that docs/compiled.md keeps."""

from collections.abc import Iterator

from tpffn_triton.kernels._config import ARITHMETICS
from tpffn_triton.kernels._configs import KERNELS, TABLES, Config, odd_strides

ENFORCED = ("sm_80", "sm_90")
HEADER = """# What the configurations compile to

Every row of the tables in `kernels/_configs.py`, compiled ahead of time by triton {versions}. Nothing here ran on a
GPU. Each line is the worst of what the gate compiles: on sm_80 and sm_90 the activation with most registers in every
output dtype that a GEMM may have (operands', fp32, a weight gradient's added to fp32), with everything optional and
with nothing; the first row and the odd one, in two ways, also with the other activations; the first also in fp16. With
--all it compiles every activation, form and way to be odd. Written by

    .venv/bin/python tests/compile_gate.py --also .cache/triton-3.6.0 --markdown docs/compiled.md

- configuration: BLOCK_M×BLOCK_N×BLOCK_K, w warps, s stages; tma descriptors or ptr pointers; split: the epilogue works
  on two column halves; odd: for operands that cannot be copied 16 bytes at once. A gated forward has two accumulators
  of that size.
- registers: of a thread, by version of triton, and the bytes it spills.
- shared: KiB of a program.
- MMA: tensor-core instructions in the K loop, the lesser of two (gfx942: in all).
- variants: how many were compiled; the verdict counts those that spill, exceed shared memory, use atomics (other than
  the counters of the launches of both GEMMs), have no tensor-core instructions or asynchronous copies in the K loop,
  load through registers there, or publish what others may not see.
"""


def configurations(arch: str) -> Iterator[tuple[str, str, Config, bool]]:
    """Yield (kernel, arithmetic, config, aligned) for all rows of an architecture."""
    for kernel in KERNELS:
        for arithmetic in ARITHMETICS:
            yield from ((kernel, arithmetic, config, True) for config in TABLES[arch].get((kernel, arithmetic), ()))
            if not kernel.endswith("few_tokens"):  # what it cannot address goes to another kernel
                yield kernel, arithmetic, odd_strides(kernel, arithmetic), False


def describe(config: Config, aligned: bool) -> str:
    """Return a row's name."""
    tile = f"{config.BLOCK_M}×{config.BLOCK_N}×{config.BLOCK_K} w{config.num_warps} s{config.num_stages}"
    tile += " tma" if config.USE_TMA else " ptr"
    tile += f" {config.SPLIT_K} slices" if config.SPLIT_K > 1 else ""
    return tile + (" split" if config.SPLIT_EPILOGUE else "") + ("" if aligned else " odd")


def _registers(rows: list[dict]) -> str:
    compiled = [row for row in rows if "registers" in row]
    if not compiled:
        return "–"
    spilled = max(row["stack"] for row in compiled)
    return str(max(row["registers"] for row in compiled)) + (f" + {spilled} B" if spilled else "")


def _verdict(rows: list[dict]) -> str:
    bad = [row for row in rows if row["problems"]]
    kinds = sorted({problem.split(":")[0] for row in bad for problem in row["problems"]})
    return f"{len(bad)}: {'; '.join(kinds)}" if bad else "ok"


def markdown(rows: list[dict]) -> str:
    """Return docs/compiled.md for the rows of the gate."""
    versions = sorted({row["triton"] for row in rows})
    columns = ("kernel", "arithmetic", "configuration", *(f"registers {version}" for version in versions))
    columns += ("shared", "MMA", "variants", "verdict")
    lines = [HEADER.format(versions=" and ".join(versions))]
    for arch in TABLES:
        lines += [f"## {arch}{'' if arch in ENFORCED else ' (reported only)'}", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for kernel, arithmetic, config, aligned in configurations(arch):
            name = (arch, kernel, arithmetic, describe(config, aligned))
            group = [row for row in rows if (row["arch"], row["kernel"], row["arithmetic"], row["config"]) == name]
            if not group:
                continue
            cells = [*name[1:], *(_registers([row for row in group if row["triton"] == v]) for v in versions)]
            cells.append(f"{max(row.get('shared', 0) for row in group) / 1024:.0f}")
            cells.append(str(min(row.get("tensor_core", 0) for row in group)) if arithmetic != "ieee" else "–")
            cells += [str(len(group)), _verdict(group)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def listed(text: str) -> list[tuple[str, str, str, str, str]]:
    """Return (architecture, kernel, arithmetic, configuration, verdict) for each line of the tables in `text`."""
    lines, arch = [], ""
    for line in text.splitlines():
        if line.startswith("## "):
            arch = line.split()[1]
        elif line.startswith("| ") and not line.startswith("| kernel "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            lines.append((arch, *cells[:3], cells[-1]))
    return lines
