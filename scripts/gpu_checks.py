"""Run everything that needs a GPU: kernel tests, memory checker and benchmark; one folder of results.

    python3 scripts/gpu_checks.py [--results DIR] [--budget 540] [--only STEP,STEP] [--dry-run]

    environment    what the machine and its packages are
    tests          every test that is not marked cpu_only, on CUDA
    sanitizer      the smallest tests of the kernels, of the launches of both GEMMs and of the weight gradients' under
                   compute-sanitizer's memcheck; skipped where it is missing
    bench_eager    the analysed model at P=4 against eager
    bench_graph    the same inside CUDA graphs
    bench_peers    one rank's shard beside every peer that is installed (bench/peers.py), inside CUDA graphs
    bench_peers_gelu     the analysed shard and decoding with erf in the activation, which few peers fuse
    bench_peers_swiglu   the same, gated
    first_call     seconds to the first result in a new process, with the compiler's cache empty and full
    bench_forms    the analysed model's shard at 64 to 8192 tokens in one launch and in several, inside CUDA graphs

It uses the packages of the python that runs it and of PYTHONPATH, where a folder with peers (megatron-core,
Liger-Kernel, nvmath-python ...) may be given; it installs nothing and needs no network. A step that fails or runs out
of its time does not stop the next one; time that a step leaves over goes to the steps after it.

Results: environment.json (machine, versions, commit; each step's command, status and seconds), log.txt,
tests.xml (JUnit), bench_eager.json and .png, bench_graph.json and .png, bench_peers.json, bench_peers_gelu.json,
bench_peers_swiglu.json, first_call.json, bench_forms.json and .png.
Exit status: 0 all passed; 1 a step failed; 2 no CUDA device, or wrong arguments.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "matplotlib",
    "tabulate",
    "megatron-core",
    "liger-kernel",
    "nvmath-python",
    "transformer-engine",
    "quack-kernels",
)
# In its own process, with a time limit: a broken driver can hang, and a context here would skew benchmarks.
DESCRIBE = """\
import json, torch, triton
p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps(p and {
    "name": p.name, "capability": [p.major, p.minor], "processors": p.multi_processor_count,
    "memory_bytes": p.total_memory, "devices": torch.cuda.device_count(),
    "cuda": torch.version.cuda, "hip": torch.version.hip,
}))
"""
KEPT_BYTES = 1 << 20  # what log.txt keeps of each end of a step's output
GRACE = 5  # seconds between asking a step to end and killing it


@dataclass
class Step:
    """One command. `seconds` is its share of the budget; `produces` are files of the results folder."""

    name: str
    command: list[str]
    seconds: float
    produces: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    status: str = ""
    took: float = 0.0


def plan(results: Path, budget: float) -> list[Step]:
    """Return the steps after `environment`, in order; their shares leave it 10 of 540 seconds."""
    python, share = sys.executable, budget / BUDGET

    def bench(name: str, seconds: float, *flags: str, plot: bool = True, script: str = "ffn_bench") -> Step:
        command = [python, f"bench/{script}.py", "--dtype", "bf16", *flags]
        command += ["--json", str(results / f"bench_{name}.json")]
        produces: tuple[str, ...] = (f"bench_{name}.json",)
        if plot:
            command += ["--plot", str(results / f"bench_{name}.png")]
            produces += (f"bench_{name}.png",)
        return Step(f"bench_{name}", command, seconds * share, produces)

    def peers(name: str, seconds: float, *flags: str) -> Step:
        # The rest is for what each peer takes to begin.
        limit = ("--run", "graph", "--budget", f"{0.8 * seconds * share:.0f}")
        return bench(name, seconds, *flags, *limit, plot=False, script="peers")

    pytest = [python, "-m", "pytest", "-m", "not cpu_only"]
    # The thread method ends a worker whose kernel hangs; a signal would wait for the kernel.
    tests = [*pytest, "-n", "8", "--dist", "worksteal", "--timeout", "120", "--timeout-method", "thread"]
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    memcheck = [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    # Libraries probe with calls that may fail, and handle it; only bad memory accesses count here.
    memcheck += ["--report-api-errors", "no"]
    # Launches are slow under it: one dtype where a test is there for each.
    few = "test_few_tokens and fp64 and gelu-torch.bfloat16"
    smallest = ["-k", f"smoke and (test_kernels or bfloat16) or {few}"]
    smallest += [f"tests/test_{name}.py" for name in ("single_launch", "few_tokens", "weight_grads", "kernels")]
    # Named: where megatron-core is installed too, these steps have the same rows and the same seconds.
    ours = ("--impl", "unfused,fused")
    return [
        Step("tests", [*tests, f"--junit-xml={results / 'tests.xml'}", "tests"], 164 * share, ("tests.xml",)),
        Step(
            "sanitizer",
            [*memcheck, *pytest, "-x", "-p", "no:xdist", *smallest],
            74 * share,
            # Each tensor in an allocation of its own: inside torch's pool an overrun lands in valid memory.
            environ={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip="" if sanitizer else "compute-sanitizer is not installed",
        ),
        bench("eager", 38, "--tp", "4", *ours),
        bench("graph", 38, "--tp", "4", "--graph", *ours),
        peers("peers", 100, "--activation", "gelu_tanh"),
        peers("peers_gelu", 34, "--regime", "analysed,decode"),
        peers("peers_swiglu", 30, "--activation", "swiglu", "--regime", "analysed,decode"),
        Step(
            "first_call",
            [python, "bench/first_call.py", "--json", str(results / "first_call.json")],
            20 * share,
            ("first_call.json",),
        ),
        bench("forms", 32, "--graph", script="forms_bench"),
    ]


def environment() -> dict[str, str]:
    """Return the variables of every step: kernels compiled, and this checkout's package found first."""
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    return environ | {"PYTHONUNBUFFERED": "1"}


