"""The cost model against hand calculations, properties that any such model has, and published measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpffn_triton.cost_model import (
    CHUNKS,
    choices,
    chunked_us,
    collective_us,
    forward_chunks,
    kernel_us,
    link_us,
    rounds_and_bytes,
)
from tpffn_triton.machines import ALGORITHMS, AlphaBeta, Compute, Link, Machine
from tpffn_triton.presets import LINKS, machine

WAYS = [(kind, algorithm) for kind, algorithms in ALGORITHMS.items() for algorithm in algorithms]
ALL = tuple(dict.fromkeys(algorithm for _, algorithm in WAYS))


def link(base: float, alpha: float, gb: float, algorithms: tuple[str, ...] = ALL) -> Link:
    return Link("by hand", tuple(AlphaBeta(name, base, alpha, gb, "test") for name in algorithms))


def by_hand(overlap: float = 1.0, ranks_per_node: int = 4) -> Machine:
    """1 TFLOP/s, 1 TB/s, no launch; 1 µs a round and 1 GB/s in a node, 10 µs and 0.1 GB/s between nodes."""
    compute = Compute((("fp32", 1.0),), 1.0, 0.0, overlap, "test")
    return Machine("by hand", (compute,), link(0, 1, 1), link(0, 10, 0.1), ranks_per_node)


@pytest.mark.parametrize(
    ("kind", "algorithm", "p", "rounds", "sent"),
    [
        ("all_reduce", "ring", 4, 6, 1500),
        ("all_reduce", "ring", 3, 4, 1000 * 4 / 3),
        ("all_reduce", "tree", 4, 4, 2000),
        ("all_reduce", "tree", 5, 6, 2000),
        ("all_reduce", "tree", 2, 2, 2000),
        ("all_reduce", "one-shot", 4, 1, 3000),
        ("all_reduce", "two-shot", 4, 2, 1500),
        ("all_gather", "ring", 4, 3, 750),
        ("all_gather", "direct", 4, 1, 750),
        ("reduce_scatter", "ring", 8, 7, 875),
        ("reduce_scatter", "direct", 8, 1, 875),
    ],
)
def test_rounds_bytes_and_time_by_hand(kind: str, algorithm: str, p: int, rounds: int, sent: float) -> None:
    assert rounds_and_bytes(kind, algorithm, 1000, p) == (rounds, pytest.approx(sent))
    # 1 GB/s is 1000 bytes a µs.
    assert link_us(link(5, 2, 1), kind, algorithm, 1000, p) == pytest.approx(5 + 2 * rounds + sent / 1000)


@pytest.mark.parametrize(("kind", "algorithm"), WAYS)
def test_one_rank_sends_nothing(kind: str, algorithm: str) -> None:
    assert rounds_and_bytes(kind, algorithm, 1000, 1) == (0, 0)
    assert link_us(link(5, 2, 1), kind, algorithm, 1000, 1) == 0


def test_unknown_ways_name_the_known_ones() -> None:
    for kind, algorithm in (("all_gather", "tree"), ("broadcast", "ring")):
        with pytest.raises(ValueError, match=r"no \w+ by \w+: .*all_gather by ring or direct"):
            rounds_and_bytes(kind, algorithm, 1000, 4)


def test_the_fastest_protocol_counts_and_fitted_terms_go_by_world_size() -> None:
    terms = [
        AlphaBeta("ring", 0, 1, 0.1, "low latency"),
        AlphaBeta("ring", 0, 50, 10, "bulk"),
        AlphaBeta("ring", 0, 7, 1, "fitted", "all_gather", 2),
        AlphaBeta("ring", 0, 3, 1, "fitted", "all_gather", 4),
    ]
    both = Link("protocols", tuple(terms[:2]))
    assert link_us(both, "all_reduce", "ring", 100, 2) == 2 + 1  # 100 bytes at 0.1 GB/s
    assert link_us(both, "all_reduce", "ring", 10**6, 2) == 100 + 100
    fitted = Link("fitted", tuple(terms[2:]))
    # At P=3 the fit of 2, at 8 and 4 that of 4; below all, the smallest.
    times = [link_us(fitted, "all_gather", "ring", 0, p) for p in (2, 3, 4, 8)]
    assert times == [7, 14, 9, 21]
    assert link_us(Link("only 4", (terms[3],)), "all_gather", "ring", 0, 2) == 3
    assert link_us(fitted, "all_reduce", "ring", 0, 2) is None


def test_two_nodes_by_hand() -> None:
    m, n = by_hand(ranks_per_node=4), 8000
    inside = 3 * 1 + 0.75 * n / 1000  # a ring over 4 ranks
    between = 2 * 10 + 2 * 0.5 * (n / 4) / 100  # over 2 nodes, a quarter of the tensor each
    assert collective_us(m, "all_reduce", "ring", n, 8) == pytest.approx(2 * inside + between)
    assert collective_us(m, "all_gather", "ring", n, 8) == pytest.approx(inside + 10 + 0.5 * (n / 4) / 100)
    direct = 1 + 0.75 * n / 1000
    one_shot = 10 + (n / 4) / 100
    assert collective_us(m, "all_reduce", "one-shot", n, 8) == pytest.approx(2 * direct + one_shot)
    assert collective_us(m, "all_reduce", "ring", n, 4) == pytest.approx(6 + 1.5 * n / 1000)


def test_ranks_that_do_not_fill_nodes_or_have_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        collective_us(by_hand(), "all_reduce", "ring", 8, 6)
    with pytest.raises(ValueError, match="8 ranks need 2 nodes of by hand, which has no network"):
        collective_us(replace(by_hand(), network=None), "all_reduce", "ring", 8, 8)


def test_choices_are_sorted_and_limited_to_what_the_link_has() -> None:
    m = replace(by_hand(), link=link(0, 100, 1, ("ring", "one-shot")))
    assert [c.algorithm for c in choices(m, "all_reduce", 1000, 4)] == ["one-shot", "ring"]
    assert [c.algorithm for c in choices(m, "all_reduce", 10**6, 4)] == ["ring", "one-shot"]
    assert [c.algorithm for c in choices(m, "all_reduce", 1000, 4, ("ring", "tree"))] == ["ring"]
    with pytest.raises(ValueError, match="no figures for all_reduce by tree of by hand"):
        choices(m, "all_reduce", 1000, 4, ("tree",))


@settings(deadline=None)
@given(
    name=st.sampled_from([*LINKS]),
    way=st.sampled_from(WAYS),
    nbytes=st.integers(1, 1 << 30),
    more=st.integers(1, 1 << 30),
    power=st.integers(1, 6),
)
def test_more_bytes_and_more_ranks_never_take_less(
    name: str, way: tuple[str, str], nbytes: int, more: int, power: int
) -> None:
    us = link_us(LINKS[name], *way, nbytes, 1 << power)
    assert us is not None
    assert 0 < us <= link_us(LINKS[name], *way, nbytes + more, 1 << power)
    assert us <= link_us(LINKS[name], *way, nbytes, 1 << (power + 1))
    # No algorithm beats the wire: a rank must send what (P-1)/P of the tensor leaves it no way around.
    fastest = max(term.gb_per_s for term in LINKS[name].terms)
    assert us > (1 - 0.5**power) * nbytes / fastest / 1e3


@pytest.mark.parametrize(("name", "small"), [("nvlink3", "one-shot"), ("nvlink4", "one-shot"), ("pcie4", "tree")])
def test_small_messages_take_few_rounds_and_large_ones_the_fewest_bytes(name: str, small: str) -> None:
    m = machine(name)
    assert choices(m, "all_reduce", 1 << 13, 8)[0].algorithm == small
    assert choices(m, "all_reduce", 1 << 28, 8)[0].algorithm in ("two-shot", "ring")
    assert choices(m, "all_reduce", 1 << 28, 8)[-1].algorithm == "one-shot"


def test_published_all_reduce_of_2_mb_on_six_gpus() -> None:
    """NCCL 43 µs, one-shot 38 µs, on GPUs linked by NVLink 4."""
    ways = {c.algorithm: c.us for c in choices(machine("nvlink4"), "all_reduce", 2 << 20, 6)}
    assert ways["one-shot"] == pytest.approx(38, rel=0.1)
    assert min(ways["ring"], ways["tree"]) == pytest.approx(43, rel=0.2)


def test_roofline_by_hand() -> None:
    compute = Compute((("fp32", 2.0),), 0.5, 3.0, 1.0, "test")
    assert kernel_us(compute, "fp32", 8e6, 1e6) == 4 + 3  # 8 MFLOP at 2 TFLOP/s
    assert kernel_us(compute, "fp32", 8e6, 4e6) == 8 + 3  # 4 MB at 0.5 TB/s
    with pytest.raises(ValueError, match=r"no TFLOP/s of 'bf16' known \(test\): only of fp32"):
        kernel_us(compute, "bf16", 8e6, 1e6)


def test_pipeline_of_chunks_by_hand() -> None:
    assert chunked_us(10, 4, 1, 1.0) == 14
    assert chunked_us(10, 4, 3, 1.0) == 3 * 10 + 4
    assert chunked_us(4, 10, 3, 1.0) == 3 * 10 + 4
    assert chunked_us(10, 4, 3, 0.0) == 3 * 14
    assert chunked_us(10, 4, 3, 0.5) == 3 * 14 - 2 * 2


@pytest.mark.parametrize(
    ("alpha", "reduced_itemsize", "best"), [(0.1, None, 8), (1, None, 4), (9, None, 2), (12, None, 1), (12, 1, 2)]
)
def test_forward_chunks_is_the_cheapest_of_the_candidates(
    alpha: float, reduced_itemsize: int | None, best: int
) -> None:
    m, (tokens, hidden, shard, p) = replace(by_hand(), link=link(0, alpha, 1)), (64, 1000, 1000, 4)

    def predicted(chunks: int) -> float:
        rows = tokens / chunks
        gemm = max(2 * rows * hidden * shard / 1e6, 4 * (rows * shard + rows * hidden + hidden * shard) / 1e6)
        # Ring or tree: 6 or 4 rounds, 1.5 or 2 times the bytes.
        nbytes = (reduced_itemsize or 4) * rows * hidden
        return chunked_us(gemm, min(6 * alpha + 1.5 * nbytes / 1e3, 4 * alpha + 2 * nbytes / 1e3), chunks, 1.0)

    assert forward_chunks(m, tokens, hidden, shard, p, "fp32", reduced_itemsize) == best == min(CHUNKS, key=predicted)


def test_forward_chunks_is_1_where_it_does_not_pay() -> None:
    preset = machine("nvlink4")
    assert forward_chunks(preset, 1024, 1024, 1024, 4, "bf16") == 1  # the analysed model
    assert forward_chunks(preset, 16384, 8192, 7168, 4, "bf16") > 1
    assert forward_chunks(preset, 16384, 8192, 28672, 1, "bf16") == 1  # one rank
    assert forward_chunks(preset, 1, 8192, 7168, 4, "bf16") == 1  # one token
    assert forward_chunks(preset, 0, 8192, 7168, 4, "bf16") == 1
    assert forward_chunks(by_hand(overlap=0.0), 64, 1000, 1000, 4, "fp32") == 1  # nothing hides


def test_forward_chunks_rejects_what_it_cannot_price() -> None:
    with pytest.raises(ValueError, match="dtype must be one of fp32, tf32, bf16, fp16, got 'fp64'"):
        forward_chunks(by_hand(), 64, 8, 8, 4, "fp64")
    with pytest.raises(ValueError, match="only of fp32"):
        forward_chunks(by_hand(), 64, 8, 8, 4, "bf16")


@settings(deadline=None)
@given(tokens=st.integers(1, 1 << 16), hidden=st.sampled_from([256, 1024, 8192]), p=st.sampled_from([2, 4, 8]))
def test_forward_chunks_never_makes_more_chunks_than_tokens(tokens: int, hidden: int, p: int) -> None:
    chunks = forward_chunks(machine("pcie5"), tokens, hidden, hidden, p, "bf16")
    assert chunks in CHUNKS
    assert chunks <= tokens


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_forward_chunks_inside_a_compiled_graph() -> None:
    m = machine("pcie5")

    def chunked(x: torch.Tensor) -> list[torch.Tensor]:
        return [part + 1 for part in x.chunk(forward_chunks(m, x.shape[0], 4096, 1024, 4, "bf16"))]

    compiled = torch.compile(chunked, fullgraph=True, backend="eager")
    counts = []
    for tokens in (65536, 16384, 10):
        x = torch.zeros(tokens, 1)
        counts.append(len(compiled(x)))
        assert counts[-1] == len(chunked(x))
    assert counts == [4, 2, 1]
