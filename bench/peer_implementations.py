"""List the peers: all that compute one rank's FFN here or elsewhere, ours among them.

A new one of ours is a line in OURS; one of others, a Peer in PEERS.
"""

from collections.abc import Callable, Iterable
from typing import Any

import checkout  # noqa: F401
import compiler
import nvmath_peer
import torch
import torch.nn.functional as F
import vendor_peers
from implementations import IMPLEMENTATIONS, Forward, Group, here
from peer import EAGER, FUSED, TWO_GEMMS, Peer, Place, importable
from shards import TUNED_AT
from torch import Tensor
from workloads import MODES, Problem

from tpffn_triton import ffn
from tpffn_triton.kernels.activations import ACTIVATIONS, halves

HALF = ("bf16", "fp16")


def _ours(**options: Any) -> Callable[[str], Forward]:
    def build(activation: str) -> Forward:
        def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
            return ffn(x, w1, w2, b1, b2, activation=activation, **options)

        return forward

    return build


def _existing(of: str, **changes: Any) -> Peer:
    """Return the implementation of this name (implementations.py) as a peer."""
    known = IMPLEMENTATIONS[of]
    given: dict[str, Any] = {
        "name": of,
        "label": known.summary,
        "build": lambda activation: known.build(activation, False),
        "computes": dict.fromkeys(known.device_types, ACTIVATIONS),
        "dtypes": known.dtypes,
        "missing": lambda place: known.missing(),
        "launchers": known.launchers,
    }
    return Peer(**given | changes)


def _compiled(**options: Any) -> Callable[[str], Forward]:
    def build(activation: str) -> Forward:
        return torch.compile(IMPLEMENTATIONS["unfused"].build(activation, False), dynamic=False, **options)

    return build


def _no_compiler(place: Place) -> str | None:
    reason = compiler.missing() if place.device_type == "cpu" else None
    return None if reason is None else f"needs a C++ compiler ({reason}): apt-get install g++ python3-dev"


def _addmm_epilogue(activation: str) -> Forward:
    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        hidden = torch._addmm_activation(b1, x.flatten(0, -2), w1.t(), use_gelu=activation != "relu")
        return torch.addmm(b2, hidden, w2.t()).view(x.shape)

    return forward


def _two_gemms(activation: str) -> Forward:
    def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group: Group) -> Tensor:
        # Of a gated layer's first product, the half that the second GEMM can take.
        return F.linear(F.linear(x, w1)[..., : w2.shape[1]], w2)

    return forward


def _two_products(problem: Problem, activation: str) -> dict[str, Tensor]:
    x, w1, w2 = (t.detach().double() for t in (problem.x, problem.w1, problem.w2))
    return {"y": x @ w1[: w1.shape[0] // halves(activation)].t() @ w2.t()}


def _our_peer(name: str, label: str, modes: tuple[str, ...] = MODES, **options: Any) -> Peer:
    """Return tpffn_triton.ffn with these options as a peer."""
    return Peer(name, label, _ours(**options), modes=modes, ours=True)


OURS = (
    _our_peer(FUSED, "tpffn_triton.ffn"),
    _existing("fused-triton", ours=True),
    _our_peer("fused-recompute", "the same with save='nothing': backward recomputes", ("fwd_bwd",), save="nothing"),
    _our_peer("fused-invariant", "the same, batch_invariant: a token's bits are its own", batch_invariant=True),
)


def _cuda(activations: Iterable[str]) -> dict[str, Iterable[str]]:
    return {"cuda": tuple(activations)}


def _of_quack(name: str, label: str, tuned: bool) -> Peer:
    return Peer(
        name,
        label,
        vendor_peers.build_quack(tuned),
        computes=_cuda(vendor_peers.QUACK),
        dtypes=HALF,
        shapes=TUNED_AT if tuned else None,
        least=(9, 0),
        missing=importable(vendor_peers.QUACK_MODULE, "quack-kernels"),
        package="quack-kernels",
    )


# In the order of the table. Megatron's forgets, where it is made, what torch has compiled: it comes before those.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _existing("unfused", name=EAGER, label="F.linear, activation, F.linear, by torch's eager operations"),
        _existing("unfused-onednn"),
        Peer(
            "addmm-epilogue",
            "torch._addmm_activation, whose GEMM holds the activation (cuBLASLt on CUDA), then addmm; forward alone",
            _addmm_epilogue,
            computes={"cuda": ("gelu_tanh", "relu"), "cpu": ("gelu", "relu")},
            modes=("fwd",),
        ),
        _existing("megatron", package="megatron-core"),
        Peer("compile", "torch.compile of eager, default mode", _compiled(), missing=_no_compiler),
        Peer(
            "compile-max-autotune",
            "torch.compile of eager, mode max-autotune-no-cudagraphs; on a CPU that tunes frozen weights only",
            _compiled(mode="max-autotune-no-cudagraphs"),
            computes=_cuda(ACTIVATIONS),
            shapes=TUNED_AT,
        ),
        Peer(
            "nvmath",
            "nvmath-python: cuBLASLt's epilogues GELU_AUX_BIAS and DGELU_BGRAD",
            nvmath_peer.build,
            computes=_cuda(("gelu_tanh",)),
            dtypes=HALF,
            missing=importable(nvmath_peer.MODULE, f"'nvmath-python[cu{(torch.version.cuda or '13').split('.')[0]}]'"),
            package="nvmath-python",
        ),
        Peer(
            "liger",
            "Liger-Kernel's fused activation and product between torch's F.linear",
            vendor_peers.build_liger,
            computes=_cuda(vendor_peers.LIGER),
            missing=importable("liger_kernel.ops.geglu", "liger-kernel"),
            package="liger-kernel",
        ),
        _of_quack("quack", "QuACK's mlp_func: activation and its gradient in GEMMs' epilogues, default tiles", False),
        _of_quack("quack-tuned", "the same, tiles found by its autotuner", True),
        Peer(
            "transformer-engine",
            "Transformer Engine's ops.Sequential(Linear, activation, Linear)",
            vendor_peers.build_transformer_engine,
            computes=_cuda(vendor_peers.TE),
            dtypes=("fp32", *HALF),
            missing=importable(vendor_peers.TE_MODULE, "--no-build-isolation 'transformer_engine[pytorch]'"),
            package="transformer_engine",
        ),
        Peer(
            TWO_GEMMS,
            "x w1ᵀ w2ᵀ: two bare GEMMs, neither bias nor activation, the wide layers' yardstick; forward alone",
            _two_gemms,
            modes=("fwd",),
            reference=_two_products,
        ),
        *OURS,
    )
}
PACKAGES = tuple(sorted({peer.package for peer in PEERS.values() if peer.package}))


def chosen(names: tuple[str, ...] | None, place: Place) -> list[Peer]:
    """Return the named peers, or with None all that are here.

    Raises: ValueError: a named one is not here; says why.
    """
    return here(PEERS, names, "peer", lambda peer: peer.reason_against(place))


def listing(place: Place) -> str:
    """Return a line for each peer, below it why it is not here."""
    where = f"{place.activation}, {place.dtype}, {place.device_type}"
    lines = [f"peers for {where}:"]
    for peer in PEERS.values():
        reason = peer.reason_against(place)
        only = f" (only at {', '.join(peer.shapes)})" if peer.shapes else ""
        lines.append(f"  {peer.name:21}{'yes' if reason is None else 'no ':4} {peer.label}{only}")
        lines += [] if reason is None else [f"{'':28}{reason}"]
    return "\n".join(lines)
