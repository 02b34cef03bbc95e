"""Compile every configuration row ahead of time, without a GPU, and report what the assembler made of it.

    python tests/compile_gate.py --arch sm_90 [--kernel linear_act] [--all] [--jobs 4] [--json]
    python tests/compile_gate.py --also .cache/triton-3.6.0 --markdown docs/compiled.md
    python tests/compile_gate.py --arch sm_90 --candidates candidates.json --json

One line (or JSON object) a variant: registers, stack bytes, spills, shared memory, tensor-core and asynchronous-copy
instructions of the K loop, atomics, and a verdict; or, in Markdown, one line a row. Exit status 1 when a row of an
enforced architecture (sm_80, sm_90) spills, exceeds shared memory, uses other atomics than the counters of the
launches of both GEMMs, publishes what others may not see (ptx_lint.py), or has lost its tensor cores or its pipeline.

Run it in a process without TRITON_INTERPRET: triton decides when a kernel is decorated.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import compress, product
from pathlib import Path
from typing import NamedTuple

import triton
from compile_inspect import COUNTING, COUNTING_SLICES, inspect_amd, inspect_nvidia
from compile_pool import results
from compile_report import ENFORCED, configurations, describe, markdown
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tpffn_triton.kernels import (
    column_sum,
    ffn_few_tokens,
    ffn_single_launch,
    linear_act,
    linear_dact,
    matmul,
    weight_grads,
)
from tpffn_triton.kernels._config import PLAIN_GEMMS
from tpffn_triton.kernels._configs import KERNELS, PRECISION, TABLES, Config
from tpffn_triton.kernels.activations import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, kernel_activation
from tpffn_triton.kernels.forward import DEPENDENT_LAUNCHES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Kernel, and the block of each tensor argument as names of Config fields (n: BLOCK_N, halved by a split epilogue).
_FFN = {"x": "MK", "w1": "NK", "w2": "NK", "act": "MK", "y": "Mn", "pre_act": "Mn", "up": "Mn"}
SPECS = {
    "ffn": (ffn_single_launch.ffn_kernel, _FFN),
    "gated_ffn": (ffn_single_launch.ffn_kernel, _FFN),
    "few_tokens": (ffn_few_tokens.few_tokens_kernel, _FFN),
    "gated_few_tokens": (ffn_few_tokens.few_tokens_kernel, _FFN),
    "linear_act": (linear_act.linear_act_kernel, {"x": "MK", "weight": "NK", "act": "Mn", "pre_act": "Mn"}),
    "linear_dact": (
        linear_dact.linear_dact_kernel,
        {"dy": "MK", "weight": "KN", "pre_act": "Mn", "d_pre": "Mn", "act": "Mn"},
    ),
    "gated_linear_act": (
        linear_act.gated_linear_act_kernel,
        {"x": "MK", "weight": "NK", "act": "Mn", "gate": "Mn", "up": "Mn"},
    ),
    "gated_linear_dact": (
        linear_dact.gated_linear_dact_kernel,
        {"dy": "MK", "weight": "KN", "gate": "Mn", "up": "Mn", "d_gate": "Mn", "d_up": "Mn", "act": "Mn"},
    ),
    "linear": (matmul.matmul_kernel, {"a": "MK", "b": "NK", "out": "Mn"}),
    "dgrad": (matmul.matmul_kernel, {"a": "MK", "b": "KN", "out": "Mn"}),
    "wgrad": (matmul.wgrad_kernel, {"dy": "KM", "x": "KN", "dw": "Mn"}),
    "weight_grads": (
        weight_grads.weight_grads_kernel,
        {"d_pre": "KM", "x": "KN", "dy": "KM", "act": "KN", "dw1": "Mn", "dw2": "Mn"},
    ),
}
# What a kernel does only if asked: its forms are the combinations.
OPTIONS = {
    "ffn": ("HAS_B1", "HAS_B2", "SAVE_PRE_ACT"),
    "few_tokens": ("HAS_B1", "HAS_B2", "SAVE_PRE_ACT"),
    "linear_act": ("HAS_BIAS", "SAVE_PRE_ACT"),
    "linear_dact": ("STORE_ACT", "STORE_DB"),
    "linear": ("HAS_BIAS",),
    "weight_grads": ("HAS_DB1", "HAS_DB2"),
}
OPTIONS |= {f"gated_{kernel}": OPTIONS[kernel] for kernel in ("ffn", "few_tokens", "linear_act", "linear_dact")}
# Kernels of two GEMMs take long to compile: of their forms those with everything, with nothing, and the single launch
# without b2, as on all ranks but the first.
FORMS_OF_TWO_GEMMS = {
    "ffn": [OPTIONS["ffn"], ("HAS_B1", "SAVE_PRE_ACT"), ()],
    "few_tokens": [OPTIONS["ffn"], ("HAS_B1", "SAVE_PRE_ACT"), ()],
    "weight_grads": [OPTIONS["weight_grads"], ()],
}
# Which arguments the compiler knows to be multiples of 16: addresses in bytes, N, and K with the row strides; never M.
ODD = {"rows odd": ("ptr",), "none": (), "K odd": ("ptr", "N"), "N odd": ("ptr", "K"), "address odd": ("N", "K")}
KNOWN = {"all": ("ptr", "N", "K")} | ODD
# Sizes that go by other names than M, N and K.
SIZES = {"M": "M", "N": "N", "K": "K", "W": "N", "F": "N", "H": "K", "R": "M", "T": "M"}
ADDED = "fp32 +="
# What a kernel stores where it is asked for another dtype than its operands'.
OUTPUTS = dict.fromkeys(("ffn", "gated_ffn", "few_tokens", "gated_few_tokens", "linear", "dgrad"), ("fp32",))
OUTPUTS |= dict.fromkeys(("wgrad", "weight_grads"), ("fp32", ADDED))


class Variant(NamedTuple):
    """One compilation. `output` is the dtype of a GEMM's result, or ADDED; of other kernels always `dtype`. `known` is
    a key of KNOWN, `form` the kernel's OPTIONS that are on."""

    arch: str
    kernel: str
    config: Config
    arithmetic: str
    dtype: str
    activation: str | None
    known: str
    output: str
    form: tuple[str, ...]


