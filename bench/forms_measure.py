"""Time one rank's shard in every form of its launches, and unfused, on the same tensors, interleaved.

One row a number of tokens, mode and way. A way that is wrong, against fp64, or raises is refused: not timed, no row.

    form          of forward (kernels/forward.py), or "unfused": F.linear, activation, F.linear
    gradients     "one launch" or "a launch each" (kernels/weight_grads.py); None in mode fwd, and unfused
    chosen        whether tpffn_triton.ffn launches this; None unfused
    configs       launch → its row of the tables
    ratio_p50, ratio_p20, ratio_p80   unfused's time over this one's, by round: above 1 is faster
    ms_p20, ms_p50, ms_p80, tflops, roofline_pct, max_rel_err   as in measure.py

ffn computes in every form, host included: its launchers alone are exchanged.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import environment
import gate
import timing
import torch
import workloads
from exchanged_launchers import LaunchedBy
from implementations import IMPLEMENTATIONS
from ranks import Rank
from steps import Step, make_step
from torch import Tensor
from workloads import Problem, Shape

from tpffn_triton.explanation import Shard
from tpffn_triton.kernels._configs import Config, arch_of
from tpffn_triton.kernels.column_sum import column_sum
from tpffn_triton.kernels.forward import DEPENDENT, DEPENDENT_LAUNCHES, FEW, FORMS, SINGLE, ffn_forward
from tpffn_triton.kernels.matmul import wgrad
from tpffn_triton.kernels.weight_grads import weight_grads

UNFUSED = "unfused"
ONE, EACH = "one launch", "a launch each"


@dataclass(frozen=True)
class Settings:
    """What to measure: shapes of one rank's shard, P=1; rounds None: as many as fit."""

    shapes: tuple[Shape, ...]
    dtype: str
    activation: str
    modes: tuple[str, ...]
    rounds: int | None
    graph: bool
    warm_l2: bool
    quick: bool
    command: str


@dataclass(frozen=True)
class Way:
    """One way to compute a step; see the module docstring."""

    form: str
    gradients: str | None = None

    def __str__(self) -> str:
        return self.form if self.gradients is None else f"{self.form}, gradients {self.gradients}"


def ways(mode: str, arch: str, chosen: str = SINGLE) -> list[Way]:
    """Return what to compare on an architecture, unfused first; chosen: the tables' form, for there is one for few
    tokens alone."""
    forms = [form for form in FORMS if form != DEPENDENT or arch in DEPENDENT_LAUNCHES]
    forms = [form for form in forms if form != FEW or chosen == FEW]
    gradients = (None,) if mode == "fwd" else (ONE, EACH)
    return [Way(UNFUSED), *itertools.starmap(Way, itertools.product(forms, gradients))]


def shard_of(shape: Shape, dtype: str, activation: str, device: torch.device) -> Shard:
    """Return the shard that tells what a device launches, and its rows of the tables."""
    sizes = shape.tokens, shape.tokens, shape.hidden, shape.ffn
    return Shard(*sizes, activation, workloads.DTYPES[dtype], True, arch_of(device), device)


def configs(shard: Shard, way: Way) -> dict[str, Config]:
    """Return launch → its row of the tables."""
    if way.form == UNFUSED:
        return {}
    launches, _ = shard.forward(form=way.form)
    if way.gradients is not None:
        launches += shard.backward(at_once=way.gradients == ONE)[0]
    names = (f"wgrad {row.computes}" if row.kernel == "wgrad" else row.kernel for row in launches)
    return {name: row.config for name, row in zip(names, launches, strict=True) if row.config is not None}


def _a_launch_each(
    d_pre: Tensor, x: Tensor, dy: Tensor, act: Tensor, db_partial: Tensor, db2_src: Tensor, *dtypes: torch.dtype
) -> tuple[Tensor, ...]:
    """Do what weight_grads does, which see."""
    weights = wgrad(d_pre, x, dtypes[0]), wgrad(dy, act, dtypes[1])
    return *weights, column_sum(db_partial, dtypes[2]), column_sum(db2_src, dtypes[3])


def launchers(way: Way, rows: dict[str, Config]) -> dict[str, Callable]:
    """Return the launchers of a way, by the names that passes.py calls."""
    found: dict[str, Callable] = {"ffn_forward": partial(ffn_forward, form=way.form)}
    if way.gradients == ONE:
        found["weight_grads"] = partial(weight_grads, config=rows["weight_grads"])
    elif way.gradients == EACH:
        found["weight_grads"] = _a_launch_each
    return found


