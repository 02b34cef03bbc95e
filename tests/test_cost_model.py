"""The cost model against hand calculations, NCCL's own formulas, and properties that any such model has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpffn_triton.cost_model import (
    CHUNK_ROWS,
    CHUNKS,
    Pipeline,
    choices,
    chunk_rows,
    collective_us,
    forward_chunks,
    kernel_us,
    linear2_pipeline,
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
        ("all_reduce", "tree", 4, 6, 2000),
        ("all_reduce", "tree", 5, 8, 2000),
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


@pytest.mark.parametrize(("nodes", "rounds"), [(2, 2), (3, 4), (4, 4), (5, 6), (8, 6)])
def test_a_tree_is_binary_between_nodes_alone_by_hand(nodes: int, rounds: int) -> None:
    assert rounds_and_bytes("all_reduce", "tree", 1000, nodes, between_nodes=True) == (rounds, 2000)
    assert rounds_and_bytes("all_reduce", "tree", 1000, nodes) == (2 * (nodes - 1), 2000)
    alone = by_hand(ranks_per_node=1)  # 10 µs a round and 0.1 GB/s
    assert collective_us(alone, "all_reduce", "tree", 1000, nodes) == pytest.approx(10 * rounds + 20)


def test_times_are_those_of_ncclGetAlgoTime_by_hand() -> None:
    """NCCL 2.30.7, src/graph/tuning.cc: 8 ranks of one node, 64 KiB; its correction of trees left out."""
    ring = 6.6 + 14 * 0.6 + 65536 / (141.0 * 8 / 14) / 1e3  # LL: llMaxBw on Hopper, busBw to algBw
    tree = 6.8 + 2 * 7 * 0.6 + 65536 / (0.92 * 370.8 / 3.8 / 2) / 1e3  # LL
    ways = {c.algorithm: c.us for c in choices(machine("nvlink4"), "all_reduce", 65536, 8)}
    assert (ways["ring"], ways["tree"]) == (pytest.approx(ring), pytest.approx(tree))


def test_one_rank_a_node_by_hand() -> None:
    """As above: with one rank a node a ring's steps take the tree's network latency; LL is capped by nodes and host."""
    ndr = machine("infiniband-ndr")
    for nodes, ll in ((2, 24.0), (4, 20.4)):
        ring = 6.6 + 2 * (nodes - 1) * 5.0 + 65536 / (ll * nodes / (2 * (nodes - 1))) / 1e3
        assert collective_us(ndr, "all_reduce", "ring", 65536, nodes) == pytest.approx(ring)
    tree = 6.8 + 2 * 2 * 5.0 + 65536 / (0.92 * 48 / 3.8 / 2) / 1e3
    assert collective_us(ndr, "all_reduce", "tree", 65536, 4) == pytest.approx(tree)
    # Eight ranks share the node's cap.
    network = machine("nvlink3").network
    assert network is not None
    (shared,) = (t for t in network.terms if t.source.endswith("ring, LL") and t.world_size == 3)
    assert (shared.gb_per_s, shared.alpha_us) == (19.0 / 8, 2.7)


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


@pytest.mark.parametrize(("name", "small"), [("nvlink3", "one-shot"), ("nvlink4", "one-shot"), ("pcie4", "one-shot")])
def test_small_messages_take_few_rounds_and_large_ones_the_fewest_bytes(name: str, small: str) -> None:
    m = machine(name)
    assert choices(m, "all_reduce", 1 << 13, 8)[0].algorithm == small
    assert choices(m, "all_reduce", 1 << 28, 8)[0].algorithm in ("two-shot", "ring")
    assert choices(m, "all_reduce", 1 << 28, 8)[-1].algorithm == "one-shot"


def test_roofline_by_hand() -> None:
    compute = Compute((("fp32", 2.0),), 0.5, 3.0, 1.0, "test")
    assert kernel_us(compute, "fp32", 8e6, 1e6) == 4 + 3  # 8 MFLOP at 2 TFLOP/s
    assert kernel_us(compute, "fp32", 8e6, 4e6) == 8 + 3  # 4 MB at 0.5 TB/s
    with pytest.raises(ValueError, match=r"no TFLOP/s of 'bf16' known \(test\): only of fp32"):
        kernel_us(compute, "bf16", 8e6, 1e6)


@pytest.mark.parametrize(("rows", "chunks"), [(1024, 1), (1024, 4), (1000, 4), (200, 8), (640, 4), (1152, 8), (1, 8)])
def test_rows_of_the_chunks(rows: int, chunks: int) -> None:
    cut = chunk_rows(rows, chunks)
    assert sum(cut) == rows
    assert 1 <= len(cut) <= chunks
    assert all(n == cut[0] and n % CHUNK_ROWS == 0 for n in cut[:-1])
    assert 0 < cut[-1] <= cut[0]
    assert {(1000, 4): (256, 256, 256, 232), (200, 8): (128, 72), (640, 4): (256, 256, 128)}.get(
        (rows, chunks), cut
    ) == cut


def test_pipeline_of_chunks_by_hand() -> None:
    """1 TFLOP/s, 1 TB/s, 1 GB/s, P=2 by a ring: 1000 bytes take a µs and 2 rounds of 1 µs."""
    shape = (by_hand(), 320, 1000, 500, 2, "fp32")
    # Chunks of 256 and 64 rows, unless there is one; a GEMM is 1 MFLOP a row, 4000 bytes a row are reduced.
    assert linear2_pipeline(*shape, 1) == Pipeline(1, 320, pytest.approx(1282), 0, "ring")
    whole, last = 256 * 4 + 2, 64 * 4 + 2
    cut = linear2_pipeline(*shape, 2)
    assert cut == Pipeline(2, 320, pytest.approx(whole + last), pytest.approx(64), "ring")
    assert cut.us(1.0) == pytest.approx(256 + whole + last)
    assert cut.us(0.25) == pytest.approx(320 + whole + last - 16)
    # Arithmetic of 256 µs outlasts the all-reduce of 1-byte elements: 258 µs, but the last GEMM's 64 do not.
    narrow = linear2_pipeline(*shape, 2, 1)
    assert narrow.us(1.0) == pytest.approx(256 + 258 + 66)


def test_a_chunk_writes_y_in_the_dtype_of_the_all_reduce_by_hand() -> None:
    """At 1 TB/s: x 128·10 and w2 10·1000 elements of 2 bytes read, y 128·1000 of 4 written."""
    slow = replace(by_hand(), computes=(Compute((("bf16", 1e6),), 1e-3, 0.0, 1.0, "test"),))
    cut = linear2_pipeline(slow, 128, 1000, 10, 4, "bf16", 1, 4)
    assert cut.gemms_us == pytest.approx((2 * (1280 + 10_000) + 4 * 128_000) / 1e3)


@pytest.mark.parametrize(
    ("alpha", "reduced_itemsize", "best"),
    [(1, None, 8), (50, None, 4), (200, None, 2), (400, None, 1), (22, None, 4), (22, 1, 8)],
)
def test_forward_chunks_is_the_cheapest_of_the_candidates(
    alpha: float, reduced_itemsize: int | None, best: int
) -> None:
    m, (tokens, hidden, shard, p) = replace(by_hand(), link=link(0, alpha, 1)), (2048, 1000, 1000, 4)

    def predicted(chunks: int) -> float:
        rows = tokens / chunks
        gemm = 2 * rows * hidden * shard / 1e6
        # Ring or tree: 6 rounds each, 1.5 or 2 times the bytes.
        reduce = 6 * alpha + 1.5 * (reduced_itemsize or 4) * rows * hidden / 1e3
        return chunks * (gemm + reduce) - (chunks - 1) * min(gemm, reduce)

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
def test_forward_chunks_never_asks_for_chunks_that_cannot_be_made(tokens: int, hidden: int, p: int) -> None:
    chunks = forward_chunks(machine("pcie5"), tokens, hidden, hidden, p, "bf16")
    assert chunks in CHUNKS
    assert chunks == 1 or len(chunk_rows(tokens, chunks)) > len(chunk_rows(tokens, chunks // 2))
