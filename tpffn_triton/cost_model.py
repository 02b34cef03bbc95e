"""Predict the time of collectives and kernels: α–β for the links, a roofline for what a rank computes.

One collective over P ranks, N the bytes of its full tensor (all-gather: its result; reduce-scatter: its input):

    kind                        algorithm   rounds        bytes a rank sends
    all_reduce                  ring        2(P-1)        2(P-1)/P · N
                                tree        2(P-1)        2N                  within a node: a chain
                                            2⌈log₂ P⌉     2N                  between nodes
                                one-shot    1             (P-1) · N
                                two-shot    2             2(P-1)/P · N
    all_gather, reduce_scatter  ring        P-1           (P-1)/P · N
                                direct      1             (P-1)/P · N

    time = base + rounds · α + bytes / β

A tree is pipelined: every byte goes up and down once; NCCL's is a binary tree of nodes, in each a chain of ranks.
One-shot: each rank reads every other's tensor and sums. Two-shot: a direct reduce-scatter, then a direct all-gather.
Over K = P/L nodes of L ranks it is hierarchical:

    all_reduce      reduce-scatter of N in a node, all-reduce of N/L over K nodes, all-gather of N in a node
    all_gather      all-gather of N/L over K nodes, all-gather of N in a node; reduce_scatter the other way round

one-shot and two-shot go direct inside a node, ring and tree as a ring; the algorithm named is the one between nodes.

A kernel takes max(FLOPs / rate, HBM bytes / bandwidth) + launch.

Linear2 in row chunks, each a multiple of 128 rows but for the last: chunk i's all-reduce runs beside chunk i+1's GEMM.
With gᵢ the time of a chunk's GEMM, aᵢ that of its all-reduce and o the machine's overlap

    time = Σ gᵢ + Σ aᵢ - o · Σ min(aᵢ, gᵢ₊₁)

Not modelled: skew between ranks, wave quantization, the SMs and the memory bandwidth that a collective takes from
kernels (unless `overlap` was measured), network congestion, multimem (NVLS).

Source: α–β and the ring: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
MPICH" (2005); Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
Pipelined trees: Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"
(2009). Bases and protocols: NCCL (presets.py). Roofline: Williams, Waterman and Patterson, "Roofline" (2009).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tpffn_triton.machines import ALGORITHMS, ITEMSIZE, Compute, Link, Machine, measured_at

CHUNKS = (1, 2, 4, 8)
# A row chunk is a multiple of the tallest tile, so that no tile is cut in two.
CHUNK_ROWS = 128
# What a process group of NCCL or gloo may choose by itself, so what ffn() runs; the others take symmetric memory.
LIBRARY_ALGORITHMS = ("ring", "tree")


@dataclass(frozen=True)
class Choice:
    """An algorithm and the µs it takes."""

    algorithm: str
    us: float


@dataclass(frozen=True)
class Pipeline:
    """Linear2 and its all-reduce in `chunks` row chunks, in µs.

    gemms_us, all_reduces_us   of all chunks, each alone
    beside_us                  of all-reduces and GEMMs in flight at the same time
    algorithm                  of a whole chunk's all-reduce
    """

    chunks: int
    gemms_us: float
    all_reduces_us: float
    beside_us: float
    algorithm: str

    def us(self, overlap: float) -> float:
        return self.gemms_us + self.all_reduces_us - overlap * self.beside_us


def rounds_and_bytes(
    kind: str, algorithm: str, nbytes: float, world_size: int, between_nodes: bool = False
) -> tuple[int, float]:
    """Return (rounds, bytes that one rank sends); see the module docstring. None for one rank.

    Raises: ValueError: no such kind or algorithm.
    """
    if algorithm not in ALGORITHMS.get(kind, ()):
        known = ", ".join(f"{name} by {' or '.join(ways)}" for name, ways in ALGORITHMS.items())
        raise ValueError(f"no {kind} by {algorithm}: {known}")
    p = world_size
    if p == 1:
        return 0, 0.0
    share = (p - 1) / p * nbytes
    if kind != "all_reduce":
        return (p - 1 if algorithm == "ring" else 1), share
    return {
        "ring": (2 * (p - 1), 2 * share),
        "tree": (2 * ((p - 1).bit_length() if between_nodes else p - 1), 2 * nbytes),
        "one-shot": (1, (p - 1) * nbytes),
        "two-shot": (2, 2 * share),
    }[algorithm]


def link_us(
    link: Link, kind: str, algorithm: str, nbytes: float, world_size: int, between_nodes: bool = False
) -> float | None:
    """Return the time on one link, by the fastest of its protocols; None where it has no such algorithm."""
    rounds, sent = rounds_and_bytes(kind, algorithm, nbytes, world_size, between_nodes)
    if rounds == 0:
        return 0.0
    terms = [t for t in link.terms if t.algorithm == algorithm and t.kind in ("", kind)]
    times = [t.base_us + rounds * t.alpha_us + sent / t.gb_per_s / 1e3 for t in measured_at(terms, world_size)]
    return min(times) if times else None


def nodes_needed(machine: Machine, world_size: int) -> int:
    """Return the nodes that world_size ranks fill. Raises: ValueError: a part of a node would be left over."""
    if world_size <= machine.ranks_per_node:
        return 1
    nodes, left = divmod(world_size, machine.ranks_per_node)
    if left:
        raise ValueError(f"{world_size} ranks do not fill nodes of {machine.ranks_per_node}")
    return nodes


def collective_us(machine: Machine, kind: str, algorithm: str, nbytes: float, world_size: int) -> float | None:
    """Return the time of a collective, hierarchical where it spans nodes; None where a link has no such algorithm.

    Raises: ValueError: no such kind or algorithm, ranks that do not fill their nodes, or no network between nodes.
    """
    nodes = nodes_needed(machine, world_size)
    if nodes == 1:
        return link_us(machine.link, kind, algorithm, nbytes, world_size)
    if machine.network is None:
        raise ValueError(f"{world_size} ranks need {nodes} nodes of {machine.name}, which has no network")
    local = machine.ranks_per_node
    within = "ring" if algorithm in LIBRARY_ALGORITHMS else "direct"
    stages = [link_us(machine.network, kind, algorithm, nbytes / local, nodes, between_nodes=True)]
    inside = ("reduce_scatter", "all_gather") if kind == "all_reduce" else (kind,)
    stages += [link_us(machine.link, stage, within, nbytes, local) for stage in inside]
    times = [us for us in stages if us is not None]
    return sum(times) if len(times) == len(stages) else None


def choices(
    machine: Machine, kind: str, nbytes: float, world_size: int, algorithms: tuple[str, ...] | None = None
) -> list[Choice]:
    """Return every algorithm that the machine's links have (of `algorithms`, if given), fastest first.

    Raises: ValueError: there is none, and as collective_us.
    """
    found = []
    for algorithm in ALGORITHMS[kind]:
        if algorithms is None or algorithm in algorithms:
            us = collective_us(machine, kind, algorithm, nbytes, world_size)
            found += [] if us is None else [Choice(algorithm, us)]
    if not found:
        asked = "" if algorithms is None else f" by {' or '.join(algorithms)}"
        raise ValueError(f"no figures for {kind}{asked} of {machine.name}")
    return sorted(found, key=lambda choice: choice.us)


def kernel_us(compute: Compute, dtype: str, flops: float, hbm_bytes: float) -> float:
    """Return the roofline's time of one kernel. Raises: ValueError: no rate known for this dtype."""
    arithmetic_us = flops / compute.rate(dtype) / 1e6 if flops else 0.0
    return max(arithmetic_us, hbm_bytes / compute.tb_per_s / 1e6) + compute.launch_us


