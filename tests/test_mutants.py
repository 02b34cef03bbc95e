"""A test of the tests: each of these mistakes, made in a copy of the source, must turn the suite red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]

# name: (file, text, its replacement, tests that must notice)
MUTANTS = {
    "erf for tanh": (
        "kernels/activations.py",
        'if ACTIVATION == "gelu":\n        act = z',
        'if ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh":\n        act = z',
        "test_kernels.py -k test_linear_act",
    ),
    "derivative of tanh gelu without its inner term": (
        "kernels/activations.py",
        "tl.fma(z2, 0.134145, 1.0)",
        "tl.fma(z2, 0.044715, 1.0)",
        "test_kernels.py -k test_linear_dact",
    ),
    "last bias column dropped": (
        "kernels/_tiles.py",
        "vector_ptr + offs_n, mask=offs_n < N",
        "vector_ptr + offs_n, mask=offs_n < N - 1",
        "test_kernels.py -k one_hot",
    ),
    "K tile skipped on the pointer path": (
        "kernels/_tiles.py",
        "        for k in range(0, K, BLOCK_K):\n            if TRANS_A:\n                a_tile = tl.load",
        "        for k in range(0, K - BLOCK_K, BLOCK_K):\n            if TRANS_A:\n                a_tile = tl.load",
        "test_kernels.py -k small_integers",
    ),
    "K mask off by one": (
        "kernels/_tiles.py",
        "b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - k, other=0.0)",
        "b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - k - 1, other=0.0)",
        "test_kernels.py -k small_integers",
    ),
    "last row not stored": (
        "kernels/_tiles.py",
        "        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)\n        tl.store(",
        "        mask = (offs_m[:, None] < M - 1) & (offs_n[None, :] < N)\n        tl.store(",
        "test_kernels.py -k small_integers",
    ),
    "accumulator rounded to bf16": (
        "kernels/_tiles.py",
        "acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)\n    else:",
        "acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)\n    else:",
        "test_kernels.py -k every_configuration_row",
    ),
    "halves of a split epilogue swapped": (
        "kernels/_tiles.py",
        "tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))",
        "tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2))",
        "test_kernels.py -k every_configuration_row",
    ),
    "wrapped rows counted in db1": (
        "kernels/linear_dact.py",
        "tl.where(offs_m[:, None] < M, grad, 0.0)",
        "grad",
        "test_kernels.py -k test_linear_dact",
    ),
    "db1 from rounded d_pre": (
        "kernels/linear_dact.py",
        "    grad = acc * derivative\n",
        "    grad = (acc * derivative).to(tl.bfloat16).to(tl.float32)\n",
        "test_kernels.py -k test_linear_dact",
    ),
    "last partial row of a column sum lost": (
        "kernels/column_sum.py",
        "mask=(offs_r[:, None] < R)",
        "mask=(offs_r[:, None] < R - 1)",
        "test_kernels.py -k column_sum",
    ),
    "alignment of the base ignored": (
        "kernels/_launch.py",
        "t.data_ptr() % 16 == 0",
        "True",
        "test_kernels.py -k tma_cannot_address",
    ),
    "rows that overlap sent to TMA": (
        "kernels/_launch.py",
        "and t.stride(0) >= t.shape[1]",
        "",
        "test_kernels.py -k tma_cannot_address",
    ),
    "b2 added by every rank": (
        "tpffn_triton/functional.py",
        "b2 if group.rank() == 0 else None",
        "b2",
        "test_distributed.py -k unsharded_reference",
    ),
    "dx not reduced": (
        "tpffn_triton/functional.py",
        "dx = start_all_reduce(dx, ctx.group)",
        "dx = dx",
        "test_distributed.py -k unsharded_reference",
    ),
    "shards of w2 cut along rows": (
        "tpffn_triton/sharding.py",
        "w2[:, own].contiguous()",
        "w2.reshape(H, world_size, -1)[:, rank].roll(1, 1).contiguous()",
        "test_module.py -k shard",
    ),
    "full weights depend on P": (
        "tpffn_triton/module.py",
        "nn.init.kaiming_uniform_(weight, a=math.sqrt(5))",
        "nn.init.kaiming_uniform_(weight, a=math.sqrt(5)); torch.rand(self.world_size)",
        "test_distributed.py -k same_seed",
    ),
}


def run_tests(tree: Path, selection: str) -> subprocess.CompletedProcess:
    """Run a selection of tests in a copy of the tree, which shadows the installed package."""
    file, *options = selection.split(maxsplit=2)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, f"tests/{file}", *options], cwd=tree, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def tree(tmp_path) -> Path:
    """Return a copy of the sources that may be broken."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("kernels", "tpffn_triton", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tree):
    file, text, replacement, selection = MUTANTS[name]
    source = (tree / file).read_text()
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {file}"
    (tree / file).write_text(source.replace(text, replacement))
    result = run_tests(tree, selection)
    assert result.returncode == 1, f"not caught:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    # A syntax error would be red as well: the tests must have run and one of them failed.
    assert "1 failed" in result.stdout, result.stdout[-2000:]


def test_the_copy_is_what_runs(tree):
    """Unbroken, the same selections pass; and the copy, not the installed package, is imported."""
    probe = tree / "tests" / "test_where.py"
    probe.write_text(
        "import tpffn_triton, pathlib\n"
        "def test_where():\n"
        f"    assert pathlib.Path(tpffn_triton.__file__).is_relative_to({str(tree)!r})\n"
    )
    assert run_tests(tree, "test_where.py").returncode == 0
    assert run_tests(tree, "test_kernels.py -k smoke").returncode == 0
