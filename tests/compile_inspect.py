"""What the assembler made of a compiled kernel: registers, spills, the instructions of its K loop, its atomics; and
whether what its programs publish to each other reaches them (ptx_lint.py)."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from types import MappingProxyType

from ptx_lint import lint
from triton import knobs

# Bytes a program may use. sm_80's rows also serve sm_86, sm_89 and sm_120, which have less than the A100.
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


# Both vendors' atomics, but for the bits in shared memory with which Blackwell hands out tensor memory.
ATOMICS = r"\b(?:ATOMG?|ATOMS(?!\.(?:AND|OR)\b)|REDG?|UTMAREDG|UBLKRED)\b|\b(?:global|buffer|flat)_atomic_"

# The instructions with which the single launch counts: a ticket taken and the tickets reset, a row block seen and its
# counter reset; a tile published; and the poll, which is a load.
COUNTING = {"relaxed": 4, "releases": 1, "acquires": 1}
# With slices: in either stage a slice is counted, acquiring and releasing, and their counter reset.
COUNTING_SLICES = {"relaxed": 6, "releases": 3, "acquires": 3}
SILENT = dict.fromkeys(COUNTING, 0)


def count_atomics(assembly: str) -> int:
    """Count the instructions that may add in whatever order programs arrive."""
    return len(re.findall(ATOMICS, assembly))


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        # Without its analysis of the data flow, which takes as long again and finds no other branches.
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    return registers, stack, sass


def _k_loops(sass: str, instruction: str) -> list[str]:
    """Return the loops with `instruction`s, one a GEMM, the shortest of those that overlap: waiting at a barrier is
    laid out behind everything else, and its branch back looks like a loop too."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"BRA\S*\s+(?:\S+,\s*)?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch.group(1), i) < i:
            start = labels[branch.group(1)]
            if any(re.search(rf"\b{instruction}", body) for body in lines[start : i + 1]):
                loops.append((start, i))
    apart: list[tuple[int, int]] = []
    for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if all(end < other_start or other_end < start for other_start, other_end in apart):
            apart.append((start, end))
    return ["\n".join(lines[start : end + 1]) for start, end in apart]


def _problems(report: dict, arch: str, counting: dict[str, int]) -> list[str]:
    problems = []
    if report["stack"] or report["spills"]:
        problems.append(f"spills: {report['stack']} bytes of stack, {report['spills']} instructions")
    if report["shared"] > SHARED_LIMIT[arch]:
        problems.append(f"{report['shared']} bytes of shared memory exceed {SHARED_LIMIT[arch]}")
    expected = counting.get("relaxed", 0) + counting.get("releases", 0)  # the poll is a load
    if report["atomics"] != expected:
        problems.append(f"atomic instructions: {report['atomics']}, not {expected}")
    if report["float_atomics"]:
        problems.append(f"atomic instructions on floating point: {report['float_atomics']}")
    return problems


def inspect_nvidia(
    compiled,
    arch: str,
    arithmetic: str,
    copy: str | None,
    gemms: int | None = 1,
    counting: Mapping[str, int] = MappingProxyType({}),
    dependent: bool = False,
    wgmma: bool = True,
) -> dict:
    """Return resource use and instruction counts of a cubin, with the list of what is wrong with it.

    copy: the instruction that feeds its K loops; gemms: how many K loops it has; counting: how its programs count, as
    those of the single launch do; dependent: it waits for the launch before; wgmma: its tiles are tall enough for
    Hopper's own tensor-core instructions. Counts of instructions are those of the K loop with the fewest.
    """
    registers, stack, sass = _disassemble(compiled.asm["cubin"])
    linted = lint(compiled.asm["ptx"])

    def count(pattern, text):
        return len(re.findall(rf"\b{pattern}", text))

    # Hopper has no HGMMA for transposed TF32 operands, so triton uses HMMA there.
    tensor_core = r"\w*HG?MMA" if arithmetic == "tf32" or not wgmma else TENSOR_CORES[arch]
    instruction = "FFMA" if arithmetic == "ieee" else tensor_core
    loops = _k_loops(sass, instruction) or [""]
    report = {
        "registers": registers,
        "stack": stack,
        "spills": count("LDL", sass) + count("STL", sass),
        "shared": compiled.metadata.shared,
        "tensor_core": min(count(tensor_core, loop) for loop in loops),
        "async_copy": min(count(copy, loop) for loop in loops) if copy else 0,
        "atomics": count_atomics(sass),
        "float_atomics": linted.float_atomics,
    }
    problems = _problems(report, arch, counting) + linted.findings
    expected = SILENT | counting | {"launch_waits": int(dependent)}
    found = {kind: getattr(linted, kind) for kind in expected}
    if found != expected:
        problems.append(f"synchronisation: {found}, not {expected}")
    if arithmetic != "ieee" and not report["tensor_core"]:
        problems.append(f"no {tensor_core} in a K loop")
    if copy and not report["async_copy"]:
        problems.append(f"no {copy} in a K loop")
    if gemms is not None and len(loops) != gemms:
        problems.append(f"{len(loops)} K loops for {gemms} GEMMs")
    if copy and any(count(r"LDG\b", loop) for loop in loops):
        problems.append("loads through registers in the K loop")
    return report | {"problems": problems}


def inspect_amd(compiled, arch: str, counting: Mapping[str, int] = MappingProxyType({})) -> dict:
    """Return resource use of a code object, with the list of what is wrong with it."""
    assembly = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    report = {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "shared": compiled.metadata.shared,
        "tensor_core": assembly.count("v_mfma"),
        "async_copy": 0,
        "atomics": count_atomics(assembly),
        "float_atomics": len(re.findall(r"_atomic_\w*(?:f16|f32|f64)", assembly)),
    }
    return report | {"problems": _problems(report, arch, counting)}
