"""Let one rank of a real group die, stall, raise or differ, in every way of fault_cases.py; show what each rank saw.

    python tests/faults.py                            # all, under a minute
    python tests/faults.py --only 'killed|stopped'    # those whose name matches a regular expression
    python tests/faults.py --list
    python tests/faults.py --json found.json --markdown docs/faults.md

Each fault has processes of its own, over gloo; rank 0 hosts the store. Ranks that have raised stay until all have, so
that nobody learns of an error by the end of a process. Verdicts:

    error         every rank that should notice raised a clear error
    right         nobody raised, and results are right
    NaN           nobody raised, and every rank's result shows the NaN
    WRONG         a rank was given a wrong result, as fault_cases.py says: the fault is found too late
    UNEXPECTED    a rank saw something else than fault_cases.py says
    ABORTED       a process ended by itself
    HUNG          a rank was still waiting long after the group's timeout

Exit status: 1 when a verdict is one of the last three.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from fault_actions import Context
from fault_cases import FAULTS, Fault
from rank_pool import use

import tpffn_triton as tp

GROUP_SECONDS, LIMIT_SECONDS = 5, 45
STATUS_LOST = 255  # what multiprocessing says where its fork server could not tell
FAILURES = ("UNEXPECTED", "ABORTED", "HUNG")
HEADER = """\
# What happens when a rank fails

One rank of a real group of processes fails, in every way that the tests know. The group runs over gloo, with a timeout
of {seconds} s where that decides; over NCCL torch's watchdog ends a failed collective, which has not been tried. Rank 0
hosts the store. Ranks that have raised stay alive, so that nothing but the fault is seen. y and dx are compared with
the unsharded reference. Written by

    PYTHONPATH=. .venv/bin/python tests/faults.py --markdown docs/faults.md

{summary}.
The verdicts are explained by `--help`, and the faults are in `tests/fault_actions.py` and
`tests/fault_cases.py`.

Where the verdict is WRONG: a call that follows the one before as it did last time is not compared, so of calls that are
all alike one can be missing, with its backward. `tp.comparing_every_call()` finds it.

| fault | ranks | the failing rank saw | the others saw | after s | verdict |
|---|---|---|---|---|---|
"""


class Outcome(NamedTuple):
    """What the ranks of one fault saw, after how many seconds, and how their processes ended; None: nothing, it was
    gone."""

    saw: list[str | None]
    seconds: list[float | None]
    status: list[int | None]
    verdict: str


def _serve(rank: int, name: str, pipe: Connection) -> None:
    """Be one rank: meet the others, run the fault, report, and stay until told to leave."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    use("native")
    fault = next(f for f in FAULTS if f.name == name)
    long = datetime.timedelta(seconds=LIMIT_SECONDS)
    port = 0 if rank == 0 else pipe.recv()
    store = dist.TCPStore("127.0.0.1", port, fault.world_size, rank == 0, long, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=fault.world_size, timeout=long)
    # Only faults that are waited for need a short timeout; a loaded machine must not see another.
    seconds = GROUP_SECONDS if "CollectiveError" in fault.others else LIMIT_SECONDS
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    context = Context(rank, fault.world_size, rank == fault.victim, group, GROUP_SECONDS)
    error = []
    try:
        with tp.comparing_every_call() if fault.every_call else nullcontext():
            fault.run(context)
    except Exception as raised:
        error = [f"{type(raised).__name__}: {raised}"]
    pipe.send(("; ".join([*filter(None, [", ".join(context.seen)]), *error]) or "no error", context.since))
    pipe.recv()
    os._exit(0)


