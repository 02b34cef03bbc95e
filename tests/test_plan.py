"""The plan against the design's numbers, a simulated ring, and torch's counts of FLOPs and saved bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tpffn_triton import __main__ as command
from tpffn_triton import plan_report
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.plan import FFNPlan, plan_ffn, ring_all_reduce
from tpffn_triton.reference import ffn_reference

ANALYSED = ["--batch", "8", "--seq", "128", "--hidden", "1024", "--ffn", "4096", "--tp", "4"]


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tpffn_triton", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def shapes(plan: FFNPlan) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for t in plan.tensors}


def simulate_ring_all_reduce(data: list[list[int]]) -> tuple[list[list[int]], list[int], int]:
    """Run reduce-scatter, then all-gather, chunk by chunk; data[r] is rank r's list.

    In round s rank r sends chunk r-s to rank r+1, which adds it, or in the second half chunk r+1-s.
    Returns: each rank's result, the elements sent by each rank, the rounds.
    """
    ranks, elements = len(data), len(data[0])
    starts = [c * (elements // ranks) + min(c, elements % ranks) for c in range(ranks + 1)]
    data, sent, rounds = [list(row) for row in data], [0] * ranks, 0
    for offset, add in ((0, True), (1, False)):
        for step in range(ranks - 1):
            rounds += 1
            before = [list(row) for row in data]  # all ranks send at the same time
            for rank in range(ranks):
                chunk, to = (rank + offset - step) % ranks, (rank + 1) % ranks
                for i in range(starts[chunk], starts[chunk + 1]):
                    data[to][i] = before[rank][i] + (before[to][i] if add else 0)
                    sent[rank] += 1
    return data, sent, rounds


@settings(deadline=None)
@given(ranks=st.integers(2, 9), elements=st.integers(1, 60), seed=st.integers(1, 10**6))
def test_ring_accounting_equals_a_simulated_ring(ranks: int, elements: int, seed: int) -> None:
    data = [[(seed * (r + 2) + 31 * i * i) % 1009 for i in range(elements)] for r in range(ranks)]
    reduced, sent, rounds = simulate_ring_all_reduce(data)
    assert reduced == [[sum(column) for column in zip(*data, strict=True)]] * ranks
    assert ring_all_reduce(elements, ranks) == (max(sent), sum(sent), rounds)


def test_the_analysed_model_through_the_command() -> None:
    result = run_command("plan", *ANALYSED, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    sizes = {"batch": 8, "seq": 128, "hidden": 1024, "ffn": 4096, "tp": 4}
    assert plan["inputs"] == sizes | {"dtype": "fp32", "activation": "gelu", "bias": True, "save": "pre_act"}
    ring = {"kind": "all_reduce", "elements": 1_048_576, "bytes": 4 * 2**20, "rounds": 6, "amplification": 6}
    ring |= {"sent_per_rank": 1_572_864, "sent_total": 6_291_456, "sent_total_bytes": 24 * 2**20}
    ends = [{"pass": "forward", "tensor": "y"}, {"pass": "backward", "tensor": "dx"}]
    assert plan["collectives"] == [end | ring for end in ends]
    steps = [(n["pass"], n["step"], bool(n["why"])) for n in plan["no_communication"]]
    assert steps == [("forward", "linear1", True), ("backward", "linear2", True)]
    tensors = {t["name"]: t for t in plan["tensors"]}
    for name in ("w1", "w2", "dw1", "dw2"):
        assert (tensors[name]["shape"], tensors[name]["bytes"]) == ([1024, 1024], 4 * 2**20)
    assert (tensors["db1_partial"]["shape"], tensors["db1_partial"]["bytes"]) == ([32, 1024], 128 * 2**10)
    for name in tensors.keys() - {"w1", "b1", "w2", "b2", "dw1", "db1", "dw2", "db2", "db1_partial"}:
        assert tensors[name]["shape"] == [8, 128, 1024], name
    totals = plan["totals"]
    flops = [totals[f"flops_{key}"] for key in ("forward", "backward", "backward_all_ranks")]
    assert flops == [2 * 2**31, 4 * 2**31, 16 * 2**31]
    assert (totals["parameter_bytes"], totals["sent_all_ranks"]) == (8_396_800, 12_582_912)
    assert plan == plan_ffn(8, 128, 1024, 4096, 4).to_dict()


def test_bad_sizes_exit_with_2_and_one_line() -> None:
    result = run_command("plan", *ANALYSED, "--tp", "3")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "ffn=4096, tp=3" in result.stderr


@pytest.mark.parametrize(
    ("change", "shown"),
    [("--tp=-4", "tp must be at least 1, got -4"), ("--seq=1.5", "1.5"), ("--dtype=int8", "int8")],
)
def test_bad_input_through_main(change: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Wrong syntax ends in argparse's SystemExit, a wrong value in main's return.
    with pytest.raises(SystemExit) as caught:
        sys.exit(command.main(["plan", *ANALYSED, change]))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert shown in err


@pytest.mark.parametrize(
    ("change", "error", "shown"),
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ({"ffn": 10, "tp": 4}, ValueError, "ffn=10, tp=4"),
        ({"seq": 2.0}, TypeError, "seq must be an int, got 2.0"),
        ({"tp": True}, TypeError, "tp must be an int, got True"),
        ({"dtype": "float32"}, ValueError, "fp32, bf16, fp16, got 'float32'"),
        ({"activation": "swish"}, ValueError, "got 'swish'"),
        ({"save": None}, ValueError, "pre_act, nothing, got None"),
    ],
)
def test_bad_input_through_the_api(change: dict[str, Any], error: type[Exception], shown: str) -> None:
    arguments: dict[str, Any] = {"batch": 2, "seq": 3, "hidden": 8, "ffn": 32, "tp": 2}
    with pytest.raises(error) as caught:
        plan_ffn(**(arguments | change))
    assert shown in str(caught.value)


def test_shapes_and_bytes_of_an_odd_shape() -> None:
    plan = plan_ffn(3, 5, 7, 36, 4, dtype="bf16")
    weights = {"w1": (9, 7), "b1": (9,), "w2": (7, 9), "b2": (7,)}
    activations = dict.fromkeys(("x", "partial_y", "y", "dy", "partial_dx", "dx"), (3, 5, 7))
    features = dict.fromkeys(("pre_act", "hidden", "d_pre"), (3, 5, 9))
    gradients = {f"d{name}": shape for name, shape in weights.items()} | {"db1_partial": (1, 9)}
    assert shapes(plan) == weights | activations | features | gradients
    assert all(t.bytes == (4 if t.name == "db1_partial" else 2) * t.elements for t in plan.tensors)
    assert plan.totals["parameter_bytes"] == 2 * (2 * 63 + 9 + 7)
    # Chunks of 27, 26, 26, 26: a rank that leaves out two of 26 sends 210 - 52.
    counts = [(c.elements, c.bytes, c.sent_per_rank, c.sent_total_bytes) for c in plan.collectives]
    assert counts == [(105, 210, 158, 1260)] * 2


def test_hbm_traffic_counts_each_operand_and_output_once() -> None:
    m, h, shard = 15, 7, 9
    x, hid, w = m * h, m * shard, h * shard
    by_gemm = {"linear1": x + w + shard + 2 * hid, "linear2": hid + w + h + x, "dx": hid + w + x}
    partial = 2 * shard  # one row in fp32, for up to 32 tokens
    by_gemm |= {"d_hidden": x + w + 3 * hid + partial, "dw2": x + hid + w, "dw1": hid + x + w}
    plan = plan_ffn(3, 5, 7, 36, 4, dtype="fp16")
    assert {g.name: g.hbm_bytes for g in plan.gemms} == {name: 2 * count for name, count in by_gemm.items()}
    got, forward = plan.totals, 2 * (by_gemm["linear1"] + by_gemm["linear2"])
    assert got["hbm_bytes_forward"] == forward
    sums = 2 * (x + h + partial + shard)
    assert got["hbm_bytes_backward"] == 2 * sum(by_gemm[g] for g in ("dx", "d_hidden", "dw2", "dw1")) + sums
    assert got["flops_per_hbm_byte_forward"] == 4 * m * h * shard / forward


def test_the_analysed_model_gated_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *ANALYSED, "--activation", "swiglu", "--json"]) == 0
    plan, mib = json.loads(capsys.readouterr().out), 2**20
    tensors = {t["name"]: (t["shape"], t["bytes"]) for t in plan["tensors"]}
    for name in ("w1", "dw1"):
        assert tensors[name] == ([2048, 1024], 8 * mib)
    for name in ("b1", "db1"):
        assert tensors[name] == ([2048], 8192)
    for name in ("pre_act", "d_pre"):
        assert tensors[name] == ([8, 128, 2048], 8 * mib)
    for name in ("gate_act", "hidden"):
        assert tensors[name] == ([8, 128, 1024], 4 * mib)
    for name in ("w2", "dw2"):
        assert tensors[name] == ([1024, 1024], 4 * mib)
    gemms = {g["name"]: ((g["m"], g["n"], g["k"]), g["flops"], g["hbm_bytes"]) for g in plan["gemms"]}
    assert gemms == {
        "linear1": ((1024, 2048, 1024), 2**32, 24 * mib + 8192),
        "linear2": ((1024, 1024, 1024), 2**31, 12 * mib + 4096),
        "d_hidden": ((1024, 1024, 1024), 2**31, 28 * mib + mib // 4),
        "dx": ((1024, 1024, 2048), 2**32, 20 * mib),
        "dw2": ((1024, 1024, 1024), 2**31, 12 * mib),
        "dw1": ((2048, 1024, 1024), 2**32, 20 * mib),
    }
    totals = plan["totals"]
    flops = [totals[f"flops_{key}"] for key in ("forward", "backward", "forward_all_ranks")]
    assert flops == [3 * 2**31, 6 * 2**31, 12 * 2**31]
    assert totals["hbm_bytes_backward"] == 84 * mib + 2 * mib // 4 + 8192 + 4096  # db1's partial sums, twice
    assert totals["parameter_bytes"] == 12 * mib + 8192 + 4096
    assert (plan["saved_for_backward"], totals["saved_bytes"]) == (["x", "pre_act"], 12 * mib)
    assert totals["saved_bytes_eager"] == 20 * mib
    assert plan["collectives"] == plan_ffn(8, 128, 1024, 4096, 4).to_dict()["collectives"]
    recomputing = plan_ffn(8, 128, 1024, 4096, 4, activation="swiglu", save="nothing").totals
    assert (recomputing["flops_backward"], recomputing["saved_bytes"]) == (8 * 2**31, 4 * mib)


def test_no_bias_drops_every_bias_everywhere() -> None:
    plan = plan_ffn(3, 5, 7, 36, 4, bias=False)
    named = {name for g in plan.kernels for name in (*g.reads, *g.writes)} | {*shapes(plan)}
    assert not named & {"b1", "b2", "db1", "db1_partial", "db2"}
    assert plan.totals["parameter_bytes"] == 4 * 2 * 63


def test_save_nothing_trades_pre_act_for_a_seventh_gemm() -> None:
    kept, recomputed = (plan_ffn(3, 5, 7, 36, 4, save=save) for save in ("pre_act", "nothing"))
    assert (len(kept.gemms), len(recomputed.gemms)) == (6, 7)
    flops = [(p.totals["flops_forward"], p.totals["flops_backward"]) for p in (kept, recomputed)]
    assert flops == [(2 * 1890, 4 * 1890), (2 * 1890, 5 * 1890)]  # 1890 = 2·M·H·F/P
    assert (kept.totals["saved_bytes"], recomputed.totals["saved_bytes"]) == (4 * (105 + 135), 4 * 105)
    written = {g.name: g.writes for g in recomputed.gemms}
    assert (written["linear1"], written["linear1_recompute"]) == (("hidden",), ("pre_act", "hidden"))
    assert json.loads(json.dumps(recomputed.to_dict())) == recomputed.to_dict()


def test_one_rank_has_no_collectives() -> None:
    plan = plan_ffn(2, 3, 8, 32, 1)
    assert (plan.collectives, plan.totals["sent_all_ranks"]) == ((), 0)
    steps = {(n.pass_, n.step) for n in plan.no_communication}
    assert steps == {(p, step) for p in ("forward", "backward") for step in ("linear1", "linear2")}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gemm_formulas_give_the_shapes_that_the_plan_names(activation: str) -> None:
    plan = plan_ffn(3, 5, 7, 36, 4, save="nothing", activation=activation)
    # The epilogue's results are what these kernels write; the product itself has another one's shape.
    products = {"linear1": "pre_act", "linear1_recompute": "pre_act", "d_hidden": "hidden"}
    tensors = {t.name: torch.empty(t.shape, device="meta").reshape(-1, t.shape[-1]) for t in plan.tensors}
    for gemm in plan.gemms:
        product = eval(gemm.formula, {}, tensors)
        like = tensors[products.get(gemm.name, gemm.writes[0])]
        assert tuple(product.shape) == (gemm.m, gemm.n) == tuple(like.shape), gemm.name
        operands = gemm.formula.replace(".T", "").split(" @ ")
        assert set(operands) <= set(gemm.reads), gemm.name
        assert gemm.flops == 2 * gemm.m * gemm.n * gemm.k, gemm.name
        assert gemm.m * gemm.k == tensors[operands[0]].numel(), gemm.name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flops_and_eager_saves_are_what_torch_counts(activation: str) -> None:
    plan = plan_ffn(3, 5, 7, 36, 4, activation=activation)
    sizes = [shapes(plan)[name] for name in ("x", "w1", "b1", "w2", "b2")]
    x, w1, b1, w2, b2 = (torch.randn(size, requires_grad=True) for size in sizes)
    parameters = {t.data_ptr() for t in (w1, b1, w2, b2)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A view keeps the whole memory. Held, so that no later tensor gets the address of a freed one.
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, hooks:
        y = ffn_reference(x, w1, w2, b1, b2, activation=activation)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    counted = (forward.get_total_flops(), backward.get_total_flops())
    assert counted == (plan.totals["flops_forward"], plan.totals["flops_backward"])
    eager_bytes = sorted(s.nbytes() for pointer, s in saved.items() if pointer not in parameters)
    assert eager_bytes == sorted(t.bytes for t in plan.tensors if t.name in plan.saved_by_eager)
    assert sum(eager_bytes) == plan.totals["saved_bytes_eager"]


def test_text_output_has_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *ANALYSED]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines).isascii()
    ring = "ring: 6 rounds, 1572864 elements sent per rank, 6291456 in all (24 MiB), 6x the payload"
    for tensor, pass_ in (("y", "forward"), ("dx", "backward")):
        at = lines.index(f"{pass_} all-reduce of {tensor}: 1048576 elements, 4194304 bytes (4 MiB)")
        assert lines[at + 1] == ring
    starts = (
        "x [8, 128, 1024] 1048576 4194304 4 MiB",
        "w1 [1024, 1024] 1048576 4194304 4 MiB this rank's output features; paper layout 1024 x 1024",
        "d_hidden backward dy @ w2 1024, 1024, 1024 2147483648 2.147 GFLOP",
        "backward 8589934592 8.59 GFLOP 34.36 GFLOP 63184896 60.26 MiB 135.9",
        "this package, save=pre_act x, pre_act 8388608 8 MiB",
        "eager F.linear, activation, F.linear x, pre_act, hidden 12582912 12 MiB",
        "forward linear1: none; ",
        "backward linear2: none; ",
    )
    for start in starts:
        assert any(line.startswith(start) for line in lines), start


def test_text_output_of_a_gated_model_has_both_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", *ANALYSED, "--activation", "geglu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "w1 [2048, 1024] 2097152 8388608 8 MiB this rank's gate, then up features; paper layout 1024 x 2048",
        "gate_act [8, 128, 1024] 1048576 4194304 4 MiB stored by eager alone",
        "eager F.linear, activation, F.linear x, pre_act, gate_act, hidden 20971520 20 MiB",
        "bias and activation apply to them at once",
    ):
        assert part in text, part


def test_options_reach_the_text_and_unequal_chunks_show(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "3", "--seq", "5", "--hidden", "7", "--ffn", "36", "--tp", "4"]
    options = ["--no-bias", "--save", "nothing", "--dtype", "bf16", "--activation", "relu2"]
    assert command.main(["plan", *sizes, *options]) == 0
    text = capsys.readouterr().out
    assert "at most 158 elements sent per rank, 630 in all" in text
    assert "dtype bf16  activation relu2  bias no  save nothing" in text


def test_human_units_change_where_four_digits_end() -> None:
    for count, size in ((1023, "1023 B"), (1536, "1.5 KiB"), (2**20 - 300, "0.9997 MiB")):
        assert plan_report.human_bytes(count) == size
    assert plan_report.human_flops(999_999_999) == "1 GFLOP"
