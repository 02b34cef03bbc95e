"""The bytes that bench/traffic_bench.py counts, the counters that it reads, and the textbook ring beside its plan."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import ROOT, run
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "bench"))

import network
import ranks
import ring
import traffic_bench
import traffic_measure
from network import Interface, Sent
from workloads import SHAPES

from tpffn_triton.plan import ring_all_reduce

pytestmark = pytest.mark.cpu_only
BENCH = ROOT / "bench" / "traffic_bench.py"
ARGUMENTS = ("--quick", "--tp=2", "--repeats=3")
# gloo sends 144 bytes beside a message, and a round of its rings is two messages at this size.
MESSAGE = 200


def reduce_in_a_ring(rank: int, world_size: int, values: list[list[int]]) -> tuple[list[float], int, int]:
    t = torch.tensor(values[rank], dtype=torch.float32)
    counts = ring.all_reduce(t, dist.group.WORLD)
    return t.tolist(), counts.rounds, counts.elements


@settings(deadline=None, max_examples=12)
@given(world_size=st.sampled_from([2, 3, 4]), elements=st.integers(0, 40))
@example(world_size=4, elements=3)  # chunks without an element
@example(world_size=3, elements=8)  # one shorter chunk
def test_ring_adds_and_sends_what_is_planned(ranks_of: Any, world_size: int, elements: int) -> None:
    values = [[(7 * rank + 3 * n) % 11 - 5 for n in range(elements)] for rank in range(world_size)]
    results = ranks_of(world_size).run(reduce_in_a_ring, values)
    chunk, longer = divmod(elements, world_size)
    chunks = [chunk + (number < longer) for number in range(world_size)]
    for rank, (summed, rounds, sent) in enumerate(results):
        assert summed == [sum(column) for column in zip(*values, strict=True)]
        assert rounds == 2 * (world_size - 1)
        assert sent == 2 * elements - chunks[(rank + 1) % world_size] - chunks[(rank + 2) % world_size]
    every = [sent for _, _, sent in results]
    assert (max(every), sum(every), results[0][1]) == ring_all_reduce(elements, world_size)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, Path]:
    try:
        network.unshare_command()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("traffic")
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("GLOO_SOCKET_IFNAME", "eth7")  # of the machine, not of the namespace
        done = run(BENCH, *ARGUMENTS, "--json", folder / "out.json", "--plot", folder / "new" / "out.png")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())["rows"], done.stdout, folder


def test_every_collective_and_layer_of_the_plans_is_counted(counted: Any) -> None:
    rows, _, _ = counted
    small = SHAPES["small"]
    assert {(row["batch"], row["hidden"], row["tp"]) for row in rows} == {(small.batch, small.hidden, 2)}
    plans = traffic_measure.plans(traffic_measure.Settings(small, "fp32", "gelu", 1, ""))
    shown = [(row["case"], row["planned"][0]["elements"]) for row in rows if row["kind"] == "collective"]
    assert sorted(shown) == sorted({(c.kind, c.elements) for plan in plans.values() for c in plan.collectives})
    layers = {(row["case"], row["pass"]): row for row in rows if row["kind"] == "layer"}
    assert [*layers] == [(name, pass_) for name in plans for pass_ in ("forward", "backward")]
    for (name, pass_), row in layers.items():
        collectives = [c for c in plans[name].collectives if c.pass_ == pass_]
        assert row["planned_bytes"] == sum(c.sent_total_bytes for c in collectives) > 0
        assert row["planned_rounds"] == sum(c.rounds for c in collectives)


def test_tcp_carries_the_tensors_of_the_algorithm_and_headers_of_messages(counted: Any) -> None:
    rows, _, _ = counted
    for row in rows[1:]:
        messages = 2 * sum(2 if c["kind"] == "all_gather" else 4 for c in row["planned"])
        assert 0 < row["tcp_bytes"] - row["algorithm_bytes"] <= MESSAGE * messages
        assert row["ratio"] == row["tcp_bytes"] / row["planned_bytes"]
        assert sum(row["tcp_bytes_per_rank"]) == pytest.approx(row["tcp_bytes"])
        # Slices are equal, and so are the ranks.
        assert row["tcp_bytes_per_rank"] == pytest.approx([row["tcp_bytes"] / 2] * 2)
        assert row["planned_bytes_per_rank"] < row["tcp_bytes_per_rank"][0]
    for row in rows[1:]:
        twice = row["case"] == "reduce_scatter"
        if row["kind"] in ("collective", "ring"):
            assert row["ratio"] == pytest.approx(2 if twice else 1, rel=0.02)


def test_the_wire_carries_headers_and_nothing_of_others(counted: Any) -> None:
    rows, _, _ = counted
    nothing, *cases = rows
    assert (nothing["kind"], nothing["tcp_bytes"], nothing["wire_bytes"], nothing["packets"]) == ("nothing", 0, 0, 0)
    for row in cases:
        least = row["tcp_bytes"] + row["retransmitted_bytes"] + 40 * row["packets"]  # of IP and TCP, without options
        assert least <= row["wire_bytes"] <= least + 60 * row["packets"]


def test_the_ring_of_the_benchmark_sends_what_is_planned(counted: Any) -> None:
    rows, out, _ = counted
    (row,) = (row for row in rows if row["kind"] == "ring")
    assert (row["planned"][0]["tensor"], row["planned"][0]["elements"]) == ("y", 65536)
    assert (row["ring_rounds"], row["ring_elements_per_rank"]) == (2, [65536, 65536])
    assert (row["planned_rounds"], row["planned_elements"]) == (2, 131072)
    assert "textbook ring, P=2: 2 rounds (planned 2), 65,536 elements sent by a rank, 131,072 in all" in out


def test_output_and_recorded_command(counted: Any) -> None:
    rows, out, folder = counted
    for row in rows:
        assert f"{traffic_bench.title(row)}  " in out
        assert row["command"].split()[:4] == ["bench/traffic_bench.py", *ARGUMENTS]
        assert network.OUTSIDE not in row["command"]
        assert (row["collectives"], row["ranks"], row["repeats"]) == ("gloo", 2, 3)
    assert (folder / "new" / "out.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.splitlines())) <= 140


def test_drawn_again_from_its_file(counted: Any) -> None:
    _, out, folder = counted
    done = run(BENCH, "--from", folder / "out.json", "--plot", folder / "again.png")
    assert (done.returncode, done.stdout) == (0, out)
    assert (folder / "again.png").read_bytes().startswith(b"\x89PNG")


def test_a_socket_counts_what_it_sends() -> None:
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = opened.enter_context(socket.create_connection(server.getsockname()))
        accepted = opened.enter_context(server.accept()[0])
        before, wire = network.tcp_sent(), network.loopback()
        client.sendall(bytes(5000))
        assert len(accepted.recv(5000, socket.MSG_WAITALL)) == 5000
        accepted.sendall(bytes(70))
        assert len(client.recv(70, socket.MSG_WAITALL)) == 70
        after, wire_after = network.tcp_sent(), network.loopback()
    sent = network.sent_between(before, after)
    assert sent.bytes - sent.retransmitted == 5070
    assert sorted(after[name].bytes - before[name].bytes for name in before)[-1] >= 5000
    assert wire_after.bytes - wire.bytes >= 5070 + 40 * 2
    assert wire_after.packets - wire.packets >= 2


def test_sent_between_two_readings() -> None:
    before = {"a": Sent(100, 10), "b": Sent(5, 0)}
    after = {"a": Sent(150, 30), "b": Sent(5, 0), "new": Sent(7, 1)}
    assert network.sent_between(before, after) == Sent(57, 21)
    with pytest.raises(RuntimeError, match="1 of 2 connections were closed"):
        network.sent_between(before, {"a": Sent(150, 30)})


def test_a_reading_waits_until_nothing_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [Interface(1, 1), Interface(2, 2), Interface(3, 3), Interface(3, 3), Interface(9, 9)]
    monkeypatch.setattr(network, "loopback", lambda: readings.pop(0))
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    assert network.quiet_loopback() == Interface(3, 3)


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "run", None)
    monkeypatch.setattr(os, "execvp", None)


def refusal(capsys: Any, *arguments: str) -> str:
    """Return the one line that arguments end in."""
    with pytest.raises(SystemExit) as caught:
        traffic_bench.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--tp=1",), "every P at least 2, got '1'"),
        (("--tp=2,x",), "got '2,x'"),
        (("--tp=3",), "ffn_hidden_size 4096 is not divisible by the tensor-parallel world_size 3"),
        (("--seq=6", "--tp=4"), "seq must be divisible by tp, got seq=6, tp=4"),
        (("--batch=0",), "batch must be at least 1, got 0"),
        (("--repeats=0",), "--repeats must be at least 1, got 0"),
        (("--dtype=fp8",), "invalid choice: 'fp8'"),
        (("--plot=x.txt",), ".png, .pdf or .svg, got x.txt"),
        (("--json=/proc/no/x",), "cannot write /proc/no/x"),
        (("--from=/proc/no/x",), "cannot read /proc/no/x"),
        (("--from=pyproject.toml",), "pyproject.toml was not written by traffic_bench.py --json"),
        (("--from=nowhere.json", "--tp=8"), "--from measures nothing: it cannot go with --tp"),
        (("--dtype=bf16", "--from=nowhere.json"), "--from measures nothing: it cannot go with --dtype"),
        (("--from=nowhere.json", "--json=/proc/no/x"), "cannot write /proc/no/x"),
        (("--quick", "--outside=x"), "unrecognized arguments: --outside=x"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments: Any, shown: str, no_ranks: None, capsys: Any) -> None:
    assert shown in refusal(capsys, *arguments)


def test_torchrun_is_refused(no_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in refusal(capsys, "--quick")


def unshare_that(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make a command `unshare` the only one on the path."""
    command = folder / "unshare"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_unshare(no_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = refusal(capsys, "--quick")
    assert "needs Linux, `unshare` of util-linux, and permission for network namespaces" in shown
    assert "No such file or directory: 'unshare'" in shown


def test_without_permission(no_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    unshare_that(tmp_path, monkeypatch, "echo first; echo unshare failed: Operation not permitted >&2; exit 1")
    shown = refusal(capsys, "--quick")
    assert "permission for network namespaces" in shown
    assert shown.endswith("unshare failed: Operation not permitted\n")


def test_a_user_namespace_where_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unshare_that(tmp_path, monkeypatch, '[ "$1" = -r ]')
    assert network.unshare_command() == ["unshare", "-r", "-n", "--"]


def test_a_network_that_is_not_new_is_refused(no_ranks: None, capsys: Any) -> None:
    here = os.readlink("/proc/self/ns/net")
    assert f"not in a new network namespace: {here}" in refusal(capsys, f"{network.OUTSIDE}{here}", "--quick")


@pytest.mark.parametrize(("same", "carried"), [(True, 0), (False, 1)])
def test_a_network_that_is_not_new_is_left_alone(same: bool, carried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_interfaces", lambda: {"lo": Interface(carried, carried)})
    monkeypatch.setattr(network.fcntl, "ioctl", None)
    with pytest.raises(ValueError, match="not in a new network namespace"):
        network.start_loopback(os.readlink("/proc/self/ns/net") if same else "net:[1]")
