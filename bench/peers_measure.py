"""Measure every peer on one rank's shard: compare with fp64, then time, interleaved, then weigh.

One row a shape, mode, run, state of L2 and peer. A peer that raises or is wrong is refused: not timed, no row.

    impl, label         the peer (peer_implementations.py)
    regime, shape       shards.py; tokens M, hidden H, ffn_per_rank F/P
    run                 "eager": the host's launches count; "graph": the replay of a CUDA graph
    l2                  "cold", "warm" (timing.py); on a CPU "as left" by the peer before
    ms_p20 ... p80      time of a step
    ratio_p20 ... p80   this peer's time over fused's, by round: above 1 fused is faster; None without fused
    flops, moved_bytes  the step's GEMM FLOPs, and the least bytes that it must read and write
    tflops, gb_per_s    those over ms_p50
    roofline_pct        least possible time on this device (environment.py) over ms_p50; None: unknown device
    errors              tensor → ‖out − ref‖ / ‖ref‖ against fp64; max_rel_err: the largest
    error_vs_eager      the largest of this error over eager's, over the tensors that eager rounds; None without eager,
                        or where the reference is not the FFN (two-gemms)
    saved_bytes         mode fwd_bwd: what is kept for backward beside x and the parameters, as autograd's hooks see it
    peak_mem_bytes      one eager step's (memory.py)
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import environment
import gate
import memory
import timing
import torch
import workloads
from budget import Budget
from exchanged_launchers import launched_by
from implementations import Forward
from peer import Peer, Place
from peer_implementations import EAGER, FUSED, PACKAGES, chosen
from peer_results import SAME, Key, Results
from ranks import Rank
from shards import Shard
from steps import Step, make_step
from tables import Row
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from workloads import Problem


@dataclass(frozen=True)
class Settings:
    """What to measure; peers None: all that are here, rounds None: as many as fit, budget_s None: no limit."""

    shards: tuple[Shard, ...]
    peers: tuple[str, ...] | None
    place: Place
    modes: tuple[str, ...]
    runs: tuple[str, ...]
    l2s: tuple[str, ...]
    rounds: int | None
    quick: bool
    budget_s: float | None
    command: str


@dataclass
class Outcome:
    """What has no row: why peers were refused, whether one of ours was, and what the budget left out."""

    refused: list[str] = field(default_factory=list)
    ours_refused: bool = False
    left_out: list[str] = field(default_factory=list)

    def refuse(self, why: str, ours: bool) -> None:
        """Note why something is not timed, and whether it is ours."""
        self.refused.append(why)
        self.ours_refused |= ours


@dataclass(frozen=True)
class Subject:
    """One shape's tensors, P=1, and what a peer must make of them, in fp64."""

    rank: Rank
    settings: Settings
    shard: Shard
    problem: Problem
    ffn: dict[str, Tensor]

    def reference(self, peer: Peer) -> dict[str, Tensor]:
        """Return what the peer is compared with."""
        return self.ffn if peer.reference is None else peer.reference(self.problem, self.settings.place.activation)


def measure(rank: Rank, settings: Settings, results: Results) -> Outcome:
    """Measure what the results lack, and add each shape's rows to them at once."""
    outcome, budget = Outcome(), Budget(settings.budget_s)
    surroundings = environment.describe(rank) | {"command": settings.command}
    surroundings |= {"kernels": environment.kernels_digest(), "quick": settings.quick}
    for number, shard in enumerate(settings.shards):
        wanted = []
        for key in _keys(settings, shard, surroundings):
            if kept := results.peers(key):
                rank.say(f"{key}: kept as measured before: {', '.join(kept)}")
            else:
                wanted.append(key)
        if wanted and budget.is_spent():
            outcome.left_out += map(str, wanted)
        elif wanted:
            share = budget.share(len(settings.shards) - number)
            try:
                with gate.matmul_precision(settings.place.dtype):
                    rows = _measure_shard(rank, settings, shard, wanted, share, outcome)
            except Exception as error:  # memory, as a rule: the next shape may fit
                traceback.print_exc()
                outcome.refuse(f"{shard.shape.name} failed: {type(error).__name__}: {error}", ours=True)
            else:
                versions = {"versions": environment.versions(PACKAGES)}
                results.add([row | surroundings | versions for row in rows])
    return outcome


def _keys(settings: Settings, shard: Shard, surroundings: Row) -> Iterator[Key]:
    """Yield what is timed at this shape, in order."""
    s, place = shard.shape, settings.place
    for mode in settings.modes:
        for run in settings.runs:
            for l2 in settings.l2s:
                how = (place.activation, place.dtype, mode, run, l2)
                same = (surroundings[name] for name in SAME)
                yield Key(s.name, s.tokens, s.hidden, s.ffn, *how, *same)


