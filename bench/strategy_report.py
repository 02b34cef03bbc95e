"""Show strategy_bench.py's results as tables, and read them back from what it wrote."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import tables
from strategy_measure import TIMED

from tpffn_triton.machines import Machine
from tpffn_triton.predict import PASSES

Row = dict[str, Any]
# What table and plots ask of a row.
FIELDS = (
    *("strategy", "pass", "shape", "batch", "seq", "hidden", "ffn", "tp", "dtype", "activation", "rounds"),
    *("ms_p20", "ms_p50", "ms_p80", "compute_ms", "exposed_ms", "exposed_ms_least", "times_column_row"),
    *("predicted_ms", "ratio", "sent_bytes", "saved_bytes", "peak_bytes"),
    *("device", "device_type", "ranks", "cores", "threads", "backend", "collectives", "torch", "triton", "python"),
    *("cuda", "commit", "uncommitted_changes", "load_average"),
)


def shape_of(row: Row) -> str:
    """Say which shape."""
    return "{shape}: B={batch} S={seq} H={hidden} F={ffn}".format(**row)


def two_lines(strategy: str) -> tuple[str, str]:
    """Return a strategy's words, broken where they have a comma."""
    first, comma, second = TIMED[strategy].words.partition(", ")
    return first + comma.rstrip(), second


def where(row: Row) -> str:
    """Say over how many ranks, and what was computed."""
    group = f" ({row['collectives']})" if row["collectives"] else ""
    return f"P={row['tp']}{group}, {row['activation']}, {row['dtype']}"


def table(results: dict[str, Any]) -> str:
    """Return a block of lines for each shape and P, below what ran where and above the notes."""
    import tabulate

    tabulate.MIN_PADDING = 0
    rows = results["rows"]
    parts = [tables.surroundings(rows[0])] if rows else []
    for _, group in groupby(rows, key=lambda row: (row["shape"], row["tp"])):
        block = list(group)
        columns = {
            "strategy": lambda r: two_lines(r["strategy"])[PASSES.index(r["pass"])],
            "pass": lambda r: r["pass"],
            "ms p50 [p20–p80]": lambda r: "{} [{}–{}]".format(*(tables.ms(r[f"ms_p{p}"]) for p in (50, 20, 80))),
            "× col→row": lambda r: "" if r["times_column_row"] is None else f"{r['times_column_row']:.2f}",
            "compute": lambda r: tables.ms(r["compute_ms"]),
            "exposed (least)": lambda r: f"{tables.ms(r['exposed_ms'])} ({tables.ms(r['exposed_ms_least'])})",
            "predicted": lambda r: tables.ms(r["predicted_ms"]),
            "ratio": lambda r: f"{r['ratio']:.2f}",
            "MiB sent": lambda r: f"{r['sent_bytes'] / 2**20:.4g}",
        }
        lines = [[show(row) for show in columns.values()] for row in block]
        align = ("left", "left", *["right"] * (len(columns) - 2))
        body = tabulate.tabulate(lines, [*columns], tablefmt="simple", disable_numparse=True, colalign=align)
        parts.append(f"{shape_of(block[0])}, {where(block[0])}\n\n{body}")
    if rows:
        parts.append(_notes(results))
    parts += [f"NOT TIMED: {line}" for line in results["refused"]]
    return "\n\n".join(parts)


def _notes(results: dict[str, Any]) -> str:
    rows = sorted(results["rows"], key=lambda row: -row["ranks"])
    rounds = tables.rounds_of(rows, "rounds")
    notes = [
        f"Times in ms. {rounds} interleaved rounds, slowest rank of each; a backward follows its forward.",
        "× col→row: over column→row's time of the same pass, by round. ratio: predicted over measured.",
        "exposed: computation stood still for a collective, on the rank that waits longest (least).",
        "compute: p50 less exposed. MiB sent: by all ranks in this pass, as planned.",
        "sequence-parallel: x and y are each rank's slice of the tokens; this one alone is ffn()'s own pass.",
        f"Predicted for {results['machine']['name']}.",
    ]
    most = rows[0]
    if most["device_type"] == "cpu" and most["ranks"] * most["threads"] >= most["cores"]:
        notes.append(f"At P={most['tp']} ranks fill the cores: gloo's own threads take their time from computation.")
    return "\n".join(notes + tables.machine_notes(rows))


def load(path: Path) -> dict[str, Any]:
    """Return the results that --json wrote. Raises: ValueError: something else is in the file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or not all(isinstance(results.get(key), list) for key in ("rows", "refused")):
        raise ValueError(f"{path} was not written by strategy_bench.py --json: it has no rows")
    Machine.from_dict(results)
    for row in results["rows"]:
        if missing := [name for name in FIELDS if not isinstance(row, dict) or name not in row]:
            raise ValueError(f"{path} has a row without {missing[0]}")
        if row["strategy"] not in TIMED:
            raise ValueError(f"{path}: unknown strategy {row['strategy']!r}, one of {', '.join(TIMED)}")
    return results