def rows_of_a_chunk(rows: int, chunks: int) -> int:
    """Return the rows of each chunk but the last when `rows` are cut into at most `chunks`: n × CHUNK_ROWS."""
    each = -(-rows // chunks)
    return -(-each // CHUNK_ROWS) * CHUNK_ROWS


def chunk_rows(rows: int, chunks: int) -> tuple[int, ...]:
    """Return the rows of each chunk when `rows` are cut into at most `chunks`."""
    each = rows_of_a_chunk(rows, chunks)
    return tuple(min(each, rows - start) for start in range(0, rows, each))


def linear2_pipeline(
    machine: Machine,
    tokens: int,
    hidden: int,
    shard_features: int,
    world_size: int,
    dtype: str,
    chunks: int,
    reduced_itemsize: int | None = None,
    algorithms: tuple[str, ...] | None = LIBRARY_ALGORITHMS,
) -> Pipeline:
    """Return Linear2 and its all-reduce in at most `chunks` row chunks; arguments as forward_chunks.

    Every chunk reads all of w2, and writes its part of y in the all-reduce's dtype.
    """
    itemsize, compute = ITEMSIZE[dtype], machine.compute(world_size)
    gemms, reductions = [], []
    for rows in chunk_rows(tokens, chunks):
        nbytes = rows * hidden * (reduced_itemsize or itemsize)
        read = (rows * shard_features + hidden * shard_features) * itemsize
        gemms.append(kernel_us(compute, dtype, 2 * rows * hidden * shard_features, read + nbytes))
        reductions.append(choices(machine, "all_reduce", nbytes, world_size, algorithms)[0])
    times = [reduction.us for reduction in reductions]
    beside = sum(map(min, times, gemms[1:]))
    return Pipeline(len(gemms), sum(gemms), sum(times), beside, reductions[0].algorithm)


@functools.lru_cache(maxsize=1024)
def forward_chunks(
    machine: Machine,
    tokens: int,
    hidden: int,
    shard_features: int,
    world_size: int,
    dtype: str,
    reduced_itemsize: int | None = None,
    algorithms: tuple[str, ...] | None = LIBRARY_ALGORITHMS,
) -> int:
    """Return the most row chunks to cut Linear2 into, 1, 2, 4 or 8, with the least predicted time; 1 where none pays.

    tokens             M                    hidden        H
    shard_features     F/P                  world_size    P
    dtype              "fp32", "tf32", "bf16" or "fp16"
    reduced_itemsize   bytes of an element in the all-reduce, where it is not dtype's
    algorithms         of the all-reduce, None for all; a process group has ring and tree

    Raises: ValueError: an unknown dtype, one whose rate the machine does not have, and as collective_us.
    """
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    if world_size == 1 or tokens == 0:
        return 1
    shape = (machine, tokens, hidden, shard_features, world_size, dtype)
    overlap = machine.compute(world_size).overlap
    times = [(linear2_pipeline(*shape, c, reduced_itemsize, algorithms).us(overlap), c) for c in CHUNKS]
    return min(times)[1]  # of equal times the fewest chunks
