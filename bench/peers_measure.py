"""Measure every peer on one rank's shard: weigh it, compare it with fp64, then time all, interleaved.

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
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import environment
import gate
import memory
import timing
import torch
import workloads
from budget import Budget
from exchanged_launchers import launched_by
from implementations import Forward
from peer import EAGER, FUSED, Peer
from peer_implementations import PACKAGES
from peer_results import SAME, Key, Results
from peer_settings import Settings, lacking
from ranks import Rank
from shards import Shard
from steps import Step, make_step
from tables import Row
from torch import Tensor
from workloads import Problem


@dataclass
class Untimed:
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


class Ready(NamedTuple):
    """A peer that is right: its step, its errors by tensor, and the fields of a row that tell its memory."""

    step: Step
    errors: dict[str, float]
    weight: dict[str, int | None]


def measure(rank: Rank, settings: Settings, results: Results) -> Untimed:
    """Measure what the results lack, and add each shape's rows to them at once."""
    untimed, budget = Untimed(), Budget(settings.budget_s)
    surroundings = environment.describe(rank) | {"command": settings.command, "quick": settings.quick}
    surroundings |= {"kernels": environment.kernels_digest(), "tuned": environment.tuned_digest()}
    todo = lacking(rank, settings, surroundings, results)
    for number, (shard, wanted) in enumerate(todo.items()):
        if budget.is_spent():
            untimed.left_out += map(str, wanted)
            continue
        try:
            with gate.matmul_precision(settings.place.dtype):
                rows = _measure_shard(rank, settings, shard, wanted, budget.share(len(todo) - number), untimed)
        except Exception as error:  # memory, as a rule: the next shape may fit
            traceback.print_exc()
            untimed.refuse(f"{shard.shape.name} failed: {type(error).__name__}: {error}", ours=True)
        else:
            versions = {"versions": environment.versions(PACKAGES)}
            results.add([row | surroundings | versions for row in rows])
    return untimed


def _measure_shard(
    rank: Rank, settings: Settings, shard: Shard, wanted: list[Key], share: Budget, untimed: Untimed
) -> list[Row]:
    """Return the rows of one shape; within its share of the budget, unless comparing, warming up and the fewest rounds
    take longer."""
    shape, activation = shard.shape, settings.place.activation
    rank.say(f"{shape.name}: computing the fp64 reference")
    problem = workloads.shard(workloads.draw(shape, settings.place.dtype, activation, rank.device), 0, 1, activation)
    most = "fwd_bwd" if "fwd_bwd" in settings.modes else "fwd"
    subject = Subject(rank, settings, shard, problem, workloads.expected(problem, most, activation))
    torch.compiler.reset()  # what is compiled is compiled for this shape alone
    rows: list[Row] = []
    ahead = len(wanted)
    for mode, of_mode in groupby(wanted, lambda key: key.mode):
        forwards = _built(subject, mode, untimed)
        for run, of_run in groupby(of_mode, lambda key: key.run):
            ready = _checked(subject, mode, run, forwards, untimed)
            for key in of_run:
                rows += _timed(subject, key, ready, share.share(ahead))
                ahead -= 1
            del ready  # a graph holds its results
    return rows


def _built(subject: Subject, mode: str, untimed: Untimed) -> dict[Peer, Forward]:
    """Return the forward of each peer that can be built."""
    settings, name = subject.settings, subject.shard.shape.name
    forwards = {}
    for peer in settings.timed_at(name, mode):
        try:
            forwards[peer] = peer.build(settings.place.activation)
        except Exception as failure:
            traceback.print_exc()
            untimed.refuse(f"{peer.name} ({name}, {mode}) failed: {type(failure).__name__}: {failure}", peer.ours)
    return forwards


def _checked(
    subject: Subject, mode: str, run: str, forwards: dict[Peer, Forward], untimed: Untimed
) -> dict[Peer, Ready]:
    """Return the peers that are right, ready to be timed."""
    place, name = subject.settings.place, subject.shard.shape.name
    bound = gate.error_bound(place.dtype, place.activation)
    ready = {}
    for peer, forward in forwards.items():
        subject.rank.say(f"{name} {mode} {run}: comparing {peer.name} with fp64")
        what = f"{peer.name} ({name}, {place.activation}, {place.dtype}, {mode}, {run})"
        weight: dict[str, int | None] = {}
        make = partial(_weighed, subject, peer, forward, mode, run, weight)
        found = gate.checked(what, make, subject.reference(peer), bound, subject.rank)
        if found.step is None:
            untimed.refuse(found.refused or what, peer.ours)
        else:
            ready[peer] = Ready(found.step, found.errors, weight)
    return ready


def _weighed(
    subject: Subject, peer: Peer, forward: Forward, mode: str, run: str, weight: dict[str, int | None]
) -> Step:
    """Return the step to time, and fill in what an eager one keeps and needs of memory.

    Eager first: outside of a capture nothing can wait for an event that was recorded in it.
    """
    launched = partial(launched_by, subject.settings.place.device_type, peer.launchers)
    eager = launched(partial(Step, forward, subject.problem, None, mode))
    eager.reset()  # of a peer that failed in its step there are gradients left
    eager()  # what is allocated once is no step's
    eager.reset()
    weight["saved_bytes"] = memory.saved_bytes(forward, subject.problem) if mode == "fwd_bwd" else None
    weight["peak_mem_bytes"] = memory.peak_bytes(eager, subject.rank)
    return launched(partial(make_step, forward, subject.problem, None, mode, run == "graph"))


def _timed(subject: Subject, key: Key, ready: dict[Peer, Ready], share: Budget) -> list[Row]:
    """Return a row a peer."""
    if not ready:
        return []
    rank, settings = subject.rank, subject.settings
    rank.say(f"{key}: timing {', '.join(peer.name for peer in ready)}")
    how: dict[str, Any] = {"graph": key.run == "graph", "warm_l2": key.l2 == "warm", "seconds": share.left()}
    named = {peer.name: step for peer, (step, _, _) in ready.items()}
    times, rounds = timing.time_rounds(named, rank, quick=settings.quick, rounds=settings.rounds, **how)
    floors = subject.shard.shape.pass_floors(key.mode, key.dtype, key.activation)
    flops, moved = (sum(figures) for figures in zip(*floors, strict=True))
    least = environment.floor_ms(key.device, key.dtype, floors)
    eager = next((errors for peer, (_, errors, _) in ready.items() if peer.name == EAGER), {})
    rows = []
    for peer, (_, errors, weight) in ready.items():
        spread = timing.spread(times[peer.name].ms, "ms")
        p50 = spread["ms_p50"]
        over_eager = [errors[name] / error for name, error in eager.items() if error and peer.reference is None]
        rows.append(
            {
                "impl": peer.name,
                "label": peer.label,
                "regime": subject.shard.regime,
                **{name: value for name, value in vars(key).items() if name not in SAME},
                "iters": rounds,
                **spread,
                **timing.ratios(times[peer.name], times.get(FUSED)),
                "flops": flops,
                "moved_bytes": moved,
                "tflops": flops / p50 / 1e9,
                "gb_per_s": moved / p50 / 1e6,
                "roofline_pct": None if least is None else 100 * least / p50,
                "errors": errors,
                "max_rel_err": max(errors.values()),
                "error_vs_eager": max(over_eager, default=None),
                **weight,
            }
        )
    return rows