def measure(rank: Rank, settings: Settings) -> dict[str, list]:
    """Return {"rows": [...], "refused": [why something has no row, ...]}."""
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    surroundings = environment.describe(rank) | {"command": settings.command}
    for shape in settings.shapes:
        rank.say(f"{shape.tokens} tokens: computing the fp64 reference")
        full = workloads.draw(shape, settings.dtype, settings.activation, rank.device)
        problem = workloads.shard(full, 0, 1, settings.activation)
        reference = workloads.expected(
            problem, "fwd_bwd" if "fwd_bwd" in settings.modes else "fwd", settings.activation
        )
        for mode in settings.modes:
            steps, errors, wrong = _checked(rank, settings, shape, mode, problem, reference)
            refused += wrong
            if steps:
                rows += [row | surroundings for row in _timed(rank, settings, shape, mode, steps, errors)]
    return {"rows": rows, "refused": refused}


def _checked(
    rank: Rank, settings: Settings, shape: Shape, mode: str, problem: Problem, reference: dict[str, Tensor]
) -> tuple[dict[Way, Step], dict[Way, float], list[str]]:
    """Return the steps of what is right, their errors, and why the others are not among them."""
    shard = shard_of(shape, settings.dtype, settings.activation, rank.device)
    bound = gate.error_bound(settings.dtype, settings.activation)
    steps: dict[Way, Step] = {}
    errors: dict[Way, float] = {}
    refused = []
    for way in ways(mode, arch_of(rank.device), shard.choice.form):
        name = UNFUSED if way.form == UNFUSED else "fused"
        forward = IMPLEMENTATIONS[name].build(settings.activation, False)
        unlaunched = partial(make_step, forward, problem, None, mode, settings.graph)
        exchanged = {} if way.form == UNFUSED else launchers(way, configs(shard, way))
        what = f"{way} ({shape.tokens} tokens, {settings.dtype}, {mode})"
        make = partial(LaunchedBy, rank.device.type, exchanged, unlaunched)
        found = gate.checked(what, make, reference, bound, rank)
        if found.step is None:
            refused.append(found.refused or "")
        else:
            steps[way], errors[way] = found.step, max(found.errors.values())
    return steps, errors, refused


def _timed(
    rank: Rank, settings: Settings, shape: Shape, mode: str, steps: dict[Way, Step], errors: dict[Way, float]
) -> list[dict[str, Any]]:
    rank.say(f"{shape.tokens} tokens, {mode}: timing {len(steps)} ways")
    times, rounds = timing.time_rounds(
        steps, rank, graph=settings.graph, quick=settings.quick, rounds=settings.rounds, warm_l2=settings.warm_l2
    )
    shard = shard_of(shape, settings.dtype, settings.activation, rank.device)
    choice, gradients = shard.choice, shard.gradients
    chosen = Way(choice.form, None if mode == "fwd" else EACH if gradients.config is None else ONE)
    why = choice.why if mode == "fwd" else f"{choice.why}; {gradients.why}"
    passes = shape.pass_floors(mode, settings.dtype, settings.activation)
    floor = environment.floor_ms(environment.device_name(rank.device), settings.dtype, passes)
    unfused = times.get(Way(UNFUSED))
    rows = []
    for way, t in times.items():
        spread = timing.spread(t.ms, "ms")
        p50 = spread["ms_p50"]
        rows.append(
            {
                "form": way.form,
                "gradients": way.gradients,
                "mode": mode,
                "chosen": None if way.form == UNFUSED else way == chosen,
                "why_chosen": why,
                "tokens": shape.tokens,
                "hidden": shape.hidden,
                "ffn_per_rank": shape.ffn,
                "activation": settings.activation,
                "dtype": settings.dtype,
                "graph": settings.graph,
                "warm_l2": settings.warm_l2,
                "iters": rounds,
                **spread,
                **timing.ratios(unfused, t),
                "tflops": shape.flops(mode, settings.activation) / p50 / 1e9,
                "roofline_pct": None if floor is None else 100 * floor / p50,
                "max_rel_err": errors[way],
                "configs": {name: asdict(config) for name, config in configs(shard, way).items()},
            }
        )
    return rows
