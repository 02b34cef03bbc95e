"""Machines whose constants come from named sources: GPUs, links, and which of them go together.

`GPUS` lists devices by the exact name that torch reports, so that a slice of a GPU has no figures. Their `overlap` is
1, the ideal: what SMs and memory bandwidth a collective takes from the kernels beside it is not yet measured.

Links: NCCL's tuning model, version 2.30.7 (github.com/NVIDIA/nccl), from which NCCL itself chooses algorithm and
protocol. One term is one protocol of one algorithm:

    base, α      src/graph/tuning.cc: baseLatencies and hwLatencies (NVLINK, PCI, NET) for LL, LL128 and Simple; with
                 one rank a node rings take the network latencies of trees
    GB/s         src/graph/topo.h and topo.cc: 20.0, 20.6 and 40.1 for each of the 12, 18 and 18 links of NVLink 3, 4
                 and 5; PCIe x16 24 and 48; src/graph/search.cc: 48 and 24 of a 400 and 200 Gb/s port
                 tuning.cc: LL carries half of that and no more than llMaxBws, which between nodes go by the host's CPU
                 and the number of nodes and are shared by a node's ranks; LL128 0.92; a tree 0.92, times 7/9 within a
                 node in LL128, over 3.8 in LL
    symmetric    derived from src/sym_kernels.cc, queryModel_lsa: kernels that read and write peers' memory: one base
                 each, 320 and 600 GiB/s on Hopper and Blackwell, in LL 9·P·N bytes, here 9·(P-1)·N. NCCL has one-shot
                 in LL alone: in bulk, with the base and rate of two-shot, it is this package's guess

LL128 needs NVLink within a node. Over PCIe and InfiniBand, one-shot, two-shot and direct are messages to all peers at
once: one round of the ring's α. Each rank has its own InfiniBand port (DGX A100, H100 and B200).
"""

from __future__ import annotations

from dataclasses import replace

from tpffn_triton.machines import AlphaBeta, Compute, Link, Machine

# Hazy Research, "Look Ma, No Bubbles" (2025), on an H100 inside CUDA graphs; taken for the other GPUs too.
LAUNCH_US = 1.3


def _gpu(sixteen_bit: float, tf32: float, fp32: float, tb_per_s: float, source: str) -> Compute:
    tflops = (("bf16", sixteen_bit), ("fp16", sixteen_bit), ("tf32", tf32), ("fp32", fp32))
    return Compute(tflops, tb_per_s, LAUNCH_US, 1.0, source)


_PUBLISHED = "bf16 and memory as others measured (8192³ on random data, device-to-device copy), tf32 and fp32 datasheet"
GPUS = {
    "NVIDIA H100 80GB HBM3": _gpu(800, 494, 67, 3.0, _PUBLISHED),
    "NVIDIA H200": _gpu(790, 494, 67, 4.3, _PUBLISHED),
    "NVIDIA H100 PCIe": _gpu(756, 378, 51, 2.0, "datasheet"),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 156, 19.5, 2.04, "datasheet"),
    "NVIDIA A100-SXM4-40GB": _gpu(312, 156, 19.5, 1.56, "datasheet"),
    "NVIDIA A100 80GB PCIe": _gpu(312, 156, 19.5, 1.94, "datasheet"),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 156, 19.5, 1.56, "datasheet"),
    "NVIDIA B200": _gpu(2250, 1100, 80, 8.0, "datasheet, 1000 W"),
}

_NCCL = "NCCL 2.30.7 tuning model"
_SYMMETRIC = "derived from NCCL 2.30.7 symmetric kernels"
_GIB = 1.073741824


def _ring(protocol: str, base: float, alpha: float, gb_per_s: float) -> AlphaBeta:
    return AlphaBeta("ring", base, alpha, gb_per_s, f"{_NCCL}, ring, {protocol}")


def _tree(protocol: str, base: float, alpha: float, gb_per_s: float) -> AlphaBeta:
    return AlphaBeta("tree", base, alpha, gb_per_s, f"{_NCCL}, tree, {protocol}")


def _direct(kind: str, algorithms: tuple[str, ...], base: float, alpha: float, gb_per_s: float, source: str):
    return tuple(AlphaBeta(name, base, alpha, gb_per_s, source, kind) for name in algorithms)


def _nvlink(name: str, gb: float, ll_gb: float, peer_gb: float, bases: dict[str, tuple[float, float]]) -> Link:
    """gb: of a rank's links together; ll_gb: the most in LL; peer_gb, bases (plain, LL): of symmetric kernels."""
    ll = min(ll_gb, gb / 2)
    terms = [
        _ring("LL", 6.6, 0.6, ll),
        _ring("LL128", 14.0, 1.9, 0.92 * gb),
        _ring("Simple", 8.4, 3.4, gb),
        _tree("LL", 6.8, 0.6, min(ll_gb, 0.92 * gb / 3.8)),
        _tree("LL128", 14.0, 1.25, 0.92 * gb * 7 / 9),
        _tree("Simple", 8.4, 4.0, 0.92 * gb),
    ]
    for kind, (plain, low_latency) in bases.items():
        bulk = ("one-shot", "two-shot") if kind == "all_reduce" else ("direct",)
        terms += _direct(kind, bulk, plain, 0, peer_gb, _SYMMETRIC)
        terms += _direct(kind, bulk[:1], low_latency, 0, peer_gb / 9, f"{_SYMMETRIC}, LL")
    return Link(name, tuple(terms))


