"""Machine files: what is written comes back, and what breaks the schema is refused with its place and value."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpffn_triton import presets
from tpffn_triton.machines import AlphaBeta, Compute, Link, Machine

MEASURED = Machine(
    name="four cores",
    computes=tuple(Compute((("fp32", 0.1 * p),), 0.01, 5.0, 0.4, "measured", p) for p in (1, 2, 4)),
    link=Link("gloo", (AlphaBeta("ring", 0, 100.5, 1.5, "fitted", "all_reduce", 2),)),
    network=None,
    ranks_per_node=4,
)


@pytest.mark.parametrize("machine", [MEASURED, *map(presets.machine, presets.LINKS)], ids=lambda m: m.name)
def test_a_written_machine_comes_back_equal(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine.to_dict(), allow_nan=False))
    assert Machine.load(path) == machine
    assert hash(Machine.load(path)) == hash(machine)


def test_other_keys_beside_the_machine_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**MEASURED.to_dict(), "rows": [1, 2]}))
    assert Machine.load(path) == MEASURED


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = keys

    def change(data: dict[str, Any]) -> None:
        target: Any = data
        for key in path:
            target = target[key]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value

    return change


TERM = ("machine", "link", "terms", 0)
RANK = ("machine", "computes", 0)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (_set("schema", "tpffn_triton.machine/2"), "schema must be 'tpffn_triton.machine/1', got 'tpffn_triton.mach"),
        (_set("schema", KeyError), "got None"),
        (_set("machine", [1]), "machine must be an object, got list"),
        (_set("machine", "computes", KeyError), "machine lacks computes"),
        (_set("machine", "code", "x"), "machine has unknown code"),
        (_set("machine", "name", 3), "machine.name must be a string, got 3"),
        (_set("machine", "computes", []), "has no computes"),
        (_set("machine", "computes", {}), "machine.computes must be a list, got dict"),
        (_set("machine", "ranks_per_node", 0), "ranks_per_node must be a whole number from 1 to 1048576, got 0"),
        (_set("machine", "ranks_per_node", 8.0), "got 8.0"),
        (_set("machine", "ranks_per_node", True), "got True"),
        (_set("machine", "network", 7), "machine.network must be an object, got int"),
        (_set("machine", "link", "terms", []), "has no terms"),
        (_set(*TERM, "source", KeyError), "machine.link.terms[0] lacks source"),
        (_set(*TERM, "algorithm", "magic"), "unknown algorithm 'magic': one of ring, tree, one-shot, two-shot"),
        (_set(*TERM, "algorithm", "direct"), "unknown algorithm 'direct'"),  # of no all-reduce
        (_set(*TERM, "kind", "broadcast"), "unknown kind 'broadcast'"),
        (_set(*TERM, "alpha_us", -1), "alpha_us must be a number from 0 to 1e+07, got -1"),
        (_set(*TERM, "alpha_us", "1"), "got '1'"),
        (_set(*TERM, "alpha_us", float("nan")), "got nan"),
        (_set(*TERM, "gb_per_s", 0), "gb_per_s must be a number from 1e-06 to 1e+06, got 0"),
        (_set(*TERM, "gb_per_s", float("inf")), "got inf"),
        (_set(*TERM, "gb_per_s", 10**400), "gb_per_s must be a number"),
        (_set(*TERM, "world_size", -2), "world_size must be a whole number"),
        (_set(*RANK, "tflops", [["fp8", 1.0]]), "unknown dtype 'fp8'"),
        (_set(*RANK, "tflops", [["fp32"]]), "machine.computes[0].tflops must hold [dtype, TFLOP/s], got ['fp32']"),
        (_set(*RANK, "tflops", [["fp32", 0]]), "tflops of fp32 must be a number"),
        (_set(*RANK, "overlap", 1.5), "overlap must be a number from 0 to 1, got 1.5"),
        (_set(*RANK, "launch_us", None), "launch_us must be a number from 0 to 1e+07, got None"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(
    change: Callable[[dict[str, Any]], None], shown: str, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(MEASURED.to_dict()))
    change(data)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"machine file .*machine\.json: ") as caught:
        Machine.load(path)
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", pickle.dumps(MEASURED), b"[" * 100_000, b" " * (1 << 24) + b"{}"],
    ids=["empty", "cut", "list", "no text", "pickle", "deep", "long"],
)
def test_what_is_no_machine_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"machine file .*machine\.json"):
        Machine.load(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot read machine file nowhere\.json: No such file"):
        Machine.load(Path("nowhere.json"))


def test_machines_are_equal_by_every_constant() -> None:
    slower = replace(MEASURED, link=Link("gloo", (replace(MEASURED.link.terms[0], alpha_us=100.6),)))
    assert slower != MEASURED
    assert len({MEASURED, slower, replace(MEASURED)}) == 2


def test_what_a_rank_computes_depends_on_how_many_there_are() -> None:
    rates = [MEASURED.compute(p).rate("fp32") for p in (1, 2, 3, 4, 8)]
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.4, 0.4])


def test_presets_take_another_gpu_and_refuse_unknown_names() -> None:
    assert presets.machine("nvlink4", "h200").compute(4) is presets.GPUS["NVIDIA H200"]
    assert presets.machine("nvlink5", ranks_per_node=72).ranks_per_node == 72
    assert presets.machine("nvlink4", ranks_per_node=1).network == presets.LINKS["infiniband-ndr"]
    for arguments, shown in ((("nvlink9",), "unknown link 'nvlink9': one of nvlink3"), (("pcie4", "v100"), "'v100'")):
        with pytest.raises(ValueError, match=shown):
            presets.machine(*arguments)


def test_every_constant_has_a_source() -> None:
    for name in presets.LINKS:
        preset = presets.machine(name)
        assert preset.network is not None
        for record in (*preset.computes, *preset.link.terms, *preset.network.terms):
            assert record.source, record


def test_links_by_the_datasheets() -> None:
    """No preset is faster than its wire: GB/s a direction of NVLink 3, 4, 5, PCIe 4, 5 x16, HDR and NDR ports."""
    wires = {"nvlink3": 300, "nvlink4": 450, "nvlink5": 900, "pcie4": 32, "pcie5": 64}
    wires |= {"infiniband-hdr": 25, "infiniband-ndr": 50}
    assert wires.keys() == presets.LINKS.keys()
    for name, wire in wires.items():
        fastest = max(term.gb_per_s for term in presets.LINKS[name].terms)
        assert 0.7 * wire < fastest < wire


def constants() -> list[str]:
    """The presets' terms as docs/cost_model.md shows them; [K]: for K nodes, the last for more too."""
    networks = [presets.infiniband(name, 8) for name in ("infiniband-hdr", "infiniband-ndr")]
    rows = []
    for link in (*presets.LINKS.values(), *networks):
        for term in link.terms:
            algorithm = f"{term.algorithm} [{term.world_size}]" if term.world_size else term.algorithm
            rows.append(
                f"| {link.name} | {algorithm} | {term.kind.replace('_', '-') or 'all'} | {term.base_us:g} | "
                f"{term.alpha_us:g} | {term.gb_per_s:.4g} | {term.source} |"
            )
    return rows


def test_the_documentation_has_these_constants() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "cost_model.md").read_text()
    shown = [line for line in text.splitlines() if line.startswith(tuple(f"| {name}" for name in presets.LINKS))]
    assert [line for line in shown if "NCCL" in line] == constants()
