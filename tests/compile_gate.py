"""Compile every configuration row ahead of time, without a GPU, and report what the assembler made of it.

    python tests/compile_gate.py --arch sm_90 [--kernel linear_act] [--all-activations] [--jobs 4] [--json]

One line (or JSON object) a variant: registers, stack bytes, spills inside the K loop, shared memory, tensor-core and
asynchronous-copy instructions of the K loop, and a verdict. Exit status 1 when a row of an enforced architecture
(sm_80, sm_90) spills, exceeds shared memory, or has lost its tensor cores or its pipeline.

Run it in a process without TRITON_INTERPRET: triton decides when a kernel is decorated.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tpffn_triton.kernels import column_sum, linear_act, linear_dact, matmul
from tpffn_triton.kernels._configs import KERNELS, ODD_STRIDES, TABLES, Config
from tpffn_triton.kernels.activations import PLAIN_ACTIVATIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ENFORCED = ("sm_80", "sm_90")
# Bytes a program may use. sm_80's rows also serve sm_86, sm_89 and sm_120, which have less than the A100.
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}

# Kernel, and the block of each tensor argument as names of Config fields (n: BLOCK_N, halved by a split epilogue).
SPECS = {
    "linear_act": (linear_act.linear_act_kernel, {"x": "MK", "weight": "NK", "act": "Mn", "pre_act": "Mn"}, {}),
    "linear_dact": (
        linear_dact.linear_dact_kernel,
        {"dy": "MK", "weight": "KN", "pre_act": "Mn", "d_pre": "Mn", "act": "Mn"},
        {},
    ),
    "linear": (matmul.matmul_kernel, {"a": "MK", "b": "NK", "out": "Mn"}, {"TRANS_B": True, "HAS_BIAS": True}),
    "dgrad": (matmul.matmul_kernel, {"a": "MK", "b": "KN", "out": "Mn"}, {"TRANS_B": False, "HAS_BIAS": False}),
    "wgrad": (matmul.wgrad_kernel, {"dy": "KM", "x": "KN", "dw": "Mn"}, {}),
}
FLAGS = {
    "linear_act": {"HAS_BIAS": True, "SAVE_PRE_ACT": True},
    "linear_dact": {"STORE_ACT": True, "STORE_DB": True},
}


def variants(arch: str, kernel: str, all_activations: bool):
    """Yield (config, arithmetic, dtype, activation, aligned): every row with erf, the heaviest activation, in bf16 or
    fp32; the first row and the row for odd strides with every activation; the first in fp16; all_activations: all."""
    activations = PLAIN_ACTIVATIONS if kernel in FLAGS else (None,)
    for arithmetic, dtype in (("16bit", "bf16"), ("16bit", "fp16"), ("tf32", "fp32"), ("ieee", "fp32")):
        rows = [(config, True) for config in TABLES[arch][kernel, arithmetic]] + [(ODD_STRIDES[arithmetic], False)]
        for index, (config, aligned) in enumerate(rows):
            for activation in activations:
                heaviest = activation == activations[0]
                extremes = index == 0 or not aligned
                if all_activations or (dtype != "fp16" and (heaviest or extremes)) or (index == 0 and heaviest):
                    yield config, arithmetic, dtype, activation, aligned


def signature(kernel: str, config: Config, dtype: str) -> tuple[dict, tuple]:
    """Return the argument types, and the arguments divisible by 16 where the operands are aligned."""
    function, blocks, _ = SPECS[kernel]
    sizes = {
        "M": config.BLOCK_M,
        "N": config.BLOCK_N,
        "K": config.BLOCK_K,
        "n": config.BLOCK_N // 2 if config.SPLIT_EPILOGUE else config.BLOCK_N,
    }
    types, aligned = {}, []
    for name in function.arg_names:
        if name in blocks and config.USE_TMA:
            rows, cols = (sizes[axis] for axis in blocks[name])
            types[name] = f"tensordesc<{dtype}[{rows}, {cols}]>"
        elif name in blocks or name.endswith("_ptr"):
            types[name] = "*fp32" if name == "db_partial_ptr" else f"*{dtype}"
            aligned.append(name)
        elif name.startswith("stride") or name in ("M", "N", "K"):
            types[name] = "i32"
            if name != "M":
                aligned.append(name)
        else:
            types[name] = "constexpr"
    return types, tuple(aligned)


def compile_variant(arch, kernel, config: Config, arithmetic, dtype, activation, aligned: bool):
    """Compile one variant for `arch`; return the compiled kernel."""
    function, _, constants = SPECS[kernel]
    types, divisible = signature(kernel, config, dtype)
    values = config.meta | constants | FLAGS.get(kernel, {})
    values |= {"PRECISION": "ieee" if arithmetic == "ieee" else "tf32", "ACTIVATION": activation}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={name: values[name] for name, kind in types.items() if kind == "constexpr"},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile(source, target=TARGETS[arch], options=options)


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    return registers, stack, sass


def _k_loop(sass: str, instruction: str) -> str:
    """Return the innermost loop with the most `instruction`s: the main loop."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"BRA\S*\s+(?:\S+,\s*)?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch.group(1), i) < i:
            loops.append((labels[branch.group(1)], i))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = ["\n".join(lines[start : end + 1]) for start, end in innermost]
    return max(bodies, key=lambda body: len(re.findall(rf"\b{instruction}", body)), default="")


