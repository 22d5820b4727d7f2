# SPDX-License-Identifier: Apache-2.0
"""What people and docs read of the table of compiled kernels: a page, and a record per compiler and target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from bench.kernels.compile_table import (
    CASE,
    SHARED_LIMITS,
    TARGETS,
    Row,
    find_reason,
    list_violations,
    read_table,
    sort_rows,
)
from bench.kernels.machine_code import MULTIPLIES
from bench.records import Metric, Record, describe_environment, load_records, write_record

#: Sets of formats with one width, whose figures docs quote.
QUOTED = (
    "w2a16", "w3a16", "w4a16", "w6a16", "w8a16", "w16a16", "w2a8", "w3a8", "w4a8", "w6a8", "w8a8",
    "w4a16_g32", "w4a8_g32",
    "w2a16 narrow", "w3a16 narrow", "w4a16 narrow", "w8a16 narrow", "w4a8 narrow", "w2a16 narrow sums",
    "w4a16 narrow sums",
)  # fmt: skip

INTRODUCTION = """\
<!-- Written by `python -m bench.kernels.compile_matrix`; edit the script, not this page. -->
# The Triton kernels as machine code

Compiled without a GPU and read back from the machine code: nothing here is a time, and nothing of it ever ran on a
GPU. `table.csv` has all kernels and more columns. How to read it:
[docs/gpu-kernels-compile.md](../../../docs/gpu-kernels-compile.md).

A cell is the kernel `gate_up` with one set of formats and one tile (rows of the weight x tokens): registers of a
thread, shared memory of a thread block in KiB, and instructions of a thread for each weight in the main loops, the
loops in the order of their code. Bold: it breaks a rule, and the list below the table says which. "narrow": a tile of
two warps that no rule chooses, for trying it out; "sums": where zero points are taken off by sums of activations.
"""


def write_report(table: Path) -> None:
    """Write README.md and the records into the folder of the table; a record that says nothing new stays as it is."""
    rows = read_table(table)
    (table.parent / "README.md").write_text(render_page(rows), encoding="utf-8")
    # A record lies in the folder of its case: of another folder's table, too.
    folder = table.parent.parent if table.parent.name == CASE else table.parent
    known = {record.arm: record.metrics for record in load_records(folder) if record.case == CASE}
    for record in make_records(rows):
        if known.get(record.arm) != record.metrics:
            write_record(folder, record)


def render_page(rows: Sequence[Row]) -> str:
    """The page of all rows, as Markdown."""
    parts = [INTRODUCTION]
    for (triton, target), group in groupby(sort_rows(rows), lambda row: row.key[:2]):
        mine = list(group)
        parts.append(f"## {target}, triton {triton}\n")
        parts.append(_describe_group(mine) + "\n")
        parts.append(_render_tiles(mine) + "\n")
        if rest := _render_rest(mine):
            parts.append(rest + "\n")
        broken = [(row, text) for row in mine for text in list_violations(row)]
        lines = [f"- `{row.kernel}`: {text}: {find_reason(row, text) or 'not explained'}" for row, text in broken]
        if lines:
            parts.append("\n".join(lines) + "\n")
    missing = [target for target in TARGETS if not any(row.target == target for row in rows)]
    if missing:
        parts.append(f"Not compiled yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def make_records(rows: Sequence[Row]) -> list[Record]:
    """One record for each compiler and target: arm "triton3.9_sm_90"."""
    environment = describe_environment()
    records = []
    for (triton, target), group in groupby(sort_rows(rows), lambda row: row.key[:2]):
        mine = list(group)
        versions = {**environment["versions"], "triton": triton}
        records.append(
            Record(
                case=CASE,
                arm=f"triton{triton}_{target}",
                repetition=0,
                metrics=_summarize(mine),
                versions=versions,
                device=environment["device"],
                git_hash=environment["git_hash"],
                settings={"kind": CASE, "target": target, "shared_limit_bytes": SHARED_LIMITS[target]},
            )
        )
    return records


def _summarize(rows: Sequence[Row]) -> dict[str, Metric]:
    metrics = {
        "kernels": Metric(len(rows), "kernels"),
        "spilling_kernels": Metric(sum(row.stack_bytes + row.local_accesses > 0 for row in rows), "kernels"),
        "spilling_loops": Metric(sum(count > 0 for row in rows for count in row.spills), "loops"),
        "storing_loops": Metric(sum(count > 0 for row in rows for count in row.stores), "loops"),
        "most_registers": Metric(max(row.registers for row in rows), "registers"),
        "most_shared": Metric(max(row.shared_bytes for row in rows) / 1024, "KiB"),
    }
    for row in rows:
        kernel, _, rest = row.kernel.partition(" ")
        formats, _, tile = rest.rpartition(" ")
        if kernel == "gate_up" and formats in QUOTED and len(row.per_weight) == 1:
            name = f"{formats}_{tile}".replace(" ", "_")
            metrics[f"registers_{name}"] = Metric(row.registers, "registers")
            metrics[f"shared_{name}"] = Metric(row.shared_bytes / 1024, "KiB")
            metrics[f"per_weight_{name}"] = Metric(row.per_weight[0], "instructions/weight")
    return metrics


def _describe_group(rows: Sequence[Row]) -> str:
    units = sorted({MULTIPLIES[name.split(".")[0]] for row in rows for name in row.multiply})
    spilling = sum(row.stack_bytes + row.local_accesses > 0 for row in rows)
    return (
        f"{len(rows)} kernels; main loops multiply by {', '.join(units)}; at most "
        f"{max(row.registers for row in rows)} registers and {max(row.shared_bytes for row in rows) / 1024:.1f} KiB of "
        f"{SHARED_LIMITS[rows[0].target] // 1024} KiB of shared memory; {spilling or 'none'} with spilled registers."
    )


def _render_tiles(rows: Sequence[Row]) -> str:
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        kernel, _, rest = row.kernel.partition(" ")
        formats, _, tile = rest.rpartition(" ")
        if kernel == "gate_up":
            cells.setdefault(formats, {})[tile] = row
    tiles = sorted(
        {tile for mine in cells.values() for tile in mine}, key=lambda tile: [int(n) for n in tile.split("x")]
    )
    lines = ["| formats | " + " | ".join(tiles) + " |", "|---|" + "---|" * len(tiles)]
    for formats, mine in cells.items():
        texts = [_render_cell(mine[tile]) if tile in mine else "" for tile in tiles]
        lines.append(f"| {formats} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _render_cell(row: Row) -> str:
    weights = "/".join(f"{value:.2f}" for value in row.per_weight)
    text = f"{row.registers}, {row.shared_bytes / 1024:.1f}, {weights}"
    return f"**{text}**" if list_violations(row) else text


def _render_rest(rows: Iterable[Row]) -> str:
    """The other kernels in one line each kind: registers, shared memory in KiB."""
    texts = [
        f"`{row.kernel}` {row.registers}, {row.shared_bytes / 1024:.1f}"
        for row in rows
        if not row.kernel.startswith("gate_up ")
    ]
    return f"Other kernels, registers and shared memory in KiB: {'; '.join(texts)}." if texts else ""
