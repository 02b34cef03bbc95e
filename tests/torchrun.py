"""Run scripts as their pages show it, by torchrun on this machine without a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def torchrun(
    processes: int, *command: str, folder: Path, seconds: float = 240, preexec_fn: Callable | None = None
) -> subprocess.CompletedProcess:
    """Run a script and its arguments on so many ranks, or with 0 by python alone; it must succeed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = [str(ROOT), str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *(launcher if processes else []), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=preexec_fn,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_block(code: str, folder: Path, prologue: str = "", epilogue: str = "") -> str:
    """Run a page's Python as example.py, by torchrun where a comment in it says so; return its output."""
    (folder / "example.py").write_text(prologue + code + epilogue)
    processes = [int(number) for number in re.findall(r"# torchrun --nproc-per-node (\d+) example\.py", code)]
    return torchrun(*processes or [0], "example.py", folder=folder).stdout
