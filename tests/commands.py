"""Run the repository's commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run Python from elsewhere, without the package on the path, kernels not interpreted."""
    dropped = ("TRITON_INTERPRET", "PYTHONPATH", "RANK", "WORLD_SIZE")
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=240, check=False, env=environ, cwd=ROOT / "tests",
    )  # fmt: skip
