# SPDX-License-Identifier: Apache-2.0
"""The table of compiled kernels: its rows, its file, what two rows may differ in, and what no row may have."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bench.kernels.machine_code import MULTIPLIES
from bench.records import RESULTS
from vllm_ext.kernels.gpu import layout
from vllm_ext.kernels.gpu.configurations import WARP_SIZE
from vllm_ext.kernels.gpu.layout import DEPTH

CASE = "compile_matrix"
TABLE = RESULTS / CASE / "table.csv"

#: Compute capabilities, and the shared memory that one thread block can have there, in bytes (CUDA C++ programming
#: guide, table of technical specifications per compute capability).
TARGETS = {
    "sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "sm_103": (10, 3), "sm_120": (12, 0),
}  # fmt: skip
SHARED_LIMITS = {
    "sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_103": 227 << 10,
    "sm_120": 99 << 10,
}  # fmt: skip

#: The fastest unit of a target: `wgmma` needs sm_90a and `tcgen05` sm_100a, which Triton compiles for by itself.
#: `find_unit` has what a kernel can have of it.
UNITS = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05",
    "sm_120": "mma.sync",
}  # fmt: skip

#: `wgmma` and `tcgen05` are instructions of this many warps together.
UNIT_WARPS = 4

#: Targets whose `tcgen05` multiplies no integers (PTX ISA: `.kind::i8` is for sm_100a, not for sm_103a).
NO_INTEGER_UNIT = ("sm_103",)

#: Triton before this one has `tcgen05` for no integers, and multiplies by `mma.sync` mostly what went through shared
#: memory after it was decoded.
FIRST_COMPLETE = (3, 9)

#: How far a compiler may move from the table before `compare_rows` says so: registers, and instructions per weight.
REGISTER_SLACK = 8
INSTRUCTION_SLACK = 0.05

#: Stored bits of a code -> bits of its planes; 16: the weight itself.
PLANES = {**layout.PLANES, 16: (16,)}

SEPARATOR = "/"


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Fields of the main loops have a value for each, in the order of their code.

    triton: "3.9"; target: "sm_90"; kernel: `Shipped.name`; source: `compile_sources.hash_kernel`; tile_rows: of the
    weight, 0 for kernels without GEMM; stack_bytes: of spilled registers; local_accesses: instructions; shared_bytes:
    of a thread block;
    multiply: instruction of the tensor core; per_weight: instructions of a thread for each weight that it decodes;
    copies: bytes x count of copies into shared memory; loads: of global memory into registers; stores: to shared
    memory; spills: accesses to local memory.
    """

    triton: str
    target: str
    kernel: str
    source: str
    tile_rows: int
    tile_tokens: int
    warps: int
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    instructions: int
    multiply: tuple[str, ...]
    num_multiplies: tuple[int, ...]
    per_weight: tuple[float, ...]
    copies: tuple[str, ...]
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    spills: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells rows apart."""
        return self.triton, self.target, self.kernel

    @property
    def is_gemm(self) -> bool:
        """Whether the kernel multiplies tiles."""
        return self.tile_rows > 0


class Known(NamedTuple):
    """Rows that may break a rule: regular expressions for compiler, target, kernel and violation; and why they may."""

    triton: str
    target: str
    kernel: str
    violation: str
    reason: str


#: None of them is on sm_90. That each still is needed is tested.
KNOWN = (
    Known(
        r".*", r"sm_80|sm_89|sm_100|sm_103|sm_120", r".*", r"spills: .* 0 of them in main loops",
        "the assembler keeps a few values from before the main loop in local memory until after it",
    ),
    Known(
        r"3\.6", r"sm_80", r".* w2,3,4,6,8,16a16 .*", r"spills: .*",
        "six loops whose weights Triton 3.6 takes through shared memory: use Triton 3.9, or fewer widths in a layer",
    ),
    Known(
        r"3\.9", r"sm_100", r".* w4a8_g32 64x64|.* w4a8_g32 128x64", r"spills: .*",
        "four groups a chunk with scales and sums of their own take all registers: use groups of 128 with 8 bits",
    ),
    Known(
        r"3\.[79]", r"sm_100|sm_103", r".* w(\d,)*3(,\d+)*a(8|16) 128x\d+", r".* stores to shared memory in main loops",
        "Triton joins the two planes of 3-bit codes by way of shared memory there",
    ),
    Known(
        r"3\.[79]", r"sm_100", r".* w4a(16|8)_g32 .*", r".* stores to shared memory in main loops",
        "Triton takes the pieces of a chunk out of it by way of shared memory there",
    ),
    Known(
        r"3\.7", r"sm_100", r".* w4a16_g32 128x128", r"0 main loops for 1 formats",
        "it needs 544 columns of tensor memory and 512 are there, so Triton leaves a trap and refuses to load it: "
        "the next smaller tile serves (kernels/gpu/fitting.py)",
    ),
)  # fmt: skip


class LoopFormat(NamedTuple):
    """What a loop multiplies: stored bits of weights, bits of activations, columns of a group up to 128."""

    bits: int
    act_bits: int
    depth: int


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file. Raises ValueError for other columns than a row has."""
    if not path.exists():
        return []
    names = [one.name for one in fields(Row)]
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {names}: compile all again")
        for number, line in enumerate(reader, 2):
            try:
                rows.append(Row(**{name: _parse(name, line[name]) for name in names}))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return rows


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in the order of `sort_rows`; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            names = [one.name for one in fields(Row)]
            writer.writerow(names)
            for row in sort_rows(rows):
                writer.writerow([_write(getattr(row, name)) for name in names])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Newest compiler first, then targets by age, then kernels by name."""
    targets = list(TARGETS)
    return sorted(
        rows,
        key=lambda row: ([-part for part in parse_version(row.triton)], targets.index(row.target), row.kernel),
    )


def parse_version(triton: str) -> tuple[int, ...]:
    """ "3.9" -> (3, 9)."""
    return tuple(int(part) for part in triton.split("."))


def compare_rows(known: Row, new: Row) -> list[str]:
    """What of a new row is not as the table has it; a few more registers and instructions are allowed."""
    found = []
    if new.registers > known.registers + REGISTER_SLACK:
        found.append(f"{new.registers} registers, {known.registers} in the table")
    exact = ("stack_bytes", "local_accesses", "shared_bytes", "multiply", "num_multiplies", "copies", "loads", "stores")
    for name in exact:
        if getattr(new, name) != getattr(known, name):
            found.append(f"{name} {getattr(new, name)}, {getattr(known, name)} in the table")
    pairs = zip(known.per_weight, new.per_weight, strict=False)
    if any(mine > (1 + INSTRUCTION_SLACK) * theirs for theirs, mine in pairs):
        found.append(f"instructions per weight {new.per_weight}, {known.per_weight} in the table")
    return found


def list_formats(kernel: str) -> list[LoopFormat]:
    """The loops that a kernel's name promises: "gate_up w2,4a16_g32 64x16" has two, of 2 and of 4 bits."""
    found = re.findall(r"\bw([\d,]+)a(8|16)(?:_g(\d+))?", kernel)
    return [
        LoopFormat(int(bits), int(act_bits), int(depth or DEPTH))
        for widths, act_bits, depth in found
        for bits in widths.split(",")
    ]