def activations_of(kernel: str) -> tuple:
    """Return the activations of a kernel."""
    if kernel in PLAIN_GEMMS:
        return (None,)
    return tuple(GATED_ACTIVATIONS) if kernel.startswith("gated") else PLAIN_ACTIVATIONS


def forms_of(arch: str, kernel: str, everything: bool, heavy: bool) -> list[tuple[str, ...]]:
    """Return the forms to compile: on an enforced architecture all of them, or, of a heavy activation, that with
    everything and that with nothing optional; else that with everything."""
    options = OPTIONS.get(kernel, ())
    if arch in ENFORCED and everything:
        two_gemms = FORMS_OF_TWO_GEMMS.get(kernel.removeprefix("gated_"))
        return two_gemms or [tuple(compress(options, on)) for on in product((True, False), repeat=len(options))]
    return [*dict.fromkeys((options, ()))] if arch in ENFORCED and heavy else [options]


def variants(arch: str, kernel: str, everything: bool):
    """Yield Variants: every row with the heaviest activations, in bf16 or fp32, and every output of a GEMM. Where it is
    enforced also the first row and the odd one with every activation, unless IEEE; the latter with the heaviest, and
    all options, odd in two ways; the first in fp16.
    everything: every row with every activation in bf16 and fp32, and with the heaviest in fp16, and odd in every way.
    """
    activations = activations_of(kernel)
    # By registers: gelu in the plain kernels; in the gated ones, either geglu.
    heaviest = activations[:2] if kernel.startswith("gated") else activations[:1]
    for row_kernel, arithmetic, config, aligned in configurations(arch):
        if row_kernel != kernel:
            continue
        first = aligned and config == TABLES[arch][kernel, arithmetic][0]
        extreme = (first or not aligned) and arithmetic != "ieee" and arch in ENFORCED
        for dtype in ("bf16", "fp16") if arithmetic == "16bit" else ("fp32",):
            for activation in activations:
                heavy = activation in heaviest
                outputs = dict.fromkeys((dtype, *(OUTPUTS.get(kernel, ()) if heavy or everything else ())))
                patterns = [*ODD] if everything and heavy and arch in ENFORCED else [*ODD][:2]
                patterns = patterns if everything or activation == heaviest[0] else ["none"]
                chosen = heavy and (first or everything) if dtype == "fp16" else heavy or extreme or everything
                forms = forms_of(arch, kernel, everything, heavy) if chosen else ()
                for output, known, form in product(outputs, ("all",) if aligned else patterns, forms):
                    variant = Variant(arch, kernel, config, arithmetic, dtype, activation, known, output, form)
                    if everything or known != "rows odd" or (output, form) == (dtype, OPTIONS.get(kernel, ())):
                        yield variant


