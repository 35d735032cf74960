"""Loops and instructions of a compiled kernel, read from its disassembly.

Loops are found as a compiler finds them: backward edges of the control flow graph to a block that
dominates their start. (A branch to a lower address is not enough: waits are moved to the end of a
kernel and jump back.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TENSOR_CORE = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
"""Instructions of the three generations, by their names in PTX: 8.x, 9.0, 10.x."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With modifiers, as LDG.E.128."""
    target: str | None = None
    """The label that it may jump to."""
    conditional: bool = False
    """Whether what follows it may run too."""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def ends_block(self) -> bool:
        return self.target is not None or self.name in ("EXIT", "RET", "BRX", "JMX")


@dataclass
class Block:
    """Straight-line code."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*);"
)
_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")


def parse_sass(text: str) -> list[Block]:
    """The control flow graph of a kernel, from `nvdisasm -c`; block 0 is where it starts."""
    blocks, labels = [Block()], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif match := _LINE.search(line):
            blocks[-1].instructions.append(_instruction(**match.groupdict()))
            if blocks[-1].instructions[-1].ends_block:
                blocks.append(Block())
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last and last.target in labels:
            block.successors.append(labels[last.target])
        falls = last is None or not last.ends_block or last.conditional
        if falls and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def _instruction(guard: str | None, opcode: str, rest: str) -> Instruction:
    # CALL to a label inside the kernel is a jump too; functions have names of their own.
    jumps = opcode.startswith(("BRA", "CALL"))
    jump = re.search(r"`\((\.L_[\w.]+)\)", rest) if jumps else None
    # BRA.U UP0, `(.L_x_1) has its condition among the operands.
    conditional = bool(guard) or bool(jump and rest[: jump.start()].strip())
    return Instruction(opcode, jump[1] if jump else None, conditional)


def find_loops(blocks: Sequence[Block]) -> list[frozenset[int]]:
    """Natural loops as sets of blocks, one for each backward edge: loops may share a header."""
    successors = [block.successors for block in blocks]
    predecessors: list[list[int]] = [[] for _ in blocks]
    running = sorted(_reached(successors, 0))
    for i in running:
        for following in successors[i]:
            predecessors[following].append(i)
    return [
        frozenset({header} | _reached(predecessors, i, avoiding=header))
        for i in running
        for header in set(successors[i])
        # It dominates the block that jumps back: no way leads there around it.
        if i not in _reached(successors, 0, avoiding=header)
    ]


def _reached(edges: Sequence[Sequence[int]], start: int, avoiding: int | None = None) -> set[int]:
    seen: set[int] = set()
    pending = [start]
    while pending:
        index = pending.pop()
        if index != avoiding and index not in seen:
            seen.add(index)
            pending += edges[index]
    return seen


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, counted for one thread that takes every branch once."""

    tensor_core: str | None
    """mma, wgmma or tcgen05 in the inner loop; None where it has none."""
    loads: tuple[str, ...]
    """Widths of the inner loop's loads from global memory in bits, or "TMA"."""
    inner: int
    """Instructions of the inner loop."""
    inner_special: int
    """Those of them that the special function units run: exp, log, reciprocal."""
    inner_spills: int
    """Those of them that move a register to local memory or back."""
    outer: int
    """Instructions around it: of the loop that contains it, or of the kernel if none does."""
    outer_special: int


def analyse(blocks: Sequence[Block]) -> Code:
    """Find the inner loop and describe it, without loops inside of it that write to global memory:
    what they do is rare.
    """
    loops = find_loops(blocks)

    def count(part: Iterable[int]) -> Counter[str]:
        return Counter(x.name for i in part for x in blocks[i].instructions)

    inner: frozenset[int] = frozenset()
    for work in (tuple(TENSOR_CORE), ("FFMA", "FFMA2"), ("MUFU",), ("LDG", "LDGSTS")):
        if working := [x for x in loops if any(count(x)[name] for name in work)]:
            innermost = [x for x in working if not any(y < x for y in working)]
            inner = max(innermost, key=lambda x: count(x).total())
            break
    around = min((x for x in loops if inner < x), key=len, default=frozenset(range(len(blocks))))
    rare = frozenset[int]().union(*(x for x in loops if x < inner and count(x)["STG"]))
    names, other = count(inner - rare), count(around - inner)
    found = [kind for name, kind in TENSOR_CORE.items() if names[name]]
    return Code(
        tensor_core=found[0] if found else None,
        loads=_load_widths(x for i in sorted(inner - rare) for x in blocks[i].instructions),
        inner=names.total(),
        inner_special=names["MUFU"],
        inner_spills=names["LDL"] + names["STL"],
        outer=other.total(),
        outer_special=other["MUFU"],
    )


def _load_widths(instructions: Iterable[Instruction]) -> tuple[str, ...]:
    widths = set()
    for instruction in instructions:
        modifiers = instruction.opcode.split(".")[1:]
        if instruction.name in ("UTMALDG", "UBLKCP"):
            widths.add("TMA")
        elif instruction.name in ("LDG", "LDGSTS"):
            # Without a width it is one register. ENL2.256 has two.
            sizes = [m.lstrip("US") for m in modifiers if re.fullmatch(r"[US]?\d+", m)]
            widths.add(sizes[-1] if sizes else "32")
    return tuple(sorted(widths, key=lambda w: (w == "TMA", w.zfill(3))))
