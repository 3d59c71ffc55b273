"""SASS of a cubin, and its loops.

A loop is a natural loop of the control flow: ptxas moves waits and rare branches behind the kernel's last EXIT and
jumps back from there, which in the order of addresses looks like loops that do not exist.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WHEEL = "nvidia-cuda-nvdisasm"


@dataclass(frozen=True)
class Instruction:
    """text: without predicate. conditional: has one, or is a branch with one. target: label jumped to, or ""."""

    address: int
    text: str
    conditional: bool = False
    target: str = ""

    @property
    def opcode(self) -> str:
        """HGMMA of HGMMA.64x256x16.F32.BF16."""
        return re.split(r"[. ;]", self.text, maxsplit=1)[0]

    @property
    def ends_flow(self) -> bool:
        """Never goes on to the next instruction."""
        return not self.conditional and self.opcode in ("BRA", "EXIT", "RET", "BRX")


@dataclass(frozen=True)
class Loop:
    """One loop, inner loops included. depth: loops around it. out_of_line: instructions behind the loop's own range."""

    start: int
    end: int
    depth: int
    instructions: int
    out_of_line: int
    opcodes: Counter[str]


def find_nvdisasm() -> str:
    """Path of nvdisasm: the wheel of the extra `test`, else the one on PATH. RuntimeError if there is none."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((str(file.locate()) for file in files if file.name == "nvdisasm"), None) or shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("nvdisasm is not installed here; pip install 'cutehop[test]', or put a CUDA toolkit on PATH")
    return found


def disassemble(cubin: bytes, encodings: bool = False) -> str:
    """SASS as nvdisasm prints it, labels and addresses included. RuntimeError with its words if it fails.

    encodings: the 128 bits of each instruction too, half of them behind it and half on a line of their own.
    """
    with tempfile.TemporaryDirectory(prefix="cutehop-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        options = ["-c", "-hex"] if encodings else ["-c"]
        done = subprocess.run([find_nvdisasm(), *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order of address, and label -> index of the instruction behind it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([^;]*)", line):
            text = found[3].strip()
            branch = re.match(r"BRA(\S*) (.*)`\((\.L_\w+)\)", text)
            conditional = bool(found[2]) or bool(branch and (branch[1] or branch[2]))
            code.append(Instruction(int(found[1], 16), text, conditional, branch[3] if branch else ""))
    return code, labels


def scoreboards(sass: str) -> str:
    """`disassemble(cubin, encodings=True)` with what orders the instructions instead of the encodings, for each:

        address, scoreboards 0 to 5 it waits for, one it sets until its result is there, one until its operands
        are read, the instruction

    The fields are those that Jia et al. found, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking"
    (2018), section 2.1.
    """
    lines, instruction = [], None
    for line in sass.splitlines():
        if re.match(r"\.L_\w+:", line):
            lines.append(line)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/", line):
            instruction = found
        elif instruction and (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            control = int(found[1], 16) >> (105 - 64)
            result, operands, awaited = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            waits = "".join(str(i) for i in range(6) if awaited >> i & 1)
            sets = " ".join("-" if board == 7 else str(board) for board in (result, operands))
            lines.append(f"{instruction[1]}  {waits or '-':<6}  {sets}  {instruction[2]}")
            instruction = None
    return "\n".join(lines)


def find_loops(code: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """All loops in order of address, an outer one before those inside it."""
    starts, successors = _blocks(code, labels)
    dominators = _dominators(successors)
    predecessors = _predecessors(dominators, successors)
    bodies: dict[int, set[int]] = {}
    latches: dict[int, int] = {}
    for block in dominators:
        for header in successors[block]:
            if header in dominators[block]:  # a jump back to a place that every way here has passed
                body = bodies.setdefault(header, {header})
                latches[header] = max(latches.get(header, block), block)
                pending = [block]
                while pending:
                    if (inside := pending.pop()) not in body:
                        body.add(inside)
                        pending += predecessors[inside]
    ends = dict(zip(starts, [*starts[1:], len(code)]))

    def loop(header: int) -> Loop:
        inside = [i for block in sorted(bodies[header]) for i in range(block, ends[block])]
        last = ends[latches[header]] - 1
        return Loop(
            start=code[header].address,
            end=code[last].address,
            depth=sum(header in body for other, body in bodies.items() if other != header),
            instructions=len(inside),
            out_of_line=sum(i > last for i in inside),
            opcodes=Counter(code[i].opcode for i in inside),
        )

    return [loop(header) for header in sorted(bodies)]


def _blocks(code: list[Instruction], labels: dict[str, int]) -> tuple[list[int], dict[int, list[int]]]:
    """Basic blocks by the index of their first instruction: all of them in order, and which can follow which."""
    leaders = {0, *(i for i in labels.values() if i < len(code))}
    leaders |= {i + 1 for i, x in enumerate(code[:-1]) if x.target or x.ends_flow}
    starts = sorted(leaders)
    successors = {}
    for start, end in zip(starts, [*starts[1:], len(code)]):
        last = code[end - 1]
        following = [labels[last.target]] if last.target else []
        if not last.ends_flow and end < len(code):
            following.append(end)
        successors[start] = following
    return starts, successors


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Block -> the blocks on every way to it from the entry, itself included. Unreachable blocks are left out."""
    order = _reverse_postorder(successors)
    predecessors = _predecessors(order, successors)
    dominators: dict[int, set[int]] = {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [dominators[p] for p in predecessors[block] if p in dominators]
            new = set.intersection(*known) | {block}
            if dominators.get(block) != new:
                dominators[block], changed = new, True
    return dominators


def _predecessors(reachable: Iterable[int], successors: dict[int, list[int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {block: [] for block in reachable}
    for block in reachable:
        for other in successors[block]:
            found[other].append(block)
    return found


def _reverse_postorder(successors: dict[int, list[int]]) -> list[int]:
    done: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterable[int]]] = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return done[::-1]