def stands_for_its_row(variant: Variant) -> bool:
    """Say whether it is the one of its row in --brief: all options, the heaviest activation, all sizes odd or none."""
    whole = variant.form == OPTIONS.get(variant.kernel, ()) and variant.output == variant.dtype != "fp16"
    return whole and variant.activation == activations_of(variant.kernel)[0] and variant.known in ("all", "none")


def candidates(arch: str, path: Path) -> list[Variant]:
    """Return a variant that stands for each {kernel, arithmetic, config} in a JSON list; config has Config's fields.

    Raises: OSError, ValueError, KeyError, TypeError: not such a file.
    """
    found = []
    for given in json.loads(path.read_text()):
        kernel, arithmetic, config = given["kernel"], given["arithmetic"], Config(**given["config"])
        if kernel not in KERNELS or arithmetic not in PRECISION:
            raise ValueError(f"no kernel {kernel!r} in arithmetic {arithmetic!r}")
        dtype = "bf16" if arithmetic == "16bit" else "fp32"
        everything = OPTIONS.get(kernel, ())
        activation = activations_of(kernel)[0]
        found.append(Variant(arch, kernel, config, arithmetic, dtype, activation, "all", dtype, everything))
    return found


def signature(variant: Variant) -> tuple[dict, tuple]:
    """Return the argument types, and the arguments known to be multiples of 16."""
    function, blocks = SPECS[variant.kernel]
    config, known = variant.config, KNOWN[variant.known]
    sizes = {"M": config.BLOCK_M, "N": config.BLOCK_N, "K": config.BLOCK_K, "n": config.STORED_N}
    stored = variant.output.removesuffix(" +=")
    dtypes = dict.fromkeys(("dw", "dw1", "dw2", "db1_ptr", "db2_ptr", "out", "y"), stored)
    dtypes |= {"db_partial_ptr": "fp32", "counters_ptr": "i32"}
    dtypes["partial_ptr"] = "fp32" if config.SPLIT_K > 1 else stored  # y in its place where nothing is sliced
    types, divisible = {}, []
    for name in function.arg_names:
        dtype = dtypes.get(name, variant.dtype)
        if name in blocks and config.USE_TMA:
            rows, cols = (sizes[axis] for axis in blocks[name])
            types[name] = f"tensordesc<{dtype}[{rows}, {cols}]>"
            continue
        if name in blocks or name.endswith("_ptr"):
            types[name], kind = f"*{dtype}", "ptr"
        elif name.startswith("stride") or name in SIZES:
            types[name], kind = "i32", SIZES.get(name, "K")
        else:
            types[name], kind = "constexpr", ""
        if kind in known:
            divisible.append(name)
    return types, tuple(divisible)


def is_dependent(variant: Variant) -> bool:
    """Say whether it is compiled as a dependent launch: Linear2 may be one; the same kernel as dgrad never is."""
    return variant.arch in DEPENDENT_LAUNCHES and variant.kernel == "linear"


def compile_variant(variant: Variant):
    """Return the compiled kernel."""
    function, _ = SPECS[variant.kernel]
    types, divisible = signature(variant)
    values = variant.config.meta | {"HAS_BIAS": False, "TRANS_B": variant.kernel == "linear"}
    values |= {option: option in variant.form for option in OPTIONS.get(variant.kernel, ())}
    values |= {"PRECISION": PRECISION[variant.arithmetic], "ACCUMULATE": variant.output == ADDED}
    values |= {"GATED": variant.kernel.startswith("gated"), "IS_DEPENDENT": is_dependent(variant)}
    values |= {"HAS_DEPENDENT": variant.arch in DEPENDENT_LAUNCHES}
    if variant.activation:
        values["ACTIVATION"] = kernel_activation(variant.activation, ITEMSIZE[variant.dtype])
    constants = {name: values[name] for name, kind in types.items() if kind == "constexpr"}
    attrs = {name: [["tt.divisibility", 16]] for name in divisible}
    # Constants without attributes, listed as Triton's JIT does (3.6: texts alone): a launch then finds in the cache
    # what was compiled here.
    all_listed = not triton.__version__.startswith("3.6.")
    attrs |= {name: [] for name, value in constants.items() if all_listed or isinstance(value, str)}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs=constants,
        attrs={(function.arg_names.index(name),): of_name for name, of_name in attrs.items()},
    )
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    return compile(source, target=TARGETS[variant.arch], options=options)


def _described(variant: Variant) -> dict:
    config = describe(variant.config, variant.known == "all")
    return variant._asdict() | {"config": config, "triton": triton.__version__}