def list_violations(row: Row) -> list[str]:
    """What a row has that no kernel that ships may have.

    Registers spilled, or any local memory; more shared memory than a thread block can have; in a main loop another unit
    than the target's best, other numbers of multiplications than a tile needs, weights that pass shared memory a second
    time or come by narrow or unbuffered loads. KNOWN has the rows that do break a rule, and why they may.
    """
    found = []
    if row.stack_bytes or row.local_accesses:
        inside = sum(row.spills)
        found.append(f"spills: {row.stack_bytes} bytes, {row.local_accesses} accesses, {inside} of them in main loops")
    if row.shared_bytes > (limit := SHARED_LIMITS[row.target]):
        found.append(f"{row.shared_bytes} bytes of shared memory, {limit} are there")
    if not row.is_gemm:
        return found
    formats = list_formats(row.kernel)
    if len(row.multiply) != len(formats):
        return [*found, f"{len(row.multiply)} main loops for {len(formats)} formats"]
    found += _check_multiplies(row, formats)
    is_stored = _is_old(row) and any(find_unit(row, one.act_bits) == "mma.sync" for one in formats)
    if any(row.stores) and not is_stored:
        found.append(f"{row.stores} stores to shared memory in main loops")
    if any(row.loads):
        found.append(f"{row.loads} unbuffered loads in main loops")
    wide = sorted(_count_wide_copies(text) for text in row.copies)
    needed = sorted(_need_wide_copies(row, one) for one in formats)
    if any(mine < theirs for mine, theirs in zip(wide, needed, strict=True)):
        found.append(f"{wide} copies of 16 bytes in main loops, weights alone need {needed}")
    return found


