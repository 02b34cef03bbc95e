"""Without a GPU: every configuration row compiles without spilling, and launches pass triton's JIT.

Both on two versions of triton. The second comes from a folder named by TPFFN_TRITON_36 (`make test` fills one); without
it those tests skip. sm_100 and gfx942 must compile; what they spill is printed and not enforced.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_report
import pytest

from tpffn_triton.kernels._configs import KERNELS, TABLES

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
TRITON_36 = os.environ.get("TPFFN_TRITON_36")
versions = pytest.mark.parametrize(
    "triton_folder",
    [
        pytest.param(None, id="installed"),
        pytest.param(
            TRITON_36,
            id="3.6.0",
            marks=pytest.mark.skipif(not TRITON_36, reason="TPFFN_TRITON_36 names no folder with triton 3.6.0"),
        ),
    ],
)


def run_compiling(*command, triton_folder=None) -> subprocess.CompletedProcess:
    """Run python in a process whose kernels are compiled, with the triton of a folder in place of the installed one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = (triton_folder, ROOT, ROOT / "tests")
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in path if p)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def gate(*arguments, triton_folder=None) -> tuple[int, list[dict]]:
    """Run compile_gate.py; return its exit status and rows."""
    script = ROOT / "tests" / "compile_gate.py"
    result = run_compiling(script, "--jobs", "2", "--json", *arguments, triton_folder=triton_folder)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


@versions
@pytest.mark.parametrize(
    "brief",
    [
        pytest.param(False, id="every-form", marks=[pytest.mark.nightly, pytest.mark.timeout(1800)]),
        pytest.param(True, id="brief"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_enforced_architectures(arch, brief, triton_folder):
    """Every row, with everything optional; at night in all its forms and outputs, with other activations, in fp16, and
    odd in another way."""
    status, rows = gate("--arch", arch, *["--brief"] * brief, triton_folder=triton_folder)
    problems = [row for row in rows if row["problems"]]
    assert not problems
    assert status == 0
    assert {row["kernel"] for row in rows} == {*KERNELS, "column_sum"}
    if triton_folder:
        assert {row["triton"] for row in rows} == {"3.6.0"}


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_reported_architectures(arch):
    _, rows = gate("--arch", arch, "--brief")
    for row in rows:
        if row["problems"]:
            print(row["kernel"], row["config"], row["dtype"], row["activation"], row["problems"])
    assert all("registers" in row for row in rows), "a row did not compile"


def test_the_gate_sees_spills():
    """The test of the test: a tile known to spill is reported, one that fits is not."""
    script = (
        "import compile_gate as gate\n"
        "from tpffn_triton.kernels._configs import Config\n"
        "options = gate.OPTIONS['linear_dact']\n"
        "for tile in ((128, 256, 64, 4, 3), (64, 64, 64, 4, 4)):\n"
        "    config = Config(*tile, USE_TMA=True)\n"
        "    variant = ('sm_90', 'linear_dact', config, '16bit', 'bf16', 'gelu', 'all', 'bf16', options)\n"
        "    print(bool(gate.check(gate.Variant(*variant))['problems']))\n"
    )
    result = run_compiling("-c", script)
    assert result.stdout.split() == ["True", "False"], result.stderr


def test_the_gate_sees_atomics(tmp_path):
    """The test of the test: an atomic sum is counted in the assembly of both vendors, a store is not; and no kernel may
    add floating point, not even one that counts."""
    script = tmp_path / "atomic_sum.py"
    script.write_text(
        "import triton, triton.language as tl\n"
        "from triton.compiler import ASTSource, compile\n"
        "import compile_gate as gate, compile_inspect as inspect\n"
        "@triton.jit\n"
        "def kernel(out, ADD: tl.constexpr):\n"
        "    offs = tl.arange(0, 128)\n"
        "    if ADD:\n"
        "        tl.atomic_add(out + offs, 1.0)\n"
        "    else:\n"
        "        tl.store(out + offs, 1.0)\n"
        "for arch in ('sm_80', 'sm_90', 'gfx942'):\n"
        "    for add in (True, False):\n"
        "        source = ASTSource(kernel, {'out': '*fp32', 'ADD': 'constexpr'}, {'ADD': add})\n"
        "        compiled = compile(source, target=gate.TARGETS[arch])\n"
        "        def report(counting):\n"
        "            if arch == 'gfx942':\n"
        "                return inspect.inspect_amd(compiled, arch, counting)\n"
        "            return inspect.inspect_nvidia(compiled, arch, 'ieee', None, None, counting)\n"
        "        print(bool(report({})['atomics']), bool(report({})['problems']))\n"
        "        print(any('floating point' in problem for problem in report(inspect.COUNTING)['problems']))\n"
    )
    result = run_compiling(script)
    assert result.stdout.split() == ["True", "True", "True", "False", "False", "False"] * 3, result.stderr


def test_the_committed_report_lists_todays_rows():
    listed = compile_report.listed((ROOT / "docs" / "compiled.md").read_text())
    assert [line[:-1] for line in listed] == [
        (arch, kernel, arithmetic, compile_report.describe(config, aligned))
        for arch in TABLES
        for kernel, arithmetic, config, aligned in compile_report.configurations(arch)
    ]
    assert not [line for line in listed if line[0] in compile_report.ENFORCED and line[-1] != "ok"]


@versions
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_what_launches_do_on_the_host(arch, triton_folder):
    """Six layers, aligned and odd, plain, gated, and with gradients of their own, at seven numbers of tokens each, in
    several launches, in one, and in that for few tokens, which has two rows for these: one variant a size and use,
    however many M; every address arrives; and nothing is called that a CUDA graph could not capture."""
    result = run_compiling(ROOT / "tests" / "jit_launches.py", arch, triton_folder=triton_folder)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # linear and dgrad share a kernel; the column sum reads db1's fp32 partials and dy.
    assert found["launches"] == {
        "ffn_kernel": [63, 4],
        "few_tokens_kernel": [21, 4],
        "linear_act_kernel": [28, 2],
        "linear_dact_kernel": [84, 2],
        "gated_linear_act_kernel": [14, 2],
        "gated_linear_dact_kernel": [42, 2],
        "matmul_kernel": [168, 4],
        "weight_grads_kernel": [56, 2],
        "wgrad_kernel": [98, 2],
        "column_sum_kernel": [140, 4],
    }
    assert found["dependent"] == [{"matmul_kernel": 42} if arch == "sm_90" else {}, True]
    assert found["operators"] == ["new_empty", "select", "slice", "view"]
    assert all(found["addresses"])
    assert bool(found["addresses"]) == (arch == "sm_90")  # sm_80 has no descriptors


def test_host_cost(tmp_path):
    """On an idle machine less than four times what three torch operations need without a launch; here others may be
    running. A launch that is prepared anew, or bound by Triton's JIT, at every call costs several times that."""
    result = run_compiling(ROOT / "bench" / "host_cost.py", "--json", tmp_path / "host_cost.json")
    assert result.returncode == 0, result.stderr
    without_gradients = json.loads((tmp_path / "host_cost.json").read_text())["rows"][0]
    assert without_gradients["ratio"] < 5.5, result.stdout