def counts_of(variant: Variant) -> dict[str, int]:
    """Return how many instructions count, of each kind; of a kernel in one launch alone."""
    if not variant.kernel.endswith(("ffn", "few_tokens")):
        return {}
    return COUNTING_SLICES if variant.config.SPLIT_K > 1 else COUNTING


def check(variant: Variant) -> dict:
    """Compile and inspect one variant."""
    aligned = variant.known == "all"
    counting = counts_of(variant)
    row = _described(variant)
    try:
        compiled = compile_variant(variant)
    except Exception as error:  # a compiler that gives up is a finding, not a crash of the gate
        last = (str(error).strip().splitlines() or [""])[-1]
        return row | {"problems": [f"{type(error).__name__}: {last[:200]}"]}
    if variant.arch.startswith("sm"):
        # Rows that start at odd addresses cannot be copied asynchronously.
        copy = "UTMALDG" if variant.config.USE_TMA else "LDGSTS" if aligned else None
        kind = {"gemms": 2 if counting else 1, "counting": counting, "dependent": is_dependent(variant)}
        kind["wgmma"] = variant.config.BLOCK_M >= 64
        report = inspect_nvidia(compiled, variant.arch, variant.arithmetic, copy, **kind)
        if variant.config.PREFETCH_K and "prefetch.global.L2" not in compiled.asm["ptx"]:
            report["problems"].append("nothing is prefetched")
    else:
        report = inspect_amd(compiled, variant.arch, counting)
    return row | report


def check_all(jobs: list[Variant], workers: int) -> list[dict]:
    """Compile and inspect variants in parallel."""
    reports = results(check, jobs, workers)
    died = {"problems": ["the compiler took its process with it"]}
    return [reports[job] if job in reports else _described(job) | died for job in jobs]


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
    row |= {"activation": None, "known": "none", "output": "bf16", "form": (), "triton": triton.__version__}
    return row | (
        inspect_nvidia(compiled, arch, "ieee", None, gemms=None) if arch != "gfx942" else inspect_amd(compiled, arch)
    )


def check_with(folder: str, args: argparse.Namespace) -> list[dict]:
    """Return the rows of the same command under the triton in `folder`."""
    command = [sys.executable, __file__, "--json", f"--jobs={args.jobs}"]
    command += [f"--arch={arch}" for arch in args.arch or ()] + [f"--kernel={kernel}" for kernel in args.kernel or ()]
    command += ["--all"] * args.all + ["--brief"] * args.brief
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def main() -> int:
    """Parse the command line, check all selected variants in parallel, print them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, action="append", help="default: all; may be repeated")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all; may be repeated")
    parser.add_argument("--all", action="store_true", help="every row with every activation, dtype and form")
    parser.add_argument("--brief", action="store_true", help="one of each row, in a fifth of the time")
    instead = "a JSON list of {kernel, arithmetic, config}: compile each once, instead of the tables' rows"
    parser.add_argument("--candidates", metavar="FILE", type=Path, help=instead)
    parser.add_argument("--also", metavar="FOLDER", help="repeat everything with the triton in this folder")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write a summary, one line a row")
    args = parser.parse_args()
    arches, kernels = args.arch or list(TARGETS), args.kernel or list(KERNELS)
    if args.candidates:
        try:
            jobs = [job for arch in arches for job in candidates(arch, args.candidates) if job.kernel in kernels]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--candidates {args.candidates}: {type(error).__name__}: {error}")
    else:
        jobs = [job for arch in arches for kernel in kernels for job in variants(arch, kernel, args.all)]
        jobs = [job for job in jobs if not args.brief or stands_for_its_row(job)]
    rows = check_all(jobs, args.jobs)
    if not args.kernel and not args.candidates:
        rows += [check_column_sum(arch) for arch in arches]
    if args.also:
        rows += check_with(args.also, args)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            facts = " ".join(f"{k}={row[k]}" for k in list(row)[9:] if k != "problems")
            name = f"{row['arch']:<7}{row['kernel']:<18}{row['config']:<28}{row['arithmetic']:<6}"
            name += f"{row['dtype']:<5}{row['output']:<8} {row['activation'] or '-':<11}"
            name += f"{'+'.join(row['form']).lower() or '-':<22}{row['known']:<6}"
            print(f"{name}{'; '.join(row['problems']) or 'ok'}  {facts}")
    return int(any(row["problems"] for row in rows if row["arch"] in ENFORCED))


if __name__ == "__main__":
    sys.exit(main())
