"""Show rows as tables, and write them as JSON (a list of objects) or CSV (one line each, same fields)."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_WIDE = 1.25


def table(rows: list[Row], refused: list[str]) -> str:
    """Return one table a shape, below a header that says what ran where and above the notes it needs."""
    parts = []
    for _, group in groupby(rows, key=lambda row: row["shape"]):
        of_shape = list(group)
        parts.append(f"{_header(of_shape)}\n\n{_body(of_shape)}\n\n{_notes(of_shape)}")
    parts += [f"NOT TIMED: {line}" for line in refused]
    return "\n\n".join(parts)


def _header(rows: list[Row]) -> str:
    row = rows[0]
    dtypes = ", ".join(dict.fromkeys(r["dtype"] for r in rows))
    sizes = f"B={row['batch']} S={row['seq']} H={row['hidden']} F={row['ffn']}"
    slices = ", sequence-parallel" if row["sequence_parallel"] else ""
    shape = f"{row['shape']}: {sizes}, {row['activation']}, {dtypes}{slices}"
    if not row["communication_included"]:
        ranks = f"one rank's shard of P={row['tp']} (F/P={row['ffn'] // row['tp']}), WITHOUT COMMUNICATION"
    else:
        ranks = f"P={row['tp']}" + (f" ({row['collectives']})" if row["collectives"] else "")
    return f"{shape}, {ranks}\n{surroundings(row)}"


def surroundings(row: Row) -> str:
    """Say in two lines what ran where."""
    threads = f", {row['threads']} of {row['cores']} cores a rank" if row["device_type"] == "cpu" else ""
    interpreted = " (kernels run in Triton's interpreter)" if row["backend"] == "triton-interpreted" else ""
    cuda = f", CUDA {row['cuda']}" if row["cuda"] else ""
    return (
        f"{row['device']}{threads}; our kernels: {row['backend']}{interpreted}\n"
        f"torch {row['torch']}, triton {row['triton']}{cuda}, python {row['python']}, "
        f"{commit_of(row)}"
    )


def commit_of(row: Row) -> str:
    """Say which commit was measured."""
    changes = " + uncommitted changes" if row["commit"] and row["uncommitted_changes"] else ""
    return f"commit {row['commit'] or 'unknown'}{changes}"


def _body(rows: list[Row]) -> str:
    import tabulate

    tabulate.MIN_PADDING = 0  # columns as wide as their headers, no wider
    several_dtypes = len({row["dtype"] for row in rows}) > 1
    columns = {
        "impl": lambda r: r["impl"],
        "mode": lambda r: r["mode"],
        "dtype": lambda r: r["dtype"] if several_dtypes else "",
        "ms p50 [p20–p80]": lambda r: f"{ms(r['ms_p50'])} [{ms(r['ms_p20'])}–{ms(r['ms_p80'])}]",
        "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
        "roofline": lambda r: _or_empty(r["roofline_pct"], "{:.0f} %"),
        "× unfused": lambda r: _or_empty(r["speedup_vs_unfused"], "{:.2f}"),
        "× oneDNN": lambda r: _or_empty(r["speedup_vs_unfused_onednn"], "{:.2f}"),
        "× Megatron": lambda r: _or_empty(r["speedup_vs_megatron"], "{:.2f}"),
        "comm ms (least)": _comm,
        "compute ms": lambda r: "" if r["compute_ms"] is None else ms(r["compute_ms"]),
        "peak MiB": lambda r: _or_empty(r["peak_mem_bytes"], "{:.1f}", 2**20),
        "rel err (÷ unfused's)": lambda r: f"{r['max_rel_err']:.1e}" + _or_empty(r["error_vs_unfused"], " ({:.2f})"),
    }
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    shown = [name for name, column in cells.items() if any(column)]
    lines: list[Any] = []
    for number, row in enumerate(rows):
        if number and (row["dtype"], row["mode"]) != (rows[number - 1]["dtype"], rows[number - 1]["mode"]):
            lines.append(tabulate.SEPARATING_LINE)
        lines.append([cells[name][number] for name in shown])
    align = ["left" if name in ("impl", "mode", "dtype") else "right" for name in shown]
    return tabulate.tabulate(lines, shown, tablefmt="simple", disable_numparse=True, colalign=align)


def _comm(row: Row) -> str:
    if row["comm_ms"] is None:
        return ""
    return f"{ms(row['comm_ms'])} ({ms(row['comm_ms_least'])})" if row["ranks"] > 1 else ms(row["comm_ms"])


def ms(value: float) -> str:
    """Show a time in four significant digits, down to 0.1 µs."""
    digits = 1 if value >= 100 else 2 if value >= 10 else 3 if value >= 1 else 4
    return f"{value:.{digits if value else 0}f}"


def _or_empty(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _notes(rows: list[Row]) -> str:
    first = rows[0]
    rounds = rounds_of(rows, "iters")
    slowest = ", slowest rank of each" if first["ranks"] > 1 else ""
    notes = [
        f"{rounds} interleaved rounds{slowest}. TFLOP/s: one rank's. rel err: Frobenius against fp64, worst tensor."
    ]
    if first["comm_ms"] is not None and first["ranks"] > 1:
        notes.append("comm: computation stood still for a collective, on the rank that waits longest (least).")
        notes.append("compute: p50 less comm. What lies between longest and least is the wait for slower ranks.")
    if not first["communication_included"]:
        notes.append("There are fewer GPUs than P: the all-reduces of y and dx are NOT in these figures.")
    elif first["graph"] and first["ranks"] > 1:
        notes.append("Inside a graph, communication and computation are not told apart.")
    if first["device_type"] == "cuda":
        notes.append(
            "Graph replays: GPU time alone." if first["graph"] else "The host's launches are included; see --graph."
        )
    elif any(row["impl"] == "unfused-onednn" for row in rows):
        notes.append("Over the better baseline, fused gains by fusion and overlap; the rest is the GEMM library.")
    notes += _megatron_notes(rows)
    notes += machine_notes(rows)
    if any(row["peak_mem_bytes"] is None for row in rows):
        notes.append("peak MiB: this system does not tell.")
    return "\n".join(notes)


def rounds_of(rows: list[Row], field: str) -> str:
    """Say how many rounds there were, from the fewest to the most."""
    rounds = sorted({row[field] for row in rows})
    return f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"


def _megatron_notes(rows: list[Row]) -> list[str]:
    first = rows[0]
    if not any(row["impl"].startswith("megatron") for row in rows):
        return []
    notes = [f"megatron: the MLP of megatron-core {first['megatron_core']}; megatron-fused: FusedMLP in its place."]
    if first["sequence_parallel"]:
        notes.append("Megatron's buffer of gathered tokens, which it keeps from its first step on, is not in its peak.")
    if first["device_type"] == "cuda" and first["ranks"] > 1 and first["cuda_device_max_connections"] != "1":
        notes.append("Megatron-Core asks for CUDA_DEVICE_MAX_CONNECTIONS=1, to overlap; it is not set in this run.")
    return notes


def machine_notes(rows: list[Row]) -> list[str]:
    """Say what the machine that ran them leaves in doubt of times."""
    first, notes = rows[0], []
    if first["device_type"] != "cuda":
        notes.append("CPU figures compare implementations on this machine; they say nothing about a GPU.")
        if first["ranks"] > first["cores"]:
            notes.append(f"{first['ranks']} ranks share {first['cores']} cores: they wait for one another.")
    if any(row["ms_p80"] > _WIDE * row["ms_p20"] for row in rows):
        load = "" if first["load_average"] is None else f" (load average at the start: {first['load_average']:.1f})"
        notes.append(f"The times spread widely; was the machine busy{load}? Differences inside p20–p80 are noise.")
    return notes


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; a header that starts with ">" makes its column right-aligned."""
    lines = [
        [h.removeprefix(">") for h in headers],
        ["--:" if h.startswith(">") else "---" for h in headers],
        *([str(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(rows: list[Row], path: Path) -> None:
    """Write rows as a list of objects, one a row."""
    write_text(path, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def write_csv(rows: list[Row], path: Path) -> None:
    """Write a header line and one line a row; None is an empty field, and so is one that only other rows have."""
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Replace path at once, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def missing_extras(packages: Iterable[str]) -> str | None:
    """Return what to install where one of the packages of the `bench` extra is missing."""
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError:
            return f"{package} is needed for this: pip install 'tpffn-triton[bench]'"
    return None
