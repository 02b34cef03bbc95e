"""Show the rows of bench/peers.py: one table a shape, run and state of L2."""

from itertools import groupby
from typing import Any

import checkout  # noqa: F401
import tables
from peer import FUSED, TWO_GEMMS
from peer_implementations import PEERS
from peers_measure import Untimed
from tables import Row


def table(rows: list[Row], untimed: Untimed) -> str:
    """Return the tables, between what ran where and what there is to know of the figures."""
    parts = [tables.surroundings(rows[0])] if rows else []
    # A run and a state of L2 together, whatever the mode.
    ordered = sorted(rows, key=lambda row: [r["shape"] for r in rows].index(row["shape"]))
    for _, of_shape in groupby(ordered, lambda row: row["shape"]):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in of_shape:
            groups.setdefault((row["run"], row["l2"]), []).append(row)
        parts += [f"{_header(group[0])}\n\n{_body(group)}" for group in groups.values()]
    parts += ["\n".join(_notes(rows))] if rows else []
    parts += [f"NOT TIMED: {line}" for line in untimed.refused]
    parts += [f"LEFT OUT, the budget is spent: {line}" for line in untimed.left_out]
    return "\n\n".join(parts)


def _header(row: Row) -> str:
    sizes = f"M={row['tokens']} H={row['hidden']} F/P={row['ffn_per_rank']}"
    how = "" if row["device_type"] != "cuda" else f", {row['run']}, L2 {row['l2']}"
    return f"{row['shape']}: {sizes}, {row['activation']}, {row['dtype']}, with biases, WITHOUT COMMUNICATION{how}"


def _body(rows: list[Row]) -> str:
    import tabulate

    lines: list[Any] = []
    for number, row in enumerate(rows):
        if number and row["mode"] != rows[number - 1]["mode"]:
            lines.append(tabulate.SEPARATING_LINE)
        ratio = "" if row["ratio_p50"] is None else "{ratio_p50:.2f} [{ratio_p20:.2f}–{ratio_p80:.2f}]".format(**row)
        p50, p20, p80 = (tables.ms(row[f"ms_p{p}"]) for p in (50, 20, 80))
        against_eager = "" if row["error_vs_eager"] is None else f" ({row['error_vs_eager']:.2f})"
        lines.append(
            (
                row["impl"],
                row["mode"],
                f"{p50} [{p20}–{p80}]",
                "" if row["impl"] == FUSED else ratio,
                f"{row['tflops']:.3g}",
                f"{row['gb_per_s']:.3g}",
                "" if row["roofline_pct"] is None else f"{row['roofline_pct']:.0f} %",
                *(_mib(row[name]) for name in ("saved_bytes", "peak_mem_bytes")),
                f"{row['max_rel_err']:.1e}{against_eager}",
            )
        )
    names = ["peer", "mode", "ms p50 [p20–p80]", "÷ fused [p20–p80]", "TFLOP/s", "GB/s", "roofline"]
    names += ["saved MiB", "peak MiB", "rel err (÷ eager's)"]
    align = ["left", "left", *["right"] * (len(names) - 2)]
    return tabulate.tabulate(lines, names, tablefmt="simple", disable_numparse=True, colalign=align)


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.3g}"


def _notes(rows: list[Row]) -> list[str]:
    notes = [
        f"{min(row['iters'] for row in rows)} interleaved rounds or more.",
        "÷ fused: a peer's time over fused's, by round: above 1 fused is faster.",
        "saved: kept for backward beside x and the parameters.",
    ]
    names = {row["impl"] for row in rows}
    if TWO_GEMMS in names:
        notes.append(f"{TWO_GEMMS}: {PEERS[TWO_GEMMS].label}; its error is against that product.")
    if rows[0]["triton_interpret"]:
        return [*notes, "Our kernels ran in Triton's interpreter: THESE TIMES MEAN NOTHING."]
    return notes + tables.machine_notes(rows)