def _context() -> multiprocessing.context.ForkServerContext:
    """Return a context whose processes start at once: they are forked from one that has imported torch. It does not
    know this folder."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # every lost connection is a page of stack in the log
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tpffn_triton", "torch.multiprocessing", "torch.testing"])
    return context


def run(fault: Fault) -> Outcome:
    """Run one fault in processes of its own; never waits longer than LIMIT_SECONDS."""
    ranks = range(fault.world_size)
    pipes, processes = [], []
    for rank in ranks:
        ours, theirs = _context().Pipe()
        processes.append(_context().Process(target=_serve, args=(rank, fault.name, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    port = pipes[0].recv()
    for pipe in pipes[1:]:
        pipe.send(port)
    saw: list[str | None] = [None for _ in ranks]
    seconds: list[float | None] = [None for _ in ranks]
    awaited = {pipes[rank]: rank for rank in ranks if rank != fault.victim or fault.own}
    deadline = time.monotonic() + LIMIT_SECONDS
    while awaited and (ready := wait(list(awaited), deadline - time.monotonic())):
        for pipe in ready:
            rank = awaited.pop(pipe)
            try:
                saw[rank], since = pipe.recv()
                seconds[rank] = time.monotonic() - since
            except EOFError:
                continue
    for pipe in pipes:
        try:
            pipe.send(None)
        except OSError:
            continue
    for rank, process in enumerate(processes):
        process.join(0 if fault.own == "" and rank == fault.victim else 10)
        if process.is_alive():
            process.kill()
            process.join()
    status = [process.exitcode for process in processes]
    return Outcome(saw, seconds, status, _verdict(fault, saw, status, bool(awaited)))


def _verdict(fault: Fault, saw: list[str | None], status: list[int | None], hung: bool) -> str:
    if hung:
        return "HUNG"
    for rank, text in enumerate(saw):
        pattern = fault.own if rank == fault.victim else fault.others
        if pattern == "":
            continue
        if text is None or status[rank] not in (0, STATUS_LOST):
            return "ABORTED"
        if not re.search(pattern, text, re.DOTALL) or ("WRONG" in text and "WRONG" not in pattern):
            return "UNEXPECTED"
    everything = " ".join(filter(None, saw))
    return next((word for word in ("WRONG", "Error", "NaN") if word in everything), "right").replace("Error", "error")


def examine(faults: Iterable[Fault], jobs: int) -> dict[Fault, Outcome]:
    """Run faults, `jobs` at a time: they mostly sleep. Prints a line on stderr for each that has ended."""
    faults = list(faults)
    outcomes = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, fault): fault for fault in faults}
        for number, future in enumerate(as_completed(futures), 1):
            fault = futures[future]
            outcomes[fault] = future.result()
            print(f"fault {number}/{len(faults)}  {outcomes[fault].verdict}  {fault.name}", file=sys.stderr)
    return {fault: outcomes[fault] for fault in faults}


def _short(text: str) -> str:
    """Return what identifies an error in a table's cell: its first line and what other ranks reported."""
    text = re.sub(r"\[\S*/gloo/\S*\] ?| \[[\d.:a-f]+\]:\d+|\. This is typically [^\n]*", "", text)
    first, *rest = text.splitlines() or [""]
    lines = [first, *(line for line in rest if re.match(r"  (rank|nothing)", line))]
    cell = " / ".join(line.strip()[:200] for line in lines)
    return cell.replace("|", "\\|")


def _cells(fault: Fault, outcome: Outcome) -> list[str]:
    own, others = "gone" if fault.own == "" else _short(outcome.saw[fault.victim] or ""), {}
    for rank, text in enumerate(outcome.saw):
        if rank != fault.victim:
            others.setdefault(_short(text or "").replace(f"on rank {rank} of", "on rank … of"), rank)
    times = [s for rank, s in enumerate(outcome.seconds) if rank != fault.victim and s is not None]
    after = f"{max(times):.1f}" if times else ""
    return [fault.name, str(fault.world_size), own, " // ".join(others), after, outcome.verdict]


def markdown(outcomes: dict[Fault, Outcome]) -> str:
    """Return docs/faults.md."""
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("error", "right", "NaN", "WRONG", *FAILURES))
    summary = f"{len(verdicts)} faults: {counts}"
    rows = ["| " + " | ".join(_cells(*item)) + " |" for item in outcomes.items()]
    return HEADER.format(seconds=GROUP_SECONDS, summary=summary) + "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the selected faults, print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression; default: all")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--jobs", metavar="N", type=int, default=16, help="faults at a time; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcomes there as well")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write a table of them there")
    args = parser.parse_args(arguments)
    if args.only and args.markdown:
        parser.error("--markdown is for all faults, not for those of --only")
    faults = [f for f in FAULTS if re.search(args.only, f.name, re.IGNORECASE)]
    if not faults:
        parser.error(f"no fault matches {args.only!r}; --list shows them")
    if args.list:
        print("\n".join(f.name for f in faults))
        return 0
    outcomes = examine(faults, args.jobs)
    for fault, outcome in outcomes.items():
        name, _, own, others, after, verdict = _cells(fault, outcome)
        print(f"{verdict:<10} {after:>5} s  {name}\n    itself: {own}\n    others: {others}")
        if verdict in ("HUNG", "ABORTED"):
            print(f"    statuses: {[s if s is None or s >= 0 else signal.Signals(-s).name for s in outcome.status]}")
    if args.json:
        rows = [
            {"fault": f.name, "ranks": f.world_size, "failing": f.victim} | o._asdict() for f, o in outcomes.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(outcomes))
    return int(any(outcome.verdict in FAILURES for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
