"""Megatron-Core's MLP and FusedMLP as peers in the benchmark: rows, exposed communication, refusals."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import compiler
import ffn_bench
import implementations
import measure
import megatron_peer
import ranks
import steps
import tables
import workloads

from tpffn_triton import collectives

pytestmark = pytest.mark.cpu_only
PEERS = ("megatron", "megatron-fused")
INSTALL = "pip install 'tpffn-triton[megatron]'"


def settings(*arguments: str) -> measure.Settings:
    flags = ["--shapes", "tiny", "--quick", "--iters", "1", *arguments]
    return ffn_bench.settings_of(ffn_bench.build_parser().parse_args(flags), "cpu", "")[0]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Measure in this process; what the peer changes in it is put back."""
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_GLOBAL_MEMORY_BUFFER"):
        monkeypatch.setattr(parallel_state, name, None)
    threads = torch.get_num_threads()
    yield lambda *arguments: ranks.run(measure.measure, settings("--tp", "1", *arguments), 1, "cpu")
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_rank_alone_is_checked_timed_and_told_apart(one_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_peer, "_can_compile", lambda: False)
    result = one_rank("--activation", "gelu_tanh")
    assert not result["refused"]
    names = ("unfused", "unfused-onednn", "fused", *PEERS)
    assert [(r["mode"], r["impl"]) for r in result["rows"]] == [(m, n) for m in ("fwd", "fwd_bwd") for n in names]
    for row in result["rows"]:
        assert 0 < row["max_rel_err"] < 1e-5
        assert row["megatron_core"] == sys.modules["megatron.core"].__version__
        (own,) = (r["ms_p50"] for r in result["rows"] if (r["impl"], r["mode"]) == ("megatron", row["mode"]))
        assert row["speedup_vs_megatron"] == pytest.approx(own / row["ms_p50"])
    table = tables.table(result["rows"], [])
    assert "× Megatron" in table
    assert f"the MLP of megatron-core {result['rows'][0]['megatron_core']};" in table
    assert max(len(line) for line in table.splitlines()) < 160
    wish = "Megatron-Core asks for CUDA_DEVICE_MAX_CONNECTIONS=1"
    assert wish not in table
    assert "gathered tokens" not in table
    assert "gathered tokens" in tables.table([row | {"sequence_parallel": True} for row in result["rows"]], [])
    for connections, asked in ((None, True), ("8", True), ("1", False)):
        on_gpus = {"device_type": "cuda", "ranks": 2, "cuda_device_max_connections": connections}
        assert (wish in tables.table([row | on_gpus for row in result["rows"]], [])) == asked


@pytest.mark.parametrize("activation", ["gelu", "geglu", "geglu_tanh", "relu", "relu2", "silu", "swiglu"])
def test_every_activation_passes_the_gate_in_megatron_itself(activation, one_rank, monkeypatch) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP

    monkeypatch.setattr(megatron_peer, "_can_compile", lambda: False)
    made = []
    monkeypatch.setattr(MLP, "forward", lambda self, x, forward=MLP.forward: made.append(self) or forward(self, x))
    result = one_rank("--impl", "megatron", "--mode", "fwd_bwd", "--activation", activation)
    assert not result["refused"]
    assert len(result["rows"]) == 1
    # Not a stand-in, nor FusedMLP, which inherits from it; and it has computed each step.
    assert {type(mlp) for mlp in made} == {MLP}
    assert (type(made[0].linear_fc1), type(made[0].linear_fc2)) == (ColumnParallelLinear, RowParallelLinear)
    assert made[0].config.bias_activation_fusion == (activation in ("geglu_tanh", "swiglu"))


def test_other_tensors_take_the_place_of_the_first_ones(one_rank) -> None:
    forward = implementations.IMPLEMENTATIONS["megatron"].build("gelu", False)
    shape = workloads.SHAPES["tiny"]
    full = workloads.draw(shape, "fp32", "gelu", torch.device("cpu"))
    x, *weights = (t.detach() for t in full.leaves().values())
    before = forward(x, *weights, None)
    assert torch.equal(forward(x, *weights, None), before)
    weights[3] = weights[3] + 1
    torch.testing.assert_close(forward(x, *weights, None), before + 1)


def broken(build: Any, tensor: int) -> Any:
    """The peer with one of its tensors (0: w1 ... 3: b2) taken twice."""

    def build_broken(activation: str, sequence_parallel: bool) -> implementations.Forward:
        forward = build(activation, sequence_parallel)

        def twice(x, *tensors_and_group):
            given = list(tensors_and_group)
            given[tensor] = 2 * given[tensor]
            return forward(x, *given)

        return twice

    return build_broken


