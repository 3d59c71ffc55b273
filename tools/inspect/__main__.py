"""`python -m tools.inspect PATTERN`: registers and notes, PTX, SASS or loops of kernel variants. Needs no GPU.

A variant comes from the kernel cache if the sources are those it was made from, and is compiled otherwise.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import re
import sys
from collections import Counter
from collections.abc import Sequence

from cutehop.aot import all_variants, describe
from cutehop.cute_kernels.jit import Bundle
from tools.inspect.sass import disassemble, find_loops, parse, scoreboards

SHORTEST_LOOP = 16  # instructions; shorter ones are waits
OPCODES = 14  # most frequent ones shown


def resources(bundle: Bundle) -> str:
    """Registers, local and shared memory, launch attributes and ptxas' notes, one line each."""
    budgets = re.findall(r"setmaxnreg\.(?:inc|dec)\S*\s+(\d+)", bundle.ptx)
    local = re.search(r"\d+ bytes stack frame.*", bundle.log)
    flags = [f"cluster {bundle.cluster}", *(name for name in ("pdl", "cooperative") if getattr(bundle, name))]
    notes = Counter(re.findall(r"\(C\d+\).*", bundle.log))
    rows = {
        "registers": f"{bundle.registers} at launch" + (f", then {', '.join(budgets)} by role" if budgets else ""),
        "local memory": local[0] if local else "not in the log",
        "shared memory": f"{bundle.smem_bytes} bytes",
        "launch": f"{bundle.threads} threads, {', '.join(flags)}",
        "parameters": " ".join(f"{count} {kind}" for kind, count in Counter(bundle.params).items()),
        "cubin": f"{len(bundle.cubin)} bytes",
        "ptxas notes": "\n".join(f"{count} x {note}" for note, count in notes.items()) or "none",
    }
    return "\n".join(f"  {name:<14} {text}" for name, text in rows.items())


def loops(bundle: Bundle) -> str:
    """Every loop of at least SHORTEST_LOOP instructions: where, how long, and what it is made of."""
    code, labels = parse(disassemble(bundle.cubin))
    lines = [f"  {len(code)} instructions"]
    for loop in find_loops(code, labels):
        if loop.instructions >= SHORTEST_LOOP:
            counts = " ".join(f"{opcode} {count}" for opcode, count in loop.opcodes.most_common(OPCODES))
            lines.append(
                f"  {'  ' * loop.depth}{loop.start:#07x}..{loop.end:#07x}: {loop.instructions} instructions, "
                f"{loop.out_of_line} of them out of line: {counts}"
            )
    return "\n".join(lines)


VIEWS = {
    "resources": (resources, "registers, memory, launch attributes, notes of ptxas (default)"),
    "ptx": (lambda bundle: bundle.ptx, "the PTX"),
    "sass": (lambda bundle: disassemble(bundle.cubin), "the SASS (needs nvdisasm, extra `test`)"),
    "waits": (
        lambda bundle: scoreboards(disassemble(bundle.cubin, encodings=True)),
        "the SASS with the scoreboards that each instruction waits for and sets (needs nvdisasm)",
    ),
    "loops": (loops, "instruction counts of the SASS loops (needs nvdisasm)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.inspect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pattern", help="glob, matched anywhere in a variant's line, e.g. 'decode*bf16*=64'")
    choice = parser.add_mutually_exclusive_group()
    for name, (_, text) in VIEWS.items():
        choice.add_argument(f"--{name}", action="store_const", const=name, dest="view", help=text)
    options = parser.parse_args(argv)
    variants = {describe(variant): variant for variant in all_variants()}
    chosen = [line for line in variants if fnmatch.fnmatch(line, f"*{options.pattern}*")]
    if not chosen:
        print(f"no variant matches {options.pattern!r}; there are", *variants, sep="\n  ", file=sys.stderr)
        return 1
    view, _ = VIEWS[options.view or "resources"]
    for line in chosen:
        module, name, config = variants[line]
        print(f"// {line}", view(getattr(importlib.import_module(module), name).bundle(config)), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