def find_reason(row: Row, violation: str) -> str | None:
    """Why a row may break a rule, from KNOWN; None where it may not."""
    subject = (row.triton, row.target, row.kernel, violation)
    for known in KNOWN:
        if all(re.fullmatch(pattern, text) for pattern, text in zip(known[:4], subject, strict=True)):
            return known.reason
    return None


def find_unit(row: Row, act_bits: int) -> str:
    """What should multiply in a row's loops with activations of so many bits: the best that they can have."""
    is_small = row.warps < UNIT_WARPS
    unit = UNITS[row.target]
    is_missing = act_bits == 8 and unit == "tcgen05" and (row.target in NO_INTEGER_UNIT or _is_old(row))
    return "mma.sync" if is_small or is_missing else unit


def _is_old(row: Row) -> bool:
    return parse_version(row.triton) < FIRST_COMPLETE


def _check_multiplies(row: Row, formats: list[LoopFormat]) -> list[str]:
    """What is wrong with the units of the main loops, and with how often they multiply."""
    units = sorted(MULTIPLIES[name.split(".")[0]] for name in row.multiply)
    expected = sorted(find_unit(row, one.act_bits) for one in formats)
    if units != expected:
        return [f"multiplies by {', '.join(sorted(set(units)))}, not by {', '.join(sorted(set(expected)))}"]
    counts = sorted(_count_multiplies(row, one.act_bits) for one in formats)
    if sorted(row.num_multiplies) != counts:
        return [f"{row.num_multiplies} multiplications in main loops, expected {counts}"]
    return []


def _count_multiplies(row: Row, act_bits: int) -> int:
    """Instructions of a thread for a tile and 128 columns: each takes 16 columns of 16 bits, 32 of 8 bits."""
    steps = DEPTH // (16 if act_bits == 16 else 32)
    unit = find_unit(row, act_bits)
    if unit == "tcgen05":
        # One instruction takes up to 128 rows and 256 tokens; one thread issues it.
        return steps * -(-row.tile_rows // 128) * -(-row.tile_tokens // 256)
    if unit == "wgmma":
        # 64 rows of four warps.
        return steps * row.tile_rows // (16 * row.warps) * -(-row.tile_tokens // 256)
    # 16 rows and 8 tokens of one warp.
    return steps * row.tile_rows * row.tile_tokens // (16 * 8 * row.warps)


def _count_wide_copies(text: str) -> int:
    return sum(int(part.removeprefix("16x")) for part in text.split("+") if part.startswith("16x"))


def _need_wide_copies(row: Row, one: LoopFormat) -> int:
    """Copies of 16 bytes that bring a thread's part of a chunk's codes; a smaller plane comes in narrower ones."""
    threads = row.warps * WARP_SIZE
    return sum(row.tile_rows * DEPTH * bits // 8 // (16 * threads) for bits in PLANES[one.bits])


def _parse(name: str, text: str) -> Any:
    kind = Row.__annotations__[name]
    if not kind.startswith("tuple"):
        return int(text) if kind == "int" else text
    parts = text.split(SEPARATOR) if text else []
    if "float" in kind:
        return tuple(float(part) for part in parts)
    return tuple(int(part) for part in parts) if "int" in kind else tuple(parts)


def _write(value: object) -> str:
    return SEPARATOR.join(map(str, value)) if isinstance(value, tuple) else str(value)
