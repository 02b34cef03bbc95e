"""Every configuration row compiles ahead of time without spilling, for sm_80 and sm_90, on two versions of triton.

The second version comes from a folder named by TPFFN_TRITON_36 (`make test` fills one); without it those tests skip.
sm_100 and gfx942 must compile; what they spill is reported in the test's output and not enforced.
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
VERSIONS = [
    pytest.param(None, id="installed"),
    pytest.param(
        TRITON_36,
        id="3.6.0",
        marks=pytest.mark.skipif(not TRITON_36, reason="TPFFN_TRITON_36 names no folder with triton 3.6.0"),
    ),
]


def gate(*arguments, triton_folder=None) -> tuple[int, list[dict]]:
    """Run compile_gate.py in a process that compiles; return its exit status and rows."""
    path = os.pathsep.join(str(p) for p in (triton_folder, ROOT) if p)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_gate.py", "--jobs", "2", "--json", *arguments],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("triton_folder", VERSIONS)
def test_enforced_architectures(triton_folder, arch):
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
        "for tile in ((128, 256, 64, 4, 3), (128, 64, 64, 4, 4)):\n"
        "    config = Config(*tile, USE_TMA=True)\n"
        "    row = gate.check(('sm_90', 'linear_dact', config, '16bit', 'bf16', 'gelu', True))\n"
        "    print(bool(row['problems']))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]
