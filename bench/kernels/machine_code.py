# SPDX-License-Identifier: Apache-2.0
"""What a GPU's machine code says of a compiled kernel: registers, memory, and the instructions of its main loops.

Read with `cuobjdump` and `nvdisasm`, which Triton's wheel has beside its assembler; no GPU and no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Instructions of the tensor core by the beginning of their name: `mma.sync`, `wgmma` and `tcgen05` as PTX calls them.
MULTIPLIES = {
    "HMMA": "mma.sync",
    "IMMA": "mma.sync",
    "QMMA": "mma.sync",
    "HGMMA": "wgmma",
    "IGMMA": "wgmma",
    "QGMMA": "wgmma",
    "UTCHMMA": "tcgen05",
    "UTCIMMA": "tcgen05",
    "UTCQMMA": "tcgen05",
}

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
#: An address, then an instruction up to its semicolon.
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
#: A copy from global into shared memory that passes no register, of 4 bytes unless it says otherwise.
COPY = re.compile(r"LDGSTS\b(?:.*?\.(64|128)(?=\.|$))?")


@dataclass(frozen=True)
class Loop:
    """A loop in which the tensor core multiplies, per iteration and thread.

    multiply: the instruction's name with its shape; num_multiplies: how many; num_instructions: of all kinds;
    copies: {bytes: copies from global to shared memory}; loads: of global memory into registers; stores: to shared
    memory; spills: accesses to local memory.
    """

    multiply: str
    num_multiplies: int
    num_instructions: int
    copies: dict[int, int]
    loads: int
    stores: int
    spills: int

    @property
    def unit(self) -> str:
        """`mma.sync`, `wgmma` or `tcgen05`."""
        return MULTIPLIES[self.multiply.split(".")[0]]


@dataclass(frozen=True)
class MachineCode:
    """registers: of a thread; stack_bytes: of a thread, where registers are spilled to; local_accesses: instructions
    that read or write local memory; num_instructions: of the whole kernel; loops: in the order of their code."""

    registers: int
    stack_bytes: int
    local_accesses: int
    num_instructions: int
    loops: tuple[Loop, ...]


def find_tools(triton_file: str) -> Path:
    """The folder of cuobjdump and nvdisasm of an installed triton, from its `__file__`.

    Raises FileNotFoundError where this triton comes without them.
    """
    folder = Path(triton_file).parent / "backends" / "nvidia" / "bin"
    for tool in ("cuobjdump", "nvdisasm"):
        if not (folder / tool).is_file():
            raise FileNotFoundError(f"triton at {Path(triton_file).parent} has no {tool}: install its wheel from PyPI")
    return folder


def read_machine_code(cubin: bytes, tools: Path) -> MachineCode:
    """Disassemble a kernel. tools: of `find_tools`. Raises ValueError where the tools' output is not understood."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = USAGE.search(_run(tools / "cuobjdump", "-res-usage", str(path)))
        listing = _run(tools / "nvdisasm", "-c", str(path))
    if usage is None:
        raise ValueError("cuobjdump names no registers: the cubin holds no kernel")
    instructions, labels = parse_listing(listing)
    if not instructions:
        raise ValueError("nvdisasm lists no instructions")
    return MachineCode(
        registers=int(usage[1]),
        stack_bytes=int(usage[2]) + int(usage[4]),
        local_accesses=sum(map(_is_local, map(name_instruction, instructions))),
        num_instructions=len(instructions),
        loops=tuple(find_loops(instructions, labels)),
    )


def parse_listing(listing: str) -> tuple[list[str], dict[str, int]]:
    """(instructions, {label: number of the instruction that it stands before}) of nvdisasm's text."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
    return instructions, labels


def name_instruction(text: str) -> str:
    """The name with its suffixes, without a predicate and operands."""
    return PREDICATE.sub("", text).split()[0]


def find_loops(instructions: Sequence[str], labels: dict[str, int]) -> list[Loop]:
    """The loops that multiply, by their place in the code.

    A loop is what lies between a label and a branch back to it. Waiting loops multiply nothing. Where a branch from
    behind the kernel's end leads back into a loop (a wait that is written out of line), what lies between is no loop.
    """
    loops = []
    for end, text in enumerate(instructions):
        branch = BRANCH.search(text)
        if branch is None or labels.get(branch[1], end + 1) > end:
            continue
        names = [name_instruction(one) for one in instructions[labels[branch[1]] : end + 1]]
        multiplies = [name for name in names if name.split(".")[0] in MULTIPLIES]
        if multiplies and "EXIT" not in names:
            loops.append(_describe_loop(names, multiplies))
    return loops


def _describe_loop(names: list[str], multiplies: list[str]) -> Loop:
    copies = Counter(int(found[1] or 32) // 8 for name in names if (found := COPY.match(name)))
    return Loop(
        multiply=multiplies[0],
        num_multiplies=len(multiplies),
        num_instructions=len(names),
        copies=dict(sorted(copies.items(), reverse=True)),
        loads=sum(re.match(r"LDG\b", name) is not None for name in names),
        # STSM stores matrices; STS of any width.
        stores=sum(re.match(r"STSM?\b", name) is not None for name in names),
        spills=sum(_is_local(name) for name in names),
    )


def _is_local(name: str) -> bool:
    return re.match(r"(LDL|STL)\b", name) is not None


def _run(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, timeout=60
    ).stdout