def query(*command: str) -> str:
    """Return a short command's output, or "" when it is missing, fails or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(
            command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, text=True, timeout=60
        )
        return output.strip()
    return ""


def describe_device() -> dict[str, Any] | None:
    """Return what torch says of device 0, or None without one that torch and triton can use."""
    lines = query(sys.executable, "-c", DESCRIBE).splitlines()
    return json.loads(lines[-1]) if lines else None


def describe_machine(device: dict[str, Any]) -> dict[str, Any]:
    """Return what environment.json says beside the steps."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    smi = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "commit": query("git", "rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(query("git", "status", "--porcelain")),
        "device": device,
        "nvidia_smi": query("nvidia-smi", f"--query-gpu={smi}", "--format=csv") or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": packages,
    }


def run(step: Step, limit: float, log: Path) -> str:
    """Run a step for at most `limit` seconds, append its output to `log`; return "passed" or what failed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment() | step.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a test's workers can be stopped with it
        )
        try:
            code = process.wait(limit)
            outcome = f"failed: exit status {code}" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome = f"failed: stopped after {limit:.0f} s"
        finally:
            stop(process)
        text = shorten(output)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"===== {step.name}: {outcome}\n$ {shlex.join(step.command)}\n{text}\n")
    tail = text.splitlines()[-(15 if outcome == "passed" else 60) :]
    print("\n".join(f"    {line}" for line in tail), flush=True)
    return outcome


def stop(process: subprocess.Popen) -> None:
    """End what is left of a step's process group: ask, wait for GRACE seconds, kill."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shorten(output: BinaryIO) -> str:
    """Return a file's text, without the middle where it is longer than twice KEPT_BYTES."""
    left_out = output.seek(0, os.SEEK_END) - 2 * KEPT_BYTES
    output.seek(0)
    data = output.read(KEPT_BYTES)
    if left_out > 0:
        data += f"\n... {left_out} bytes left out ...\n".encode()
        output.seek(left_out, os.SEEK_CUR)
    return (data + output.read()).decode(errors="replace")


def table(done: list[Step]) -> str:
    """Lay out step, seconds, files and status as aligned text."""
    rows = [("step", "seconds", "files", "status")]
    rows += [(s.name, f"{s.took:.1f}", ", ".join(s.produces) or "-", s.status) for s in done]
    name, files = (max(len(row[column]) for row in rows) for column in (0, 2))
    return "\n".join(f"{row[0]:<{name}}  {row[1]:>7}  {row[2]:<{files}}  {row[3]}" for row in rows)


def parse_args() -> argparse.Namespace:
    """Parse the command line; exits with status 2 on wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, help="default: bench/results/<date>_<gpu>")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all (default: %(default)s)")
    parser.add_argument("--only", help="comma-separated steps; environment always runs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    known = [step.name for step in plan(Path(), args.budget)]
    args.only = args.only.split(",") if args.only else known
    if unknown := set(args.only) - set(known):
        parser.error(f"--only {','.join(sorted(unknown))}: the steps are {', '.join(known)}")
    return args


def main() -> int:
    """Run the selected steps; return the exit status that the module's docstring lists."""
    started = time.monotonic()
    args = parse_args()
    device = None if args.dry_run else describe_device()
    if device is None and not args.dry_run:
        print("gpu_checks: no CUDA device that torch and triton can use; nothing was run", file=sys.stderr)
        return 2
    gpu = re.sub(r"[^A-Za-z0-9.]+", "-", device["name"] if device else "gpu").strip("-")
    results = args.results or ROOT / "bench" / "results" / f"{datetime.date.today()}_{gpu}"
    results = results.resolve()  # the steps run in ROOT
    steps = [step for step in plan(results, args.budget) if step.name in args.only]
    if device is None:
        for step in steps:
            variables = "".join(f"{key}={value} " for key, value in step.environ.items())
            note = f"  # skipped: {step.skip}" if step.skip else ""
            print(f"{step.name}: {variables}{shlex.join(step.command)}{note}")
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that `run` stops its step
    results.mkdir(parents=True, exist_ok=True)
    (results / "log.txt").write_text("", encoding="utf-8")
    machine = describe_machine(device)
    done = [Step("environment", [], 0, ("environment.json",), status="passed")]
    done[0].took = time.monotonic() - started
    for index, step in enumerate(steps):
        reserved = sum(later.seconds for later in steps[index + 1 :] if not later.skip)
        begun = time.monotonic()
        limit = args.budget - (begun - started) - reserved - GRACE
        for name in step.produces:  # a file of an earlier run must not pass for this one's
            (results / name).unlink(missing_ok=True)
        if step.skip:
            step.status = f"skipped: {step.skip}"
        elif limit <= 0:
            step.status = "failed: no time left"
        else:
            print(f"[{index + 1}/{len(steps)}] {step.name}: at most {limit:.0f} s", flush=True)
            step.status = run(step, limit, results / "log.txt")
        missing = [name for name in step.produces if not (results / name).is_file()]
        if step.status == "passed" and missing:
            step.status = f"failed: did not write {', '.join(missing)}"
        step.took = time.monotonic() - begun
        done.append(step)
        # After every step, so that a run that is cut off leaves a report too.
        report = {**machine, "steps": [asdict(each) for each in done[1:]]}
        (results / "environment.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(done)}\n\nresults in {results}")
    return int(any(step.status.startswith("failed") for step in done))


if __name__ == "__main__":
    sys.exit(main())
