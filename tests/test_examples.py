"""examples/train_2d.py over two "hosts": two torchrun agents, two ranks each, as a 2 × 2 mesh (dp, tp) over gloo."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_2d.py"
BEST_LINEAR_MAP = 0.36  # of the example's task
TIMEOUT_S = 200  # for a run that takes 8 s on an idle machine

spec = importlib.util.spec_from_file_location("train_2d", EXAMPLE)
train_2d = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_2d)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(commands: list, folder: Path, **variables) -> list[str]:
    """Run commands side by side until all have exited with 0; return what each wrote. They end with the test."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    logs = [folder / f"log{number}" for number in range(len(commands))]
    processes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=folder,
                        env=environment,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + TIMEOUT_S
        # An agent whose peer has failed waits for it: stop at the first that fails.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun takes its ranks along
                process.wait(30)
    output = [log.read_text() for log in logs]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(output)
    return output


def results(folder: Path) -> tuple[dict, dict]:
    return json.loads((folder / "out.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


TRAIN = (str(EXAMPLE), "--steps", "80", "--hidden", "32", "--ffn", "128", "--json", "out.json", "--save", "weights.pt")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses and weights of the same training in one process, without torchrun: world size 1, TP 1."""
    folder = tmp_path_factory.mktemp("one_process")
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    finish([TRAIN], folder, **place)
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2", "fsdp2 --sequence-parallel"])
def test_two_hosts_train_as_one_process_does(data_parallel, one_process, tmp_path):
    """Same losses, same full weights on all ranks bit for bit, and one process' weights but for rounding."""
    agent = (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --local-addr localhost "
        f"--rdzv-endpoint localhost:{free_port()}"
    ).split()
    output = finish([(*agent, *TRAIN, "--tp", "2", "--data-parallel", *data_parallel.split())] * 2, tmp_path)
    assert sum(text.count("step   79  loss") for text in output) == 1, "progress comes from rank 0 alone"
    assert not any("warning: --tp" in text for text in output)

    report, weights = results(tmp_path)
    assert [(r["rank"], r["node"], r["dp"], r["tp"]) for r in report["ranks"]] == [
        (0, 0, 0, 0),
        (1, 0, 0, 1),
        (2, 1, 1, 0),
        (3, 1, 1, 1),
    ], "a tp group is a node"
    assert len({r["sha256"] for r in report["ranks"]}) == 1, "replicas hold different bits"

    alone, right = one_process
    losses = [entry["loss"] for entry in report["losses"]]
    assert losses[-1] < BEST_LINEAR_MAP < losses[0]
    assert losses == pytest.approx([entry["loss"] for entry in alone["losses"]], rel=1e-5)
    assert list(weights) == list(right)
    for name, weight in weights.items():
        # Sums over F and over the batch are cut in two, so they round differently: by one unit in the last place, 6e-8,
        # after one step, and more after 80. A gradient that is not averaged, or a repeated sample, shows at 1e-2.
        error = (weight - right[name]).abs().max() / right[name].abs().max()
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_a_tp_group_across_nodes_is_warned_about():
    assert train_2d.placement_warning(2, 2) is None
    assert train_2d.placement_warning(2, 8) is None
    assert "--tp 4 does not divide the 2 processes of a node" in train_2d.placement_warning(4, 2)
    assert "cross nodes" in train_2d.placement_warning(3, 4)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--tp 3", "4", "--tp 3 does not divide the 4 processes"),
        ("--tp 4 --ffn 6", "4", "--tp 4 does not divide --ffn 6"),
        ("--tp 0", "4", "--tp must be at least 1, got 0"),
        ("--tp 2 --batch 7", "4", "--batch 7 is not divisible by the 2 data-parallel replicas"),
        ("--tp 2 --batch 6 --sequence-parallel", "4", "--sequence-parallel cuts --batch 6 into 4 equal parts"),
        ("", None, "start it with torchrun"),
    ],
)
def test_wrong_arguments_are_refused_before_any_communication(flags, world_size, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_2d.py", *flags.split()])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit, match="2"):
        train_2d.parse_arguments()
    assert message in capsys.readouterr().err