def inspect_nvidia(compiled, arch: str, arithmetic: str, copy: str | None) -> dict:
    """Return resource use and instruction counts of a cubin, with the list of what is wrong with it."""
    registers, stack, sass = _disassemble(compiled.asm["cubin"])

    def count(pattern, text):
        return len(re.findall(rf"\b{pattern}", text))

    # Hopper has no HGMMA for transposed TF32 operands, so triton uses HMMA there.
    tensor_core = r"\w*HG?MMA" if arithmetic == "tf32" else TENSOR_CORES[arch]
    instruction = "FFMA" if arithmetic == "ieee" else tensor_core
    loop = _k_loop(sass, instruction)
    report = {
        "registers": registers,
        "stack": stack,
        "spills": count("LDL", sass) + count("STL", sass),
        "shared": compiled.metadata.shared,
        "tensor_core": count(tensor_core, loop),
        "async_copy": count(copy, loop) if copy else 0,
    }
    problems = []
    if stack or report["spills"]:
        problems.append(f"spills: {stack} bytes of stack, {report['spills']} LDL/STL")
    if report["shared"] > SHARED_LIMIT[arch]:
        problems.append(f"{report['shared']} bytes of shared memory exceed {SHARED_LIMIT[arch]}")
    if arithmetic != "ieee":
        if not report["tensor_core"]:
            problems.append(f"no {tensor_core} in the K loop")
        if copy and not report["async_copy"]:
            problems.append(f"no {copy} in the K loop")
    return report | {"problems": problems}


def inspect_amd(compiled, arch: str) -> dict:
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
    }
    problems = []
    if report["spills"]:
        problems.append(f"{report['spills']} spilled registers")
    if report["shared"] > SHARED_LIMIT[arch]:
        problems.append(f"{report['shared']} bytes of LDS exceed {SHARED_LIMIT[arch]}")
    return report | {"problems": problems}


def check(job) -> dict:
    """Compile and inspect one (arch, kernel, config, arithmetic, dtype, activation, aligned)."""
    arch, kernel, config, arithmetic, dtype, activation, aligned = job
    tile = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"
    shape = f"{tile} w{config.num_warps} s{config.num_stages}"
    shape += (
        (" tma" if config.USE_TMA else " ptr")
        + (" split" if config.SPLIT_EPILOGUE else "")
        + ("" if aligned else " odd")
    )
    row = {"arch": arch, "kernel": kernel, "config": shape, "arithmetic": arithmetic, "dtype": dtype}
    row |= {"activation": activation, "triton": triton.__version__}
    try:
        compiled = compile_variant(*job)
    except Exception as error:  # a compiler that gives up is a finding, not a crash of the gate
        last = (str(error).strip().splitlines() or [""])[-1]
        return row | {"problems": [f"{type(error).__name__}: {last[:200]}"]}
    if arch.startswith("sm"):
        # Rows that start at odd addresses cannot be copied asynchronously.
        copy = "UTMALDG" if config.USE_TMA else "LDGSTS" if aligned else None
        return row | inspect_nvidia(compiled, arch, arithmetic, copy)
    return row | inspect_amd(compiled, arch)


def check_column_sum(arch: str) -> dict:
    """Compile the row sum of bias gradients, which has no configuration table."""
    function = column_sum.column_sum_kernel
    types = dict.fromkeys(function.arg_names, "constexpr") | {"src_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("R", "N", "stride_src"), "i32")
    constants = {
        "ROWS_PER_PROGRAM": column_sum.ROWS_PER_PROGRAM,
        "BLOCK_R": column_sum.BLOCK_R,
        "BLOCK_N": column_sum.BLOCK_N,
    }
    compiled = compile(ASTSource(fn=function, signature=types, constexprs=constants), target=TARGETS[arch])
    row = {"arch": arch, "kernel": "column_sum", "config": "-", "arithmetic": "ieee", "dtype": "fp32"}
    row |= {"activation": None, "triton": triton.__version__}
    return row | (inspect_nvidia(compiled, arch, "ieee", None) if arch != "gfx942" else inspect_amd(compiled, arch))


def main() -> int:
    """Parse the command line, check all selected variants in parallel, print them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, action="append", help="default: all; may be repeated")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all; may be repeated")
    parser.add_argument("--all-activations", action="store_true", help="every row with every activation and dtype")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    arches, kernels = args.arch or list(TARGETS), args.kernel or list(KERNELS)
    jobs = [
        (arch, kernel, *variant)
        for arch in arches
        for kernel in kernels
        for variant in variants(arch, kernel, args.all_activations)
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        rows = list(pool.map(check, jobs))
    if not args.kernel:
        rows += [check_column_sum(arch) for arch in arches]
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            facts = " ".join(f"{k}={row[k]}" for k in list(row)[7:] if k != "problems")
            name = f"{row['arch']:<7}{row['kernel']:<12}{row['config']:<28}"
            name += f"{row['dtype']:<6}{row['arithmetic']:<6}{row['activation']!s:<10}"
            print(f"{name}{'; '.join(row['problems']) or 'ok'}  {facts}")
    return int(any(row["problems"] for row in rows if row["arch"] in ENFORCED))


if __name__ == "__main__":
    sys.exit(main())