def _messages(name: str, gb: float, ring: tuple[AlphaBeta, ...], tree: tuple[AlphaBeta, ...], alpha: float) -> Link:
    """A link without symmetric kernels: one-shot, two-shot and direct are messages, in NCCL's Simple protocol."""
    source = f"{_NCCL}, ring, Simple: messages to all peers at once"
    peers = _direct("all_reduce", ("one-shot", "two-shot"), 8.4, alpha, gb, source)
    for kind in ("all_gather", "reduce_scatter"):
        peers += _direct(kind, ("direct",), 8.4, alpha, gb, source)
    return Link(name, (*ring, *tree, *peers))


def _pcie(name: str, gb: float) -> Link:
    ring = (_ring("LL", 6.6, 1.0, gb / 2), _ring("Simple", 8.4, 5.7, gb))
    tree = (_tree("LL", 6.8, 1.0, 0.92 * gb / 3.8), _tree("Simple", 8.4, 4.0, 0.92 * gb))
    return _messages(name, gb, ring, tree, alpha=5.7)


# GB/s of a port; llMaxBws of two nodes and of more, of the hosts that usually have it: AMD with HDR, Intel with NDR.
_PORTS = {"infiniband-hdr": (24.0, 22.5, 19.0), "infiniband-ndr": (48.0, 39.0, 20.4)}


def infiniband(name: str, ranks_per_node: int) -> Link:
    """Return the link between nodes whose ranks have a port each, infiniband-hdr or infiniband-ndr."""
    gb, two_nodes, more = _PORTS[name]
    alone = ranks_per_node == 1
    low_latency = []
    for nodes, cap in ((2, two_nodes), (3, more)):
        share = cap / ranks_per_node
        ways = (
            _ring("LL", 6.6, 5.0 if alone else 2.7, min(share, gb / 2)),
            _tree("LL", 6.8, 5.0, min(share, 0.92 * gb / 3.8)),
        )
        low_latency += [replace(term, world_size=nodes) for term in ways]
    ring = (_ring("LL128", 14.0, 8.5 if alone else 4.0, 0.92 * gb), _ring("Simple", 8.4, 14.0, gb))
    tree = (_tree("LL128", 14.0, 8.5, 0.92 * gb * 120 / 128), _tree("Simple", 8.4, 14.0, 0.92 * gb))
    shown = name if alone else f"{name}, {ranks_per_node} ranks a node"
    return _messages(shown, gb, (*low_latency, *ring), tree, alpha=14.0)


_HOPPER = dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), (7.8, 4.5))
_BLACKWELL = {"all_reduce": (19.5, 11.0), "all_gather": (13.0, 8.5), "reduce_scatter": (13.0, 11.0)}
LINKS = {
    link.name: link
    for link in (
        _nvlink("nvlink3", 12 * 20.0, 87.7, 12 * 20.0, _HOPPER),  # symmetric kernels: NCCL has Hopper's bases for it
        _nvlink("nvlink4", 18 * 20.6, 141.0, 320 * _GIB, _HOPPER),
        _nvlink("nvlink5", 18 * 40.1, 282.0, 600 * _GIB, _BLACKWELL),
        _pcie("pcie4", 24.0),
        _pcie("pcie5", 48.0),
        infiniband("infiniband-hdr", 1),
        infiniband("infiniband-ndr", 1),
    )
}
# Link within a node: GPU, link between nodes, ranks of a node. Over InfiniBand alone every rank is a node.
_SYSTEMS = {
    "nvlink3": ("NVIDIA A100-SXM4-80GB", "infiniband-hdr", 8),
    "nvlink4": ("NVIDIA H100 80GB HBM3", "infiniband-ndr", 8),
    "nvlink5": ("NVIDIA B200", "infiniband-ndr", 8),
    "pcie4": ("NVIDIA A100 80GB PCIe", "infiniband-hdr", 8),
    "pcie5": ("NVIDIA H100 PCIe", "infiniband-ndr", 8),
    "infiniband-hdr": ("NVIDIA A100-SXM4-80GB", "infiniband-hdr", 1),
    "infiniband-ndr": ("NVIDIA H100 80GB HBM3", "infiniband-ndr", 1),
}
_GPU_NAMES = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "b200": "NVIDIA B200",
}
GPU_CHOICES = (*_GPU_NAMES,)


def machine(link: str, gpu: str | None = None, ranks_per_node: int | None = None) -> Machine:
    """Return the machine of a link preset, with its usual GPU and network unless told otherwise.

    link   nvlink3 (A100), nvlink4 (H100), nvlink5 (B200), pcie4, pcie5, infiniband-hdr, infiniband-ndr
    gpu    h100, h200, a100, b200

    Raises: ValueError: an unknown name, or ranks_per_node below 1.
    """
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}: one of {', '.join(LINKS)}")
    if gpu is not None and gpu not in _GPU_NAMES:
        raise ValueError(f"unknown gpu {gpu!r}: one of {', '.join(_GPU_NAMES)}")
    usual, network, ranks = _SYSTEMS[link]
    name = usual if gpu is None else _GPU_NAMES[gpu]
    local = ranks if ranks_per_node is None else ranks_per_node
    return Machine(f"{name}, {link}", (GPUS[name],), LINKS[link], infiniband(network, max(local, 1)), local)