@pytest.mark.parametrize("tensor", [1, 3])
def test_broken_peer_is_refused(tensor: int, one_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = implementations.Implementation("megatron", "", broken(megatron_peer.build_megatron, tensor))
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "megatron", wrong)
    result = one_rank("--impl", "megatron,megatron-fused", "--mode", "fwd")
    assert [row["impl"] for row in result["rows"]] == ["megatron-fused"]
    assert result["rows"][0]["speedup_vs_megatron"] is None
    (line,) = result["refused"]
    assert line.startswith("megatron (tiny, fp32, fwd) is wrong: y is off by")


def waits_of(step: steps.Step) -> int:
    """How often the step may stand still for a collective."""
    seen = []

    @contextlib.contextmanager
    def count() -> Iterator[None]:
        seen.append(1)
        yield

    with collectives.observe(count):
        step()
    return len(seen)


def measured_and_observed(rank: ranks.Rank, cases: list[list[str]]) -> list[Any]:
    """Of each case the peers' rows, and how often each pass of Megatron's MLP may stand still for a collective."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # mistakes with its modules can fill the memory
    found = []
    for arguments in cases:
        wanted = settings(*arguments)
        result = measure.measure(rank, wanted)
        full = workloads.draw(wanted.shapes[0], "fp32", wanted.activation, rank.device)
        own = workloads.shard(full, rank.rank, 2, wanted.activation)
        own = workloads.own_tokens(own, rank.rank, 2) if wanted.sequence_parallel else own
        forward = implementations.IMPLEMENTATIONS["megatron"].build(wanted.activation, wanted.sequence_parallel)
        passes = steps.passes_of(forward, own, rank.group)
        found.append(result | {"observed": {name: waits_of(step) for name, step in passes.items()}})
    return found


def test_two_ranks_are_checked_and_their_communication_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.setenv("CXX", "/no/such/compiler")  # the fused activation runs eagerly, as on a machine without one
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    plain = ["--activation", "geglu"]
    slices = ["--activation", "gelu_tanh", "--sequence-parallel"]
    common = ["--impl", ",".join(PEERS), "--mode", "fwd_bwd"]
    of_plain, of_slices = ranks.run(measured_and_observed, [plain + common, slices + common], 2, "cpu")
    # y's all-reduce; dx's, begun and waited for.
    assert of_plain["observed"] == {"forward": 1, "backward": 2}
    # Gather of x, reduce-scatter of y; gather of dy, and those of x and dx, begun and waited for.
    assert of_slices["observed"] == {"forward": 2, "backward": 5}
    for result, sequence_parallel in ((of_plain, False), (of_slices, True)):
        assert not result["refused"]
        assert [row["impl"] for row in result["rows"]] == [*PEERS]
        for row in result["rows"]:
            assert (row["ranks"], row["sequence_parallel"]) == (2, sequence_parallel)
            assert 0 < row["max_rel_err"] < 1e-5
            assert 0 < row["comm_ms_least"] <= row["comm_ms"] <= row["ms_p50"]


def test_fused_activations_run_eagerly_where_nothing_compiles_and_say_so(one_rank, monkeypatch, capsys) -> None:
    def failing(function: Any) -> Any:
        raise RuntimeError("no compiler\nnor headers")

    can_compile = megatron_peer._can_compile.__wrapped__
    monkeypatch.setattr(megatron_peer, "_can_compile", can_compile)
    monkeypatch.setattr(compiler, "missing", compiler.missing.__wrapped__)
    stances: list[str] = []
    set_stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: (stances.append(stance), set_stance(stance)))
    with monkeypatch.context() as broken_torch:
        broken_torch.setattr(torch, "compile", failing)
        result = one_rank("--impl", "megatron", "--mode", "fwd", "--activation", "swiglu")
    assert [row["impl"] for row in result["rows"]] == ["megatron"]
    assert stances == ["force_eager"]
    said = "Megatron's fused activation runs EAGERLY, torch.compile fails here: no compiler\n"
    assert said in capsys.readouterr().err
    assert can_compile()  # the stance is set: what torch.compile returns runs
    assert capsys.readouterr().err == ""


def test_without_megatron_core_the_peers_are_left_out_or_refused(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.mlp", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in PEERS:
        peer = implementations.IMPLEMENTATIONS[name]
        changed = implementations.Implementation(name, "", peer.build, missing=megatron_peer.missing.__wrapped__)
        monkeypatch.setitem(implementations.IMPLEMENTATIONS, name, changed)
    found = [i.name for i in implementations.chosen(None, "cpu", "fp32")]
    assert found == ["unfused", "unfused-onednn", "fused"]
    for name in PEERS:
        with pytest.raises(SystemExit) as stopped:
            ffn_bench.main(["--shapes", "tiny", "--impl", f"fused,{name}"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert f"implementation {name} needs megatron-core (" in said
        assert INSTALL in said
        assert said.count("\n") == 1
