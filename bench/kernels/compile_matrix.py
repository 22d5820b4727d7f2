# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel that ships for every kind of GPU, without one, and write down what came out.

    python -m bench.kernels.compile_matrix [--targets sm_80,sm_90] [--sets w4a16,w4a8] [--missing] [--triton DIR]
        [--table FILE] [--check]

Each kernel is a row of `bench/results/compile_matrix/table.csv`; rows compiled now replace those of the same name, and
the page and the records beside it are written again. `--sets` (`kernels.gpu.shipped.FORMAT_SETS`; `helpers` for the
kernels around the GEMMs) and `--missing` (kernels without a row, and those that changed since) compile less; `--check`
compiles nothing and lists what rows break. `--triton DIR` puts another triton before the installed one, as `pip install
--target DIR --no-deps triton==3.7.1` makes it: the one that vLLM's CUDA wheel brings.

A kernel takes one to six seconds, so everything takes half an hour; an interrupted run keeps what it has.
Exit codes: 0 ok, 1 a row breaks a rule or does not compile, 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.kernels.compile_report import write_report
from bench.kernels.compile_sources import hash_kernel
from bench.kernels.compile_table import (
    TABLE,
    TARGETS,
    Row,
    find_reason,
    list_violations,
    read_table,
    write_table,
)
from bench.kernels.machine_code import MachineCode, find_tools, read_machine_code
from bench.records import ROOT
from vllm_ext.kernels.gpu.configurations import WARP_SIZE, Device
from vllm_ext.kernels.gpu.layout import DEPTH

if TYPE_CHECKING:
    from vllm_ext.kernels.gpu.configurations import Tile
    from vllm_ext.kernels.gpu.shipped import Shipped

#: Stands for the kernels around the GEMMs among sets of formats.
HELPERS = "helpers"

#: Sets of formats for which every GEMM is compiled, one more on the target that is written for first, and sets for
#: which gate_up is in more variants: `list_entries`.
ALL_KERNELS = ("w4a16", "w4a8", "w2,4,8a16")
WIDEST_SET, FIRST_TARGET = "w2,3,4,6,8,16a16", "sm_90"
VARIANTS = ("w4a16", "w4a8")

#: Sets for which gate_up is compiled with `shipped.DECODE_VARIANTS`, by their words.
VARIANT_SETS = {"narrow": ("w2a16", "w3a16", "w4a16", "w8a16", "w4a8"), "narrow sums": ("w2a16", "w4a16")}

#: Targets that differ from older ones in little: sm_103 has no unit for integers, sm_120 little shared memory. There
#: gate_up is compiled, for sets that show it.
SIMILAR_TARGETS = ("sm_103", "sm_120")
SIMILAR_SETS = (HELPERS, "w4a16", "w8a16", "w16a16", "w4a8", "w2,4,8a16", WIDEST_SET)

#: The number of processors plays no part in which tiles there are.
PROCESSORS = 132


@dataclass(frozen=True)
class Entry:
    """A kernel of the matrix. tile is None for one without GEMM."""

    shipped: Shipped
    tile: Tile | None

    @property
    def name(self) -> str:
        """As in the table."""
        return self.shipped.name


def list_entries(target: str, sets: Iterable[str] | None = None) -> Iterator[Entry]:
    """What ships for a target, by set of formats; all sets by default.

    down and linear have the loops of gate_up between other beginnings and ends, so they are compiled for some sets only
    (ALL_KERNELS; WIDEST_SET on FIRST_TARGET); and so are fp16 and a K that is no multiple of 128, for gate_up
    (VARIANTS). On SIMILAR_TARGETS there is less by default. Raises ValueError for an unknown set.
    """
    from vllm_ext.kernels.gpu import shipped

    known = [HELPERS, *shipped.FORMAT_SETS]
    device = Device(TARGETS[target], PROCESSORS)
    is_similar = target in SIMILAR_TARGETS
    for name in (SIMILAR_SETS if is_similar else known) if sets is None else sets:
        if name not in known:
            raise ValueError(f"set of formats {name!r} is none of {' '.join(known)}")
        if name == HELPERS:
            for one in shipped.list_helpers():
                yield Entry(one, None)
            continue
        formats = shipped.FORMAT_SETS[name]
        is_full = not is_similar and (name in ALL_KERNELS or (name, target) == (WIDEST_SET, FIRST_TARGET))
        variants = [("bf16", True, name)]
        if name in VARIANTS and not is_similar:
            variants += [("fp16", True, f"{name} fp16"), ("bf16", False, f"{name} ragged")]
        for tile in shipped.list_tiles(formats, device):
            for half, even_k, label in variants:
                gemms = list(shipped.list_gemms(tile, formats, half, label, even_k))
                for one in gemms if is_full and label == name else gemms[:1]:
                    yield Entry(one, tile)
        for word, tile in shipped.DECODE_VARIANTS.items():
            if name in VARIANT_SETS[word] and not is_similar:
                yield Entry(next(shipped.list_gemms(tile, formats, name=f"{name} {word}")), tile)


