"""Ask the compiler, ahead of time and in processes without a GPU, which candidates are worth launching.

tests/compile_gate.py compiles each in its heaviest variant and says what is wrong with it: spills, too much shared
memory, tensor cores or asynchronous copies lost from the K loop, what the lint of the PTX finds. A launch finds what
was compiled here in Triton's cache.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkout
from budget import Budget

from tpffn_triton.kernels._configs import Config

GATE = checkout.ROOT / "tests" / "compile_gate.py"
OK = "ok"


class FilterFailed(RuntimeError):
    """The gate did not report; the message says why."""


class OutOfTime(FilterFailed):
    """The budget is spent."""


class Filter:
    """Compiles for an architecture in the background, `jobs` at once, until the budget is spent."""

    def __init__(self, arch: str, arithmetic: str, jobs: int, budget: Budget) -> None:
        self.arch, self.arithmetic, self.jobs, self.budget = arch, arithmetic, jobs, budget
        self._batches = ThreadPoolExecutor(1)
        self._running: subprocess.Popen | None = None

    def __enter__(self) -> "Filter":
        return self

    def __exit__(self, *_: object) -> None:
        self.budget = Budget(0)  # nothing is begun any more
        self._batches.shutdown(wait=False, cancel_futures=True)
        self._kill()

    def start(self, kernel: str, configs: Sequence[Config]) -> "Future[dict[Config, str]]":
        """Return what will be OK or the problems of each configuration of a kernel, after what was started before.

        Its result raises: OutOfTime: the budget is spent. FilterFailed: the gate ended without a report.
        """
        return self._batches.submit(self._verdicts, kernel, configs)

    def _verdicts(self, kernel: str, configs: Sequence[Config]) -> dict[Config, str]:
        with tempfile.TemporaryDirectory(prefix="tune_") as folder:
            path = Path(folder) / "candidates.json"
            asked = [{"kernel": kernel, "arithmetic": self.arithmetic, "config": config.meta} for config in configs]
            path.write_text(json.dumps(asked))
            rows = self._reported(f"--arch={self.arch}", f"--candidates={path}", f"--jobs={self.jobs}", "--json")
        return {config: "; ".join(row["problems"]) or OK for config, row in zip(configs, rows, strict=True)}

    def _reported(self, *flags: str) -> list[dict[str, Any]]:
        left = self.budget.left()
        if left == 0:
            raise OutOfTime("no time was left to compile candidates")
        # Kernels that are to be compiled must not be interpreted, and the GPU is left to what is measured meanwhile.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(checkout.ROOT), os.environ.get("PYTHONPATH"))))
        # In a session of its own, so that its workers can be ended with it.
        self._running = subprocess.Popen(
            [sys.executable, str(GATE), *flags],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = self._running.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            raise OutOfTime(f"compiling candidates took longer than the {left:.0f} s that were left") from None
        finally:
            self._kill()
        try:
            return json.loads(stdout)
        except json.JSONDecodeError:
            last = (stderr.strip().splitlines() or [f"exit status {self._running.returncode}"])[-1]
            raise FilterFailed(f"{GATE.name} reported nothing: {last}") from None

    def _kill(self) -> None:
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
