"""Lint how a kernel's programs publish global memory to each other, on the PTX that the compiler emitted.

    report = lint(compiled.asm["ptx"])
    assert not report.findings and (report.releases, report.acquires) == (1, 1)

    python tests/ptx_lint.py kernel.ptx

One program writes a tile and bumps a flag (release); another polls the flag (acquire) and reads the tile. Which memory
is published the PTX does not say, so every global store before a release and every global read after an acquire counts.
A finding names the rule:

    publish     no barrier of the whole program between a store and the release, which orders one thread's stores only
    acquire     no such barrier between an acquire, by one thread, and a read, by any
    proxy       TMA reads past the generic proxy: no fence.proxy.async between an acquire and a TMA load; nor, in a
                kernel with such a load, between a store and a release
    tma store   released while a TMA store to a descriptor that the kernel also loads from may be under way:
                wait_group.read waits until shared memory is free, not until the tile is written
    scope       a release or acquire of .cta or .cluster scope
    spinning    an acquire inside of the innermost loop around an MMA
    dependent   in a kernel with griddepcontrol.wait: global memory touched on a path that has not come past it
    call        functions are not followed

Each rule holds on every path: facts ("this store is not behind a barrier yet") flow forward over the basic blocks, are
joined where paths meet, and are dropped by what settles them, to a fixed point. A predicated instruction may set a
fact, never settle one. What is counted as settling:

    a barrier     bar.sync, bar.red, barrier.sync and barrier.red of all threads; barrier.cluster.wait right after its
                  arrive, unless that is relaxed
    a release     .release and .acq_rel on atom, red, st; and any relaxed one of these behind a fence.acq_rel or
                  fence.sc of .gpu or .sys scope, where the barrier has to come before the fence
    an acquire    .acquire and .acq_rel on ld, atom

Not seen: an acquire made of a relaxed read and a fence (`acquires` is then 0); a tile that is stored through a
descriptor and read through a pointer; data added by atomics. Descriptors built on the device lie in one scratch
parameter and count as one. The innermost loop around an MMA is an outer one where the K loop is unrolled altogether.

Source: PTX ISA, "Memory consistency model": morally strong synchronisation, causality order, proxy-preserved base
causality order; cp.async.bulk.wait_group; fence.proxy.async.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from ptx_flow import COMMENT, NAME, Instruction, Kernel, read

MMA = re.compile(r"mma\.|wgmma\.mma_async|wmma\.mma|tcgen05\.mma")
# TMA by tensor or by address: whichever of the two state spaces is named first is written.
TMA_LOAD = re.compile(r"cp\.async\.bulk(?!\.prefetch).*\.shared::\w+\.global")
TMA_STORE = re.compile(r"cp\.(?:reduce\.)?async\.bulk.*\.global\.shared::cta")
CP_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\S*\.global")
ON_CHIP = re.compile(r"\.(?:shared|local|param|const)")
SYNCHRONISING = {"acquire", "release", "acq_rel", "relaxed", "volatile", "mmio"}
TOUCHING = {"read", "store", "tma load", "tma store", "release", "acquire", "relaxed atomic", "relaxed write"}
FLOAT = re.compile(r"\.(?:bf16|f16|f32|f64)")


@dataclass(frozen=True)
class Report:
    """What a kernel does to global memory, in instructions, and what is wrong with it.

    findings      "rule: what conflicts with what, by line and opcode"
    releases, acquires, relaxed   relaxed: atom and red alone
    float_atomics                 atom and red on floating point, whatever their semantics
    stores, reads                 plain ones, cp.async among the reads
    launch_waits                  griddepcontrol.wait
    tma_stores, tma_loads         by the parameter of the descriptor, "a|b" where either is possible
    """

    findings: list[str]
    releases: int
    acquires: int
    relaxed: int
    float_atomics: int
    stores: int
    reads: int
    launch_waits: int
    tma_stores: dict[str, int]
    tma_loads: dict[str, int]


def lint(ptx: str) -> Report:
    """Return the report of the only kernel in a PTX text.

    Raises: ValueError: there is not exactly one kernel, or a branch to a label that does not exist.
    """
    flow = _Flow(read(ptx))
    flow.run()
    findings = flow.findings()
    if re.search(r"\.func\b[^;{]*\{", COMMENT.sub("", ptx)):
        findings.append("call: the text defines functions, which are not followed")
    kinds = Counter(kind for kinds in flow.kinds.values() for kind in kinds)
    tma: dict[str, Counter[str]] = {"tma store": Counter(), "tma load": Counter()}
    for instruction, of in flow.kinds.items():
        for kind in of.intersection(tma):
            tma[kind]["|".join(sorted(flow.descriptor(instruction)))] += 1
    return Report(
        findings,
        releases=kinds["release"] + len(flow.releases_by_fence),
        acquires=kinds["acquire"],
        relaxed=kinds["relaxed atomic"],
        float_atomics=kinds["float atomic"],
        stores=kinds["store"],
        reads=kinds["read"],
        launch_waits=kinds["launch wait"],
        tma_stores=dict(tma["tma store"]),
        tma_loads=dict(tma["tma load"]),
    )


def _kinds(instruction: Instruction, previous: Instruction | None, threads: int) -> frozenset[str]:
    """Return what an instruction is to the rules; nothing for most."""
    op, parts = instruction.op, set(instruction.modifiers)
    base, kinds = instruction.modifiers[0], set()
    if base in ("ld", "st", "atom", "red") and not ON_CHIP.search(op):
        atomic = base in ("atom", "red")
        if not atomic and not parts & SYNCHRONISING:
            return frozenset({"store" if base == "st" else "read"})
        kinds |= {kind for kind in ("release", "acquire") if parts & {kind, "acq_rel"}}
        if atomic:
            kinds |= {"float atomic"} if FLOAT.search(op) else set()
            kinds |= {"relaxed atomic"} if not parts & {"release", "acquire", "acq_rel"} else set()
        if base != "ld" and "release" not in kinds:
            kinds.add("relaxed write")
    elif base in ("bar", "barrier") and not parts & {"warp", "cluster"} and parts & {"sync", "red"}:
        # bar.red has a predicate behind the number of threads, and its result before the barrier.
        operands = instruction.operands.split(",")
        of = operands[1].strip() if "sync" in parts and len(operands) > 1 else str(threads)
        kinds |= {"barrier"} if of.isdigit() and int(of) >= threads else set()
    elif op == "griddepcontrol.wait":
        kinds.add("launch wait")
    elif op.startswith("barrier.cluster.wait"):
        arrived = re.match(r"barrier\.cluster\.arrive(?!.*\.relaxed)", previous.op if previous else "")
        kinds |= {"barrier"} if arrived else set()
    elif op in ("fence.proxy.async", "fence.proxy.async.global"):
        kinds.add("proxy fence")
    elif (base == "fence" and "proxy" not in parts and parts & {"gpu", "sys"}) or op in ("membar.gl", "membar.sys"):
        kinds.add("fence")
    elif op == "cp.async.bulk.wait_group" and instruction.operands == "0":
        kinds.add("tma wait")
    elif TMA_LOAD.match(op):
        kinds.add("tma load")
    elif TMA_STORE.match(op):
        kinds.add("tma store")
    elif CP_ASYNC.match(op):
        kinds.add("read")
    elif MMA.match(op):
        kinds.add("mma")
    return frozenset(kinds)


# A fact, ("not behind a barrier", its store), holds wherever some path leads to it from the store without a barrier.
_Facts = frozenset[tuple[str, Instruction]]


class _Flow:
    """The fixed point of the facts over a kernel, and the conflicts met on the way."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.kinds: dict[Instruction, frozenset[str]] = {}
        for block in kernel.blocks:
            previous = None
            for instruction in block.instructions:
                if kinds := _kinds(instruction, previous, kernel.threads):
                    self.kinds[instruction] = kinds
                previous = instruction
        self.loaded = {p for i, kinds in self.kinds.items() if "tma load" in kinds for p in self.descriptor(i)}
        self.tma_after_acquire = False
        self.releases_by_fence: set[Instruction] = set()
        # (rule and what is missing, the synchronising instruction) → what it conflicts with
        self.conflicts: dict[tuple[str, Instruction], set[Instruction]] = defaultdict(set)

    def descriptor(self, instruction: Instruction) -> set[str]:
        """Return the parameters that a TMA instruction's global address may come from; {"?"} where that is unknown."""
        brackets = re.findall(r"\[([^\]]*)\]", instruction.operands)
        (address, *_) = NAME.findall(brackets["tma load" in self.kinds[instruction]])
        return self.kernel.parameters_of(address) or {"?"}

    def _loaded_from(self, stored: set[str]) -> bool:
        return bool(self.loaded) and bool(stored & self.loaded or "?" in stored | self.loaded)

    def run(self) -> None:
        """Iterate to the fixed point. Facts only grow, so what conflicts once conflicts for good."""
        blocks = self.kernel.blocks
        relevant = [[i for i in block.instructions if i in self.kinds] for block in blocks]
        waits = (i for i, kinds in self.kinds.items() if "launch wait" in kinds)
        entering: dict[int, _Facts] = {0: frozenset(("not waited for", wait) for wait in waits)}
        pending = [0]
        while pending:
            number = pending.pop()
            facts = entering[number]
            for instruction in relevant[number]:
                facts = self._step(facts, instruction)
            for successor in blocks[number].successors:
                joined = entering.get(successor, frozenset()) | facts
                if successor not in entering or joined != entering[successor]:
                    entering[successor] = joined
                    pending.append(successor)

    def _step(self, facts: _Facts, instruction: Instruction) -> _Facts:
        """Return the facts behind an instruction, given those before it; note its conflicts."""
        kinds, settles = self.kinds[instruction], not instruction.guard
        held = defaultdict(set)
        for fact, where in facts:
            held[fact].add(where)

        def settle(*names: str) -> None:
            for name in names if settles else ():
                held.pop(name, None)

        if kinds & {"read", "tma load"}:
            self._conflict("acquire: {0} with no barrier before {1}", held["acquired"], instruction, reads=True)
        if "tma load" in kinds:
            self.tma_after_acquire |= bool(held["after an acquire"])
            missing = "proxy: {0} with no fence.proxy.async before {1}"
            self._conflict(missing, held["acquired, other proxy"], instruction, reads=True)
        if kinds & TOUCHING:
            self._conflict("dependent: {0} on no path before {1}", held["not waited for"], instruction, reads=True)
        by_fence = "relaxed write" in kinds and held["fence"]
        if "release" in kinds or by_fence:
            self.releases_by_fence |= {instruction} if "release" not in kinds else set()
            unordered = held["stored"] if "release" in kinds else held["stored, then a fence"]
            self._conflict("publish: {0} with no barrier since {1}", unordered, instruction)
            self._conflict("proxy: {0} with no fence.proxy.async since {1}", held["stored, other proxy"], instruction)
            self._conflict("tma store: {0} while it may not have been written by {1}", held["tma store"], instruction)

        if "launch wait" in kinds:
            settle("not waited for")
        elif "barrier" in kinds:
            settle("stored", "acquired")
        elif "proxy fence" in kinds:
            settle("stored, other proxy", "acquired, other proxy")
        elif "fence" in kinds:
            settle("stored, then a fence")
            held["fence"].add(instruction)
            held["stored, then a fence"] |= held["stored"]
        elif "tma wait" in kinds:
            held["stored"] |= held["tma store"]  # now as visible as a plain store, and to the generic proxy
            settle("tma store")
        elif "store" in kinds:
            held["stored"].add(instruction)
            held["stored, other proxy"].add(instruction)
        elif "tma store" in kinds and self._loaded_from(self.descriptor(instruction)):
            held["tma store"].add(instruction)
        if "acquire" in kinds:
            for name in ("acquired", "acquired, other proxy", "after an acquire"):
                held[name].add(instruction)
        return frozenset((name, where) for name, places in held.items() for where in places)

    def _conflict(self, text: str, places: set[Instruction], instruction: Instruction, reads: bool = False) -> None:
        """Note conflicts under the acquire or the release: `reads` says that the places are acquires."""
        for place in places:
            synchronising, other = (place, instruction) if reads else (instruction, place)
            self.conflicts[text, synchronising].add(other)

    def findings(self) -> list[str]:
        """Return one line for each rule and synchronising instruction, in the order of the text."""
        found = []
        for (text, synchronising), others in self.conflicts.items():
            if text.endswith("no fence.proxy.async since {1}") and not self.tma_after_acquire:
                continue
            nearest = min(others, key=lambda other: abs(other.line - synchronising.line))
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            found.append((synchronising.line, text.format(synchronising, f"{nearest}{more}")))
        for instruction, kinds in self.kinds.items():
            if kinds & {"release", "acquire"} and set(instruction.modifiers) & {"cta", "cluster"}:
                found.append((instruction.line, f"scope: {instruction} is for its own program or cluster alone"))
        found += [
            (acquire.line, f"spinning: {acquire} in the loop of {mma}") for acquire, mma in self._spinning().items()
        ]
        return [text for _, text in sorted(found)]

    def _spinning(self) -> dict[Instruction, Instruction]:
        """Return acquires in the innermost loop of an MMA, with that MMA."""
        spinning: dict[Instruction, Instruction] = {}
        for number, block in enumerate(self.kernel.blocks):
            mma = next((i for i in block.instructions if "mma" in self.kinds.get(i, ())), None)
            loop = min((loop for loop in self.kernel.loops if number in loop), key=len, default=())
            if mma:
                inside = (i for member in loop for i in self.kernel.blocks[member].instructions)
                spinning |= {i: mma for i in inside if "acquire" in self.kinds.get(i, ())}
        return spinning


if __name__ == "__main__":
    print(lint(Path(sys.argv[1]).read_text()))
