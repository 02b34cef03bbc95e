"""Predict one layer over several P: a table, a plot, and the best P. What is predicted: predict.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpffn_triton.cost_model import LIBRARY_ALGORITHMS
from tpffn_triton.machines import Machine
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_report import align
from tpffn_triton.predict import LIBRARY_NOTE, PASSES, Prediction, named, predict

_COLOURS = {"forward": ("#4477aa", "#ee6677"), "backward": ("#88bbdd", "#ffbbaa")}


@dataclass(frozen=True)
class Row:
    """One P: its prediction, or why there is none. `speedup` is against P=1, `efficiency` that over P."""

    tp: int
    prediction: Prediction | None
    refused: str
    speedup: float
    efficiency: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; the fields of a refused P are null."""
        if self.prediction is None:
            return {"tp": self.tp, "refused": self.refused, "speedup": None, "efficiency": None, "predicted": None}
        ratios = {"speedup": self.speedup, "efficiency": self.efficiency}
        return {"tp": self.tp, "refused": None, **ratios, "predicted": self.prediction.to_dict()}


def parse_sweep(text: str) -> tuple[int, ...]:
    """Return the values of "tp=1,2,4". Raises: ValueError: another form, or a value below 1."""
    name, _, values = text.partition("=")
    try:
        found = tuple(dict.fromkeys(int(value) for value in values.split(",")))
    except ValueError:
        found = ()
    if name.strip() != "tp" or not found or min(found) < 1:
        raise ValueError(f"--sweep takes tp=P,P,... with every P at least 1, got {text!r}")
    return found


def sweep(
    sizes: tuple[int, int, int, int],
    world_sizes: tuple[int, ...],
    machine: Machine,
    *,
    nodes: int = 1,
    chunks: int | None = 1,
    algorithms: tuple[str, ...] | None = LIBRARY_ALGORITHMS,
    **options: Any,
) -> list[Row]:
    """Predict (B, S, H, F) for every P; a P that does not fit becomes a row that says why.

    chunks    row chunks of Linear2; None: as forward_chunks chooses for each P
    options   of plan_ffn

    Raises: TypeError, ValueError: what is wrong at every P.
    """

    def predicted(tp: int) -> Prediction:
        return predict(plan_ffn(*sizes, tp, **options), machine, nodes=nodes, chunks=chunks, algorithms=algorithms)

    alone = predicted(1).total_us
    rows = []
    for tp in world_sizes:
        try:
            prediction = predicted(tp)
        except ValueError as error:
            rows.append(Row(tp, None, str(error), 0.0, 0.0))
        else:
            speedup = alone / prediction.total_us
            rows.append(Row(tp, prediction, "", speedup, speedup / tp))
    return rows


def best(rows: list[Row]) -> Row | None:
    """Return the row with the least time for forward and backward; None where every P is refused."""
    fitting = [row for row in rows if row.prediction is not None]
    return max(fitting, key=lambda row: (row.speedup, -row.tp), default=None)


def to_dict(rows: list[Row], machine: Machine, inputs: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready form of a sweep: its inputs, the machine with all constants, the rows, the best P."""
    winner = best(rows)
    return {
        "inputs": inputs,
        **machine.to_dict(),
        "rows": [row.to_dict() for row in rows],
        "best_tp": None if winner is None else winner.tp,
    }


def render_text(rows: list[Row], machine: Machine, title: str) -> str:
    """Lay the sweep out as one table; the best P is marked."""
    winner, lines = best(rows), []
    for row in rows:
        mark = "<- best" if row is winner else ""
        if row.prediction is None:
            lines.append((row.tp, *["-"] * 9, "refused, see below"))
            continue
        p = row.prediction
        used = ", ".join(dict.fromkeys(named(c, p.nodes) for c in p.collectives))
        if p.forward_chunks > 1:
            used += f"; {p.forward_chunks} chunks"
        per_pass = [
            f"{us:.1f}"
            for pass_ in PASSES
            for us in (p.kernels_us(pass_) + p.slowed_us(pass_), p.exposed_us(pass_), p.pass_us(pass_))
        ]
        hidden = sum(p.communication_us(pass_) - p.exposed_us(pass_) for pass_ in PASSES)
        ratios = (f"{row.speedup:.2f}x", f"{100 * row.efficiency:.0f}%")
        lines.append((row.tp, *per_pass, f"{hidden:.1f}", *ratios, " ".join(filter(None, (used, mark)))))
    headers = (">P", ">fwd kernels", ">exposed", ">fwd us", ">bwd kernels", ">exposed", ">bwd us", ">hidden")
    table = align((*headers, ">speed-up", ">efficiency", "collectives by"), lines)
    notes = [
        "Times in us, predicted by a model, not measured. exposed: communication that nothing hides; hidden: the rest.",
        f"Speed-up of forward + backward against P=1. {machine.ranks_per_node} ranks a node.",
    ]
    notes = [f"P={row.tp} refused: {row.refused}" for row in rows if row.prediction is None] + notes
    used_any = {c.algorithm for row in rows if row.prediction for c in row.prediction.collectives}
    if used_any - {*LIBRARY_ALGORITHMS}:
        notes.append(LIBRARY_NOTE)
    return "\n".join((title, f"on {machine.name}", "", *table, "", *notes))


def plot(rows: list[Row], machine: Machine, title: str, path: Path) -> None:
    """Draw the time of each P, by what it goes to, beside the speed-up; path's suffix chooses the format.

    Raises: ValueError: no P fits. ModuleNotFoundError: no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fitting = [(row, row.prediction) for row in rows if row.prediction is not None]
    if not fitting:
        raise ValueError(f"nothing to plot: {rows[0].refused}")
    winner, places = best(rows), range(len(fitting))
    names = [str(row.tp) for row, _ in fitting]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    bottom = [0.0] * len(fitting)
    for pass_ in PASSES:
        for colour, label, part in zip(
            _COLOURS[pass_],
            ("kernels", "exposed communication"),
            (
                [p.kernels_us(pass_) + p.slowed_us(pass_) for _, p in fitting],
                [p.exposed_us(pass_) for _, p in fitting],
            ),
            strict=True,
        ):
            left.bar(places, part, 0.62, bottom=bottom, color=colour, label=f"{pass_}, {label}")
            bottom = [low + high for low, high in zip(bottom, part, strict=True)]
    for place, (row, _), top in zip(places, fitting, bottom, strict=True):
        weight = "bold" if row is winner else "normal"
        text = f"{top:.4g} µs" + ("\nbest" if row is winner else "")
        left.annotate(
            text, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9, fontweight=weight
        )
    left.set(xticks=places, xticklabels=names, xlabel="ranks P", ylabel="predicted µs, forward + backward")
    left.set_ylim(0, 1.2 * max(bottom))
    left.legend(frameon=False, fontsize=8)
    tp = [row.tp for row, _ in fitting]
    right.plot(tp, tp, color="#bbbbbb", linestyle="--", label="ideal")
    right.plot(tp, [row.speedup for row, _ in fitting], color="#4477aa", marker="o", label="predicted")
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set(xticks=tp, xticklabels=names, xlabel="ranks P", ylabel="speed-up against P=1")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\n{machine.name}: a prediction, not a measurement", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
