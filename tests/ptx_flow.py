"""Read a kernel's PTX into basic blocks, loops, and which parameters a register comes from.

Covers what LLVM and Triton emit: labels inside of the braces of inline assembly, predicated instructions, indirect
branches over a `.branchtargets` table. Functions are not followed.

Source: PTX ISA, "Syntax" and "Control flow instructions"; natural loops as in Aho, Sethi and Ullman, Compilers, 10.4.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+[\w$]+\s*\((?P<parameters>[^()]*)\)(?P<directives>[^{]*)\{")
TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$%]+)\s*:(?!:)|(?P<location>\.(?:loc|file)\b[^\n]*)|(?P<statement>[^;]*);)"
)
STATEMENT = re.compile(r"(?:@(?P<guard>!?[\w$%]+)\s+)?(?P<op>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)
NAME = re.compile(r"[%$\w]+")


@dataclass(eq=False)
class Instruction:
    """One instruction, equal to itself alone. `guard` is its predicate, empty when every thread executes it."""

    line: int
    guard: str
    op: str
    operands: str

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The parts of the opcode: ("ld", "global", "gpu", "acquire", "b32")."""
        return tuple(self.op.split("."))

    def __str__(self) -> str:
        return f"{self.op} (line {self.line})"


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may run next."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    """The only kernel of a PTX text; blocks[0] runs first.

    parameters   names in order; threads   of a program (.reqntid or .maxntid), 0 where the PTX does not say
    """

    parameters: tuple[str, ...]
    threads: int
    blocks: list[Block]

    @cached_property
    def loops(self) -> list[set[int]]:
        """The natural loops, as numbers of blocks: of every edge back to a block under visit, that block and all that
        reaches the edge without passing it."""
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for number, block in enumerate(self.blocks):
            for successor in block.successors:
                predecessors[successor].append(number)
        loops: dict[int, set[int]] = {}
        path, ahead, seen = [0], [iter(self.blocks[0].successors)], {0}
        while path:
            successor = next(ahead[-1], None)
            if successor is None:
                path.pop()
                ahead.pop()
            elif successor in path:
                body = loops.setdefault(successor, {successor})
                pending = [path[-1]]
                while pending:
                    number = pending.pop()
                    if number not in body:
                        body.add(number)
                        pending += predecessors[number]
            elif successor not in seen:
                seen.add(successor)
                path.append(successor)
                ahead.append(iter(self.blocks[successor].successors))
        return list(loops.values())

    @cached_property
    def _sources(self) -> dict[str, set[str]]:
        """register → names in the instructions that write it."""
        sources: dict[str, set[str]] = {}
        for block in self.blocks:
            for instruction in block.instructions:
                first = re.match(r"\{[^}]*\}|[^,\[]*", instruction.operands)[0]
                names = set(NAME.findall(instruction.operands[len(first) :]))
                for register in NAME.findall(first):
                    sources.setdefault(register, set()).update(names)
        return sources

    def parameters_of(self, name: str) -> set[str]:
        """Return every parameter that a register's value may be computed from, through whichever instructions."""
        seen, pending = set(), [name]
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += self._sources.get(name, ())
        return seen.intersection(self.parameters)


def read(ptx: str) -> Kernel:
    """Return the kernel of a PTX text.

    Raises: ValueError: there is not exactly one kernel, or a branch to a label that does not exist.
    """
    text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), ptx)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise ValueError(f"expected one .entry, got {len(entries)}")
    (entry,) = entries
    parameters = tuple(re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", entry["parameters"].strip()))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry["directives"])
    count = 1
    for size in threads.groups() if threads else ("0",):
        count *= int(size or 1)
    return Kernel(parameters, count, _blocks(text, entry.end()))


def _blocks(text: str, start: int) -> list[Block]:
    blocks, targets, tables = [Block()], {}, {}
    scopes: list[int] = []  # the braces that are open, by position
    branches: list[tuple[int, tuple[int, ...], str]] = []
    line, position, label = text.count("\n", 0, start) + 1, start, ""
    while token := TOKEN.match(text, position):
        begin = token.start(token.lastgroup)
        line += text.count("\n", position, begin)
        if token["brace"] == "{":
            scopes.append(begin)
        elif token["brace"]:
            if not scopes:
                break
            scopes.pop()
        elif token["label"]:
            label = token["label"]
            blocks.append(Block())
            blocks[-2].successors += [len(blocks) - 1] * _falls_through(blocks[-2])
            targets[tuple(scopes), label] = len(blocks) - 1
        elif token["statement"] and token["statement"].startswith(".branchtargets"):
            tables[label] = NAME.findall(token["statement"])[1:]
        elif token["statement"] and (parts := STATEMENT.match(token["statement"])):
            instruction = Instruction(line, parts["guard"] or "", parts["op"], parts["operands"].strip())
            blocks[-1].instructions.append(instruction)
            if instruction.modifiers[0] in ("bra", "brx", "ret", "exit", "trap"):
                if instruction.modifiers[0].startswith("br"):
                    branches.append((len(blocks) - 1, tuple(scopes), NAME.findall(instruction.operands)[-1]))
                blocks.append(Block())
                blocks[-2].successors += [len(blocks) - 1] * _falls_through(blocks[-2])
        line += text.count("\n", begin, token.end())
        position = token.end()
    for number, scope, name in branches:
        for target in tables.get(name, (name,)):
            # The innermost scope around the branch that has the label.
            around = (scope[:depth] for depth in range(len(scope), -1, -1))
            found = next((targets[outer, target] for outer in around if (outer, target) in targets), None)
            if found is None:
                raise ValueError(f"line {blocks[number].instructions[-1].line}: no label {target}")
            blocks[number].successors.append(found)
    return blocks


def _falls_through(block: Block) -> bool:
    last = block.instructions[-1] if block.instructions else None
    return last is None or bool(last.guard) or last.modifiers[0] not in ("bra", "brx", "ret", "exit", "trap")
