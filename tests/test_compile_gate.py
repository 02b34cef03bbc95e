"""Without a GPU: every configuration row compiles without spilling, and launches pass triton's JIT.

Both on two versions of triton. The second comes from a folder named by TPFFN_TRITON_36 (`make test` fills one); without
it those tests skip. sm_100 and gfx942 must compile; what they spill is printed and not enforced.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpffn_triton.kernels._configs import KERNELS

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
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_enforced_architectures(arch, triton_folder):
    status, rows = gate("--arch", arch, triton_folder=triton_folder)
    problems = [row for row in rows if row["problems"]]
    assert not problems
    assert status == 0
    assert {row["kernel"] for row in rows} == {*KERNELS, "column_sum"}
    if triton_folder:
        assert {row["triton"] for row in rows} == {"3.6.0"}


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_reported_architectures(arch):
    _, rows = gate("--arch", arch)
    for row in rows:
        if row["problems"]:
            print(row["kernel"], row["config"], row["dtype"], row["activation"], row["problems"])
    assert all("registers" in row for row in rows), "a row did not compile"


def test_the_gate_sees_spills():
    """The test of the test: a tile known to spill is reported, one that fits is not."""
    script = (
        "import compile_gate as gate\n"
        "from tpffn_triton.kernels._configs import Config\n"
        "for tile in ((128, 256, 64, 4, 3), (64, 64, 64, 4, 4)):\n"
        "    config = Config(*tile, USE_TMA=True)\n"
        "    row = gate.check(('sm_90', 'linear_dact', config, '16bit', 'bf16', 'gelu', True))\n"
        "    print(bool(row['problems']))\n"
    )
    result = run_compiling("-c", script)
    assert result.stdout.split() == ["True", "False"], result.stderr


@versions
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_launches_pass_the_jit_and_new_token_counts_compile_nothing(arch, triton_folder):
    """Two layer sizes, aligned and odd, at seven numbers of tokens each: one variant a size and use, however many M."""
    result = run_compiling(ROOT / "tests" / "jit_launches.py", arch, triton_folder=triton_folder)
    assert result.returncode == 0, result.stderr
    # linear and dgrad share a kernel; the column sum reads db1's fp32 partials and dy.
    assert json.loads(result.stdout) == {
        "linear_act_kernel": [14, 2],
        "matmul_kernel": [28, 4],
        "linear_dact_kernel": [14, 2],
        "column_sum_kernel": [28, 4],
        "wgrad_kernel": [28, 2],
    }