def _measure_shard(
    rank: Rank, settings: Settings, shard: Shard, wanted: list[Key], share: Budget, outcome: Outcome
) -> list[Row]:
    """Return the rows of one shape; within its share of the budget, but for what each peer takes to begin."""
    shape, activation = shard.shape, settings.place.activation
    rank.say(f"{shape.name}: computing the fp64 reference")
    problem = workloads.shard(workloads.draw(shape, settings.place.dtype, activation, rank.device), 0, 1, activation)
    most = "fwd_bwd" if "fwd_bwd" in settings.modes else "fwd"
    subject = Subject(rank, settings, shard, problem, workloads.expected(problem, most, activation))
    torch.compiler.reset()  # what is compiled is compiled for this shape alone
    rows: list[Row] = []
    ahead = len(wanted)
    for mode, of_mode in groupby(wanted, lambda key: key.mode):
        forwards = _built(subject, mode, outcome)
        weights: dict[str, dict[str, int | None]] = {}
        for run, of_run in groupby(of_mode, lambda key: key.run):
            steps, errors = _checked(subject, mode, run, forwards, outcome)
            for key in of_run:
                rows += _timed(subject, key, steps, errors, share.share(ahead), weights)
                ahead -= 1
            del steps  # a graph holds its results
    return rows


def _built(subject: Subject, mode: str, outcome: Outcome) -> dict[Peer, Forward]:
    """Return the forward of each peer that can be built."""
    settings, name = subject.settings, subject.shard.shape.name
    forwards = {}
    for peer in chosen(settings.peers, settings.place):
        if not peer.is_timed(name, mode):
            continue
        try:
            forwards[peer] = peer.build(settings.place.activation)
        except Exception as failure:
            traceback.print_exc()
            outcome.refuse(f"{peer.name} ({name}, {mode}) failed: {type(failure).__name__}: {failure}", peer.ours)
    return forwards


def _checked(
    subject: Subject, mode: str, run: str, forwards: dict[Peer, Forward], outcome: Outcome
) -> tuple[dict[Peer, Step], dict[Peer, dict[str, float]]]:
    """Return the steps of the peers that are right, and their errors by tensor."""
    place, name = subject.settings.place, subject.shard.shape.name
    bound = gate.error_bound(place.dtype, place.activation)
    steps, errors = {}, {}
    for peer, forward in forwards.items():
        subject.rank.say(f"{name} {mode} {run}: comparing {peer.name} with fp64")
        what = f"{peer.name} ({name}, {place.activation}, {place.dtype}, {mode}, {run})"
        plain = partial(make_step, forward, subject.problem, None, mode, run == "graph")
        make = partial(launched_by, place.device_type, peer.launchers, plain)
        found = gate.checked(what, make, subject.reference(peer), bound, subject.rank)
        if found.step is None:
            outcome.refuse(found.refused or what, peer.ours)
        else:
            steps[peer], errors[peer] = found.step, found.errors
    return steps, errors


def _timed(
    subject: Subject,
    key: Key,
    steps: dict[Peer, Step],
    errors: dict[Peer, dict[str, float]],
    share: Budget,
    weights: dict[str, dict[str, int | None]],
) -> list[Row]:
    """Return a row a peer; weights: the memory of each, which this fills in."""
    if not steps:
        return []
    rank, settings = subject.rank, subject.settings
    rank.say(f"{key}: timing {', '.join(peer.name for peer in steps)}")
    how: dict[str, Any] = {"graph": key.run == "graph", "warm_l2": key.l2 == "warm", "seconds": share.left()}
    named = {peer.name: step for peer, step in steps.items()}
    times, rounds = timing.time_rounds(named, rank, quick=settings.quick, rounds=settings.rounds, **how)
    floors = subject.shard.shape.pass_floors(key.mode, key.dtype, key.activation)
    flops, moved = (sum(figures) for figures in zip(*floors, strict=True))
    least = environment.floor_ms(key.device, key.dtype, floors)
    eager = next((found for peer, found in errors.items() if peer.name == EAGER), {})
    rows = []
    for peer, step in steps.items():
        spread = timing.spread(times[peer.name].ms, "ms")
        p50, own = spread["ms_p50"], errors[peer]
        over_eager = [own[name] / error for name, error in eager.items() if error and peer.reference is None]
        if peer.name not in weights:
            weights[peer.name] = _weighed(subject, peer, step.forward, key.mode)
        rows.append(
            {
                "impl": peer.name,
                "label": peer.label,
                "regime": subject.shard.regime,
                **{name: value for name, value in vars(key).items() if name not in SAME},
                "bias": True,
                "iters": rounds,
                **spread,
                **timing.ratios(times[peer.name], times.get(FUSED)),
                "flops": flops,
                "moved_bytes": moved,
                "tflops": flops / p50 / 1e9,
                "gb_per_s": moved / p50 / 1e6,
                "roofline_pct": None if least is None else 100 * least / p50,
                "errors": own,
                "max_rel_err": max(own.values()),
                "error_vs_eager": max(over_eager, default=None),
                **weights[peer.name],
            }
        )
    return rows


def _weighed(subject: Subject, peer: Peer, forward: Forward, mode: str) -> dict[str, int | None]:
    """Return what an eager step keeps and needs of memory."""
    eager = partial(Step, forward, subject.problem, None, mode)
    step = launched_by(subject.settings.place.device_type, peer.launchers, eager)
    return {
        "saved_bytes": saved_bytes(forward, subject.problem) if mode == "fwd_bwd" else None,
        "peak_mem_bytes": memory.peak_bytes(step, subject.rank),
    }


def saved_bytes(forward: Forward, problem: Problem) -> int:
    """Return the bytes of the storages that a forward keeps for backward, beside those of x and the parameters."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, or the address of a freed one could come again

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    p = problem
    with saved_tensors_hooks(keep, lambda t: t):
        forward(p.x, p.w1, p.b1, p.w2, p.b2, None)
    given = {leaf.untyped_storage().data_ptr() for leaf in p.leaves().values()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given)
