"""Make the tables of docs/analysis.md, as Markdown: from the plan, and from what the benchmarks wrote."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from tables import Row, markdown

from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import plan_ffn
from tpffn_triton.plan_comparison import STRATEGIES
from tpffn_triton.plan_records import FFNPlan
from tpffn_triton.predict import PASSES, predict
from tpffn_triton.presets import machine

ANALYSED = (8, 128, 1024, 4096, 4)
WORDS = {name: strategy.words for name, strategy in STRATEGIES.items()}
MIB = 1 << 20
SHOWN = (
    ("x", "x"),
    ("own_x", "what Linear1 reads of x"),
    ("w1", "w1"),
    ("b1", "b1"),
    ("partial_pre_act", "partial sums of pre_act"),
    ("pre_act", "pre_act"),
    ("hidden", "hidden"),
    ("full_hidden", "hidden, gathered"),
    ("w2", "w2"),
    ("b2", "b2"),
    ("partial_y", "partial sums of y"),
    ("own_y", "own features of y"),
    ("y", "y"),
)


@dataclass(frozen=True)
class Results:
    """Rows of traffic_bench.py and strategy_bench.py."""

    traffic: list[Row]
    strategy: list[Row]

    def sent(self, case: str, pass_: str | None, tp: int, elements: int | None = None) -> Row:
        """Return the row of one case; elements: of a collective. Raises: ValueError: no such row, or several."""
        found = [
            row
            for row in self.traffic
            if (row["case"], row["pass"], row["tp"]) == (case, pass_, tp)
            and elements in (None, *(c["elements"] for c in row["planned"]))
        ]
        return _only(found, "traffic", {"case": case, "pass": pass_, "tp": tp, "elements": elements})

    def timed(self, **which: Any) -> Row:
        """Return the row whose fields are `which`; `pass` is written pass_. Raises: ValueError: none, or several."""
        wanted = {name.rstrip("_"): value for name, value in which.items()}
        found = [row for row in self.strategy if all(row[name] == value for name, value in wanted.items())]
        return _only(found, "strategy", wanted)


def _only(found: list[Row], benchmark: str, which: Row) -> Row:
    if len(found) != 1:
        wanted = ", ".join(f"{name}={value}" for name, value in which.items() if value is not None)
        raise ValueError(f"{benchmark} results have {len(found)} rows with {wanted}, one is expected")
    return found[0]


def load(traffic: Path, strategy: Path) -> Results:
    """Read what the benchmarks wrote. Raises: OSError: a file is missing."""
    return Results(*(json.loads(path.read_text(encoding="utf-8"))["rows"] for path in (traffic, strategy)))


def plan(name: str, sizes: Sequence[int] = ANALYSED, **options: Any) -> FFNPlan:
    """Return the plan of one of STRATEGIES, by its name."""
    return plan_ffn(*sizes, **(STRATEGIES[name].options | options))


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _shapes(_: Results) -> str:
    plans = [{t.name: t.shape for t in plan(name).tensors} for name in PARTITIONINGS]
    rows = [
        (meaning, *(_by(tensors[name]) if name in tensors else "–" for tensors in plans)) for name, meaning in SHOWN
    ]
    return markdown(("on each rank", *(f">{WORDS[name]}" for name in PARTITIONINGS)), rows)


def _collectives(_: Results) -> str:
    rows = [
        (
            WORDS[name],
            c.pass_,
            f"{c.kind.replace('_', '-')} {c.tensor}",
            f"{c.elements:,}",
            f"{c.bytes / MIB:g}",
            c.rounds,
            f"{c.sent_per_rank:,}",
            f"{c.sent_total:,}",
            f"{c.sent_total_bytes / MIB:g}",
            f"{c.amplification:g}×",
        )
        for name in WORDS
        for c in plan(name).collectives
    ]
    headers = ("", "pass", "collective", ">elements", ">MiB", ">ring rounds", ">sent by a rank", ">by all", ">MiB")
    return markdown((*headers, ">amplified"), rows)


def _reasons(_: Results) -> str:
    parts = []
    for name in PARTITIONINGS:
        rows = [(r.pass_, r.at, "–" if r.kind is None else r.kind.replace("_", "-"), r.why) for r in plan(name).reasons]
        parts.append(f"**{WORDS[name]}**\n\n{markdown(('pass', 'at', 'collective', 'why'), rows)}")
    return "\n\n".join(parts)


def _costs(_: Results) -> str:
    plans = {name: plan(name) for name in WORDS}

    def of(key: str) -> list[str]:
        return [f"{p.totals[key] / MIB:.1f}" for p in plans.values()]

    rows = [
        (f"sent by all ranks, {pass_}", *(f"{sent(p, pass_) / MIB:.1f}" for p in plans.values())) for pass_ in PASSES
    ]
    rows += [("kept for backward, on each rank", *of("saved_bytes"))]
    rows += [(f"peak on a rank, {pass_}", *of(f"peak_bytes_{pass_}")) for pass_ in PASSES]
    rows += [(f"least memory traffic of a rank, {pass_}", *of(f"hbm_bytes_{pass_}")) for pass_ in PASSES]
    return markdown(("MiB", *(f">{words}" for words in WORDS.values())), rows)


def sent(p: FFNPlan, pass_: str) -> int:
    """Return the bytes that all ranks send in a pass."""
    return sum(c.sent_total_bytes for c in p.collectives if c.pass_ == pass_)


def _sent_over_column_row(activation: str, passes: Sequence[str]) -> str:
    rows = []
    for ratio in (4, 1, Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 16)):
        sizes = (8, 128, 1536, int(1536 * ratio), 4)
        plans = [plan(name, sizes, activation=activation) for name in PARTITIONINGS]
        unit = sent(plans[0], "forward")
        rows.append((ratio, *(f"{sum(sent(p, pass_) for pass_ in passes) / unit:.3g}" for p in plans)))
    return markdown((f"F/H, {activation}", *(f">{WORDS[name]}" for name in PARTITIONINGS)), rows)


def _ratios(_: Results) -> str:
    return _sent_over_column_row("gelu", PASSES)


def _ratios_gated(_: Results) -> str:
    return _sent_over_column_row("swiglu", PASSES)


def _ratios_forward(_: Results) -> str:
    return _sent_over_column_row("gelu", PASSES[:1])


def _claims(results: Results) -> str:
    p, tp, n = plan("column_row"), 4, 8 * 128 * 1024
    shape = {t.name: _by(t.shape) for t in p.tensors}
    side_by_side = next((*t.shape[:-1], tp * t.shape[-1]) for t in p.tensors if t.name == "pre_act")
    whole = sum(t.shape == side_by_side for t in p.tensors)
    y, dx = p.collectives
    reduced = results.sent("all_reduce", None, tp, n)["tcp_bytes"]
    ring = results.sent("textbook ring", None, tp)
    (ring_elements,) = {*ring["ring_elements_per_rank"]}

    def wire(pass_: str, tensor: str) -> str:
        more = results.sent("column_row", pass_, tp)["tcp_bytes"] - reduced
        return f"the pass sends {tensor}'s all-reduce and {more:,.0f} bytes more"

    def all_reduce(c: Any) -> str:
        return f"all-reduce of {c.elements:,}: {c.rounds} rounds, {c.sent_per_rank:,} a rank, {c.sent_total:,} in all"

    ring_text = (
        f"textbook ring: {ring['ring_rounds']} rounds, {ring_elements:,} a rank, "
        f"{sum(ring['ring_elements_per_rank']):,} in all; {ring['tcp_bytes'] / MIB:.2f} MiB by TCP. "
    )
    gloo = f"gloo's all-reduce: {reduced / MIB:.2f} MiB"
    rows = [
        (
            "1.1",
            "Linear1's shard",
            f"w1 {shape['w1']}, x {shape['x']}, pre_act {shape['pre_act']}; four of these side by side, "
            f"{_by(side_by_side)}: {whole} such tensors",
            "–",
        ),
        ("1.2", "Linear2's shard", f"w2 {shape['w2']}, hidden {shape['hidden']}, its term of y {shape['y']}", "–"),
        ("2.1.1", "Linear1 forward: nothing", "no collective", wire("forward", y.tensor)),
        ("2.1.2", "Linear1 backward: all-reduce of dx", all_reduce(dx), ring_text + gloo),
        ("2.2.1", "Linear2 forward: all-reduce of y", all_reduce(y), "the same"),
        ("2.2.2", "Linear2 backward: nothing", "no collective", wire("backward", dx.tensor)),
    ]
    for number, name, claim in (
        ("3.1", "row_row", "an all-gather between the layers"),
        ("3.2", "column_column", "all-to-all or scatter, backward too"),
    ):
        rows.append((number, f"{WORDS[name]}: {claim}", _exchanged(plan(name)), _by_tcp(results, name, tp)))
    return markdown(("§", "claim", "planned, and counted on four ranks", "on the wire"), rows)


def _exchanged(p: FFNPlan) -> str:
    """Name every pass's collectives with their elements."""
    by_pass = {
        pass_: [f"{c.kind.replace('_', '-')} {c.tensor} {c.elements:,}" for c in p.collectives if c.pass_ == pass_]
        for pass_ in PASSES
    }
    return "; ".join(f"{pass_}: {', '.join(collectives)}" for pass_, collectives in by_pass.items())


