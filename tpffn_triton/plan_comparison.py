"""Lay the plans of several partitionings of one layer side by side, and say why each communicates where it does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_records import FFNPlan
from tpffn_triton.plan_report import align, human_bytes, human_flops, split_of, summary
from tpffn_triton.predict import PASSES, Prediction

ON_SLICES = "column_row_sequence_parallel"
WIDTH = 110


@dataclass(frozen=True)
class Strategy:
    """A partitioning, and whether x and y are slices of the tokens; words are for people."""

    words: str
    partitioning: str = "column_row"
    sequence_parallel: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its options of plan_ffn."""
        return {"partitioning": self.partitioning, "sequence_parallel": self.sequence_parallel}


STRATEGIES = {
    "column_row": Strategy("column→row"),
    ON_SLICES: Strategy("column→row, sequence-parallel", sequence_parallel=True),
    "row_row": Strategy("row→row", "row_row"),
    "column_column": Strategy("column→column", "column_column"),
    "row_column": Strategy("row→column", "row_column"),
}


def plan_partitionings(given: str, sizes: tuple[int, int, int, int, int], **options: Any) -> dict[str, FFNPlan]:
    """Plan each partitioning of "name,name" or "all", by name; sizes and options: plan_ffn's. With sequence_parallel
    column_row comes twice, without and with it.

    Raises: TypeError, ValueError: an unknown name, sequence_parallel without column_row, or as plan_ffn.
    """
    names = (*PARTITIONINGS,) if given == "all" else tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    on_slices = options.pop("sequence_parallel", False)
    if on_slices and "column_row" not in names:
        raise ValueError(f"sequence parallelism is column_row's: it cannot go with {', '.join(names)} alone")
    found = {name: plan_ffn(*sizes, partitioning=name, **options) for name in names}
    if on_slices:
        found[ON_SLICES] = plan_ffn(*sizes, **(STRATEGIES[ON_SLICES].options | options))
    return found


def render_text(compared: Mapping[str, FFNPlan], predictions: Mapping[str, Prediction]) -> str:
    """Return tables of shapes, collectives and totals, a column or a block a partitioning; plain ASCII."""
    first, *_ = compared.values()
    shapes = {name: {t.name: "x".join(map(str, t.shape)) for t in plan.tensors} for name, plan in compared.items()}
    headers = [f">{name}" for name in compared]
    columns = ("partitioning", "pass", "collective", "of", ">elements", ">bytes", ">rounds", ">sent per rank")
    lines = [
        *(f"{name}: {split_of(plan)}" for name, plan in compared.items()),
        *summary(first),
        *("", "Tensors of one rank, of the same shape on every rank (weights in nn.Linear layout)"),
        *align(
            ("tensor", *headers),
            [(t, *(shapes[name].get(t, "-") for name in compared)) for t in _merged(shapes.values())],
        ),
        "",
        "Collectives, as rings: elements sent by a rank (the most), by all ranks, and that over the elements",
        *align((*columns, ">sent in all", ">amplified"), [*_collective_rows(compared)]),
        *("", "Totals of one rank; sent: by all ranks"),
        *align(("", *headers), [*_total_rows(compared), *_predicted_rows(compared, predictions)]),
    ]
    return "\n".join(lines)


def explain(plan: FFNPlan, name: str = "") -> str:
    """Return, for every place where a collective could be, which one is there and why, or why none."""
    lines = [": ".join(filter(None, (name, split_of(plan))))]
    if plan.tp == 1:
        return f"{lines[0]}\n  One rank holds every weight: nothing is exchanged."
    for reason in plan.reasons:
        kind = "no collective" if reason.kind is None else reason.kind.replace("_", "-")
        text = f"{reason.pass_} {reason.at}: {kind}; {reason.why}."
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _merged(lists: Iterable[Iterable[str]]) -> list[str]:
    """Return the names of all lists, which agree on the order of what they share."""
    order: list[str] = []
    for names in lists:
        at = 0
        for name in names:
            if name not in order:
                order.insert(at, name)
            at = order.index(name) + 1
    return order


def _collective_rows(compared: Mapping[str, FFNPlan]) -> Iterator[tuple[object, ...]]:
    for name, plan in compared.items():
        for number, c in enumerate(plan.collectives):
            what = (c.pass_, c.kind.replace("_", "-"), c.tensor, c.elements, c.bytes)
            yield ("" if number else name, *what, c.rounds, c.sent_per_rank, c.sent_total, f"{c.amplification:g}x")


def _total_rows(compared: Mapping[str, FFNPlan]) -> Iterator[tuple[str, ...]]:
    totals = [plan.totals for plan in compared.values()]
    for pass_ in PASSES:
        yield f"FLOPs {pass_}", *(human_flops(t[f"flops_{pass_}"]) for t in totals)
    for pass_ in PASSES:
        yield f"HBM traffic {pass_}", *(human_bytes(t[f"hbm_bytes_{pass_}"]) for t in totals)
    for name, key in (("parameters", "parameter_bytes"), ("activations kept for backward", "saved_bytes")):
        yield name, *(human_bytes(t[key]) for t in totals)
    for pass_ in PASSES:
        yield f"peak memory {pass_}", *(human_bytes(t[f"peak_bytes_{pass_}"]) for t in totals)
    for pass_ in PASSES:
        sent = [sum(c.sent_total_bytes for c in plan.collectives if c.pass_ == pass_) for plan in compared.values()]
        yield f"sent {pass_}", *map(human_bytes, sent)
    yield "sent in both", *(human_bytes(t["sent_bytes_all_ranks"]) for t in totals)


def _predicted_rows(
    compared: Mapping[str, FFNPlan], predictions: Mapping[str, Prediction]
) -> Iterator[tuple[str, ...]]:
    for pass_ in PASSES if predictions else ():
        yield f"predicted {pass_}, us", *(f"{predictions[name].pass_us(pass_):.1f}" for name in compared)
        yield "  of it exposed, us", *(f"{predictions[name].exposed_us(pass_):.1f}" for name in compared)