def compile_entry(entry: Entry, target: str, tools: Path) -> Row:
    """Compile one kernel with the imported triton and read its machine code. tools: `machine_code.find_tools`."""
    import triton

    compiled = entry.shipped.compile(TARGETS[target])
    code = read_machine_code(compiled.asm["cubin"], tools)
    return describe_row(entry, code, name_version(triton.__version__), target, compiled.metadata.shared)


def describe_row(entry: Entry, code: MachineCode, triton: str, target: str, shared_bytes: int) -> Row:
    """The row of a kernel's machine code."""
    tile, warps = entry.tile, entry.shipped.num_warps
    weights = tile.block_n * DEPTH * tile.unroll if tile else 1
    loops = code.loops if tile else ()
    return Row(
        triton=triton,
        target=target,
        kernel=entry.name,
        source=hash_kernel(entry.shipped),
        tile_rows=tile.block_n if tile else 0,
        tile_tokens=tile.block_tokens if tile else 0,
        warps=warps,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        local_accesses=code.local_accesses,
        shared_bytes=shared_bytes,
        instructions=code.num_instructions,
        multiply=tuple(loop.multiply for loop in loops),
        num_multiplies=tuple(loop.num_multiplies for loop in loops),
        per_weight=tuple(round(loop.num_instructions * WARP_SIZE * warps / weights, 2) for loop in loops),
        copies=tuple("+".join(f"{size}x{count}" for size, count in loop.copies.items()) for loop in loops),
        loads=tuple(loop.loads for loop in loops),
        stores=tuple(loop.stores for loop in loops),
        spills=tuple(loop.spills for loop in loops),
    )


def name_version(version: str) -> str:
    """ "3.9.0" -> "3.9"."""
    return ".".join(version.split(".")[:2])


def compile_matrix(
    table: Path, targets: Sequence[str], sets: Sequence[str] | None = None, only_missing: bool = False
) -> list[str]:
    """Compile with the imported triton and bring a table up to date; returns what went wrong, by kernel."""
    import triton
    from rich.console import Console
    from rich.progress import Progress

    tools = find_tools(triton.__file__)
    version = name_version(triton.__version__)
    rows = {row.key: row for row in read_table(table)}
    problems = []
    work = [(target, entry) for target in targets for entry in list_entries(target, sets)]
    # All before the first is compiled: an edit meanwhile must not pass for what was compiled.
    sources = [hash_kernel(entry.shipped) for _, entry in work]
    if sets is None:
        # Kernels that no longer ship.
        names = {(version, target, entry.name) for target, entry in work}
        rows = {key: row for key, row in rows.items() if key[:2] not in {name[:2] for name in names} or key in names}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"triton {version}", total=len(work))
        for (target, entry), source in zip(work, sources, strict=True):
            progress.update(task, description=f"triton {version} {target} {entry.name}", advance=1)
            known = rows.get((version, target, entry.name))
            if only_missing and known is not None and known.source == source:
                continue
            try:
                row = compile_entry(entry, target, tools)
            except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, and the others go on
                problems.append(f"triton {version}, {target}, {entry.name}: {type(error).__name__}: {error}")
                continue
            rows[row.key] = row
            write_table(table, rows.values())
    return problems


def find_stale(rows: Iterable[Row], targets: Iterable[str] = tuple(TARGETS)) -> list[str]:
    """Rows of kernels that changed since they were compiled, or ship no more, by kernel."""
    sources = {(target, entry.name): hash_kernel(entry.shipped) for target in targets for entry in list_entries(target)}
    return [
        f"triton {row.triton}, {row.target}, {row.kernel}"
        for row in rows
        if row.target in targets and sources.get((row.target, row.kernel)) != row.source
    ]


def check_table(rows: Iterable[Row]) -> list[str]:
    """What rows break, by kernel, but for what is known."""
    return [
        f"triton {row.triton}, {row.target}, {row.kernel}: {violation}"
        for row in rows
        for violation in list_violations(row)
        if find_reason(row, violation) is None
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.compile_matrix", description="Compile the GPU kernels without a GPU."
    )
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="sm_80,...")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="names of shipped.FORMAT_SETS, or helpers")
    parser.add_argument("--missing", action="store_true", help="only what has no row or changed since")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="a folder with another triton")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="compile nothing, list what rows break")
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(TARGETS)}")
    if options.triton:
        return _run_with(options.triton, sys.argv[1:] if argv is None else list(argv))
    problems = []
    if not options.check:
        problems = compile_matrix(options.table, targets, options.sets, options.missing)
        write_report(options.table)
    rows = read_table(options.table)
    problems += check_table(rows)
    problems += [f"{name}: changed since, run this with --missing and its triton" for name in find_stale(rows)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


def _run_with(folder: Path, arguments: list[str]) -> int:
    """The same command in a process that finds the triton of a folder first."""
    if not (folder / "triton" / "__init__.py").is_file():
        print(f"{folder} holds no triton: pip install --target {folder} --no-deps triton==3.7.1", file=sys.stderr)
        return 2
    place = arguments.index("--triton") if "--triton" in arguments else None
    if place is None:
        kept = [one for one in arguments if not one.startswith("--triton=")]
    else:
        kept = arguments[:place] + arguments[place + 2 :]
    path = os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.kernels.compile_matrix", *kept]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