def _by_tcp(results: Results, name: str, tp: int) -> str:
    return " + ".join(f"{results.sent(name, pass_, tp)['tcp_bytes'] / MIB:.2f}" for pass_ in PASSES) + " MiB by TCP"


def _wire(results: Results) -> str:
    def cell(row: Row) -> tuple[str, ...]:
        packets = 100 * ((row["wire_bytes"] - row["retransmitted_bytes"]) / row["tcp_bytes"] - 1)
        figures = f"{row['planned_bytes'] / MIB:.2f}", f"{row['tcp_bytes'] / MIB:.2f}", f"{row['ratio']:.4f}"
        return (*figures, f"{row['wire_bytes'] / MIB:.2f}", f"{packets:.2f} %")

    rows = []
    for row in results.traffic:
        if row["planned"]:
            what = row["case"].replace("_", "-") if row["kind"] != "layer" else WORDS[row["case"]]
            detail = row["pass"] or f"of {row['planned'][0]['elements']:,}"
            rows.append((f"{what} {detail}", row["tp"], *cell(row)))
    return markdown(("one call", ">P", ">planned MiB", ">TCP MiB", ">ratio", ">wire MiB", ">packets"), rows)


def _times(results: Results) -> str:
    rows = []
    for name in WORDS:
        for pass_ in PASSES:
            r = results.timed(strategy=name, shape="analysed", tp=4, pass_=pass_)
            rows.append(
                (
                    WORDS[name],
                    pass_,
                    f"{r['ms_p50']:.1f} [{r['ms_p20']:.1f}–{r['ms_p80']:.1f}]",
                    f"{r['times_column_row']:.2f}",
                    f"{r['compute_ms']:.1f}",
                    f"{r['exposed_ms']:.1f} ({r['exposed_ms_least']:.1f})",
                    f"{r['predicted_ms']:.1f}",
                    f"{r['ratio']:.2f}",
                )
            )
    headers = ("", "pass", ">ms p50 [p20–p80]", ">× column→row, by round", ">compute", ">exposed (least)")
    return markdown((*headers, ">predicted", ">ratio"), rows)


def _relative(results: Results) -> str:
    """Forward + backward, the sum of both medians, against column→row's; every shape and P."""
    rows = []
    for shape, tp in dict.fromkeys((row["shape"], row["tp"]) for row in results.strategy if row["tp"] > 1):
        first = results.timed(strategy="column_row", shape=shape, tp=tp, pass_="forward")
        ms = {
            name: sum(results.timed(strategy=name, shape=shape, tp=tp, pass_=pass_)["ms_p50"] for pass_ in PASSES)
            for name in WORDS
        }
        sizes = "B={batch} S={seq} H={hidden} F={ffn}".format(**first)
        relative = (f"{ms[name] / ms['column_row']:.2f}" for name in [*WORDS][1:])
        rows.append((f"{shape}: {sizes}", tp, f"{ms['column_row']:.1f}", *relative))
    others = (f">{WORDS[name]}, times that" for name in [*WORDS][1:])
    return markdown(("forward + backward", ">P", ">column→row's ms", *others), rows)


def _gpu(_: Results) -> str:
    where, rows = machine("nvlink4", None, None), []
    for label, sizes in (("B=8 S=128 H=1024 F=4096 P=4", ANALYSED), ("B=2 S=2048 H=4096 F=16384 P=8", None)):
        for name in WORDS:
            prediction = predict(plan(name, sizes or (2, 2048, 4096, 16384, 8), dtype="bf16"), where)
            cells = [f"{us(pass_):.0f}" for pass_ in PASSES for us in (prediction.pass_us, prediction.exposed_us)]
            rows.append((label, WORDS[name], *cells))
    headers = ("bf16, predicted, µs", "", ">forward", ">of it exposed", ">backward", ">of it exposed")
    return markdown(headers, rows)


def _surroundings(results: Results) -> str:
    r = results.timed(strategy="column_row", shape="analysed", tp=4, pass_="forward")
    t = results.sent("textbook ring", None, 4)
    return (
        f"{r['cores']} cores of an {r['device']}, threads of a rank: {r['threads']}; over {r['collectives']}, "
        f"{r['activation']}, {r['dtype']}; torch {r['torch']}; commit {r['commit']} (times), {t['commit']} (bytes)."
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "shapes": _shapes,
    "collectives": _collectives,
    "reasons": _reasons,
    "costs": _costs,
    "ratios": _ratios,
    "ratios_gated": _ratios_gated,
    "ratios_forward": _ratios_forward,
    "claims": _claims,
    "wire": _wire,
    "surroundings": _surroundings,
    "times": _times,
    "relative": _relative,
    "gpu": _gpu,
}
