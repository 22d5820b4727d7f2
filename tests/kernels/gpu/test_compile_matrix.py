# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels as machine code: the rules for what ships, and the committed table against fresh compilations.

`VLLM_EXT_TRITON=DIR` names a folder with another triton, which the slow tests then compile with, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.kernels.compile_matrix import (
    HELPERS,
    check_table,
    compile_entry,
    find_stale,
    list_entries,
    main,
    name_version,
)
from bench.kernels.compile_report import make_records, render_page, write_report
from bench.kernels.compile_table import (
    KNOWN,
    REGISTER_SLACK,
    TABLE,
    TARGETS,
    LoopFormat,
    Row,
    compare_rows,
    find_reason,
    find_unit,
    list_formats,
    list_violations,
    read_table,
    write_table,
)
from bench.kernels.machine_code import find_loops, find_tools, parse_listing
from bench.records import load_records

triton = pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

#: What the table has of each Triton: 3.9 is with the CPU wheel of vLLM, 3.7 with its CUDA wheel, 3.6 with torch 2.11.
COMPILED = {"3.9": tuple(TARGETS), "3.7": tuple(TARGETS), "3.6": ("sm_80", "sm_90", "sm_120")}
VERSION = name_version(triton.__version__)

#: Compiled in every run: both activations, decode and prefill, every unit that multiplies.
QUICK = [
    ("sm_90", "gate_up w4a16 64x16"),
    ("sm_80", "gate_up w4a8 64x16"),
    ("sm_100", "gate_up w2a16 64x64"),
]
SETS = [HELPERS, "w2a16", "w3a16", "w16a16", "w8a8", "w4a16_g32", "w4a8", "w2,4,8a16"]

LISTING = """\
kernel:
        /*0000*/                   LDG.E R6, [R2.64] ;
.L_x_1:
        /*0010*/                   NANOSLEEP 0x32 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R4.64] ;
        /*0040*/                   LDGSTS.E.64 [R3], [R4.64], P0 ;
        /*0050*/                   LDGSTS.E [R3], [R4.64] ;
        /*0060*/                   LDS.128 R8, [R3] ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;
        /*0080*/                   STL [R1], R16 ;
        /*0090*/                   STSM.16.M88.4 [R3], R4 ;
        /*00a0*/             @UP0  BRA.U `(.L_x_2) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_2) ;
"""


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return read_table(TABLE)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles instead of finding an earlier result."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def find_row(table: list[Row], triton_version: str, target: str, kernel: str) -> Row:
    (row,) = [row for row in table if row.key == (triton_version, target, kernel)]
    return row


def test_no_kernel_breaks_a_rule_but_the_known_ones(table: list[Row]) -> None:
    assert check_table(table) == []
    reasons = {find_reason(row, violation) for row in table for violation in list_violations(row)}
    assert reasons == {known.reason for known in KNOWN}, "mended since: take it out of KNOWN"


def test_no_kernel_breaks_a_rule_on_hopper(table: list[Row]) -> None:
    assert [(row.key, found) for row in table if row.target == "sm_90" and (found := list_violations(row))] == []
    assert {row.target for row in table if row.triton == "3.9" and sum(row.spills)} <= {"sm_100"}


def test_the_table_has_every_kernel_that_ships(table: list[Row]) -> None:
    names = {row.key for row in table}
    compiled = {(version, target) for version, targets in COMPILED.items() for target in targets}
    for version, target in sorted(compiled):
        missing = [entry.name for entry in list_entries(target) if (version, target, entry.name) not in names]
        assert missing == [], f"{target}, triton {version}: run python -m bench.kernels.compile_matrix --missing"
    assert {(row.triton, row.target) for row in table} == compiled


def test_the_table_has_the_kernels_as_they_are(table: list[Row]) -> None:
    assert find_stale(table) == [], "run python -m bench.kernels.compile_matrix --missing, with --triton for older ones"


def test_records_are_those_of_the_table(table: list[Row]) -> None:
    committed = {
        record.arm: record.metrics for record in load_records(TABLE.parent.parent) if record.case == "compile_matrix"
    }
    assert {record.arm: record.metrics for record in make_records(table)} == committed


def test_the_page_is_that_of_the_table(table: list[Row]) -> None:
    assert (TABLE.parent / "README.md").read_text() == render_page(table)


def test_a_report_keeps_the_records_that_say_nothing_new(table: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "compile_matrix" / "table.csv"
    rows = [row for row in table if row.kernel in ("count", "gate_up w4a16 64x16")]
    write_table(path, rows)
    write_report(path)
    first = {record.arm: record for record in load_records(tmp_path)}
    assert set(first) == {f"triton{version}_{target}" for version, targets in COMPILED.items() for target in targets}
    assert (path.parent / "README.md").read_text() == render_page(rows)
    changed = [
        replace(row, registers=99) if row.key == ("3.7", "sm_90", "gate_up w4a16 64x16") else row for row in rows
    ]
    write_table(path, changed)
    for file in path.parent.glob("*.json"):
        file.write_text(file.read_text().replace(first["triton3.7_sm_90"].git_hash, "an earlier commit"))
    write_report(path)
    second = {record.arm: record for record in load_records(tmp_path)}
    assert [arm for arm, record in second.items() if record.git_hash != "an earlier commit"] == ["triton3.7_sm_90"]
    assert second["triton3.7_sm_90"].metrics["registers_w4a16_64x16"].value == 99


@pytest.mark.skipif(VERSION not in COMPILED, reason="on GPU hosts triton can be another one")
@pytest.mark.parametrize(("target", "kernel"), [one for one in QUICK if one[0] in COMPILED.get(VERSION, TARGETS)])
@pytest.mark.usefixtures("fresh_cache")
def test_a_kernel_compiles_to_what_the_table_says(table: list[Row], target: str, kernel: str) -> None:
    formats = kernel.split()[1]
    (entry,) = [entry for entry in list_entries(target, [formats]) if entry.name == kernel]
    new = compile_entry(entry, target, find_tools(triton.__file__))
    assert compare_rows(find_row(table, new.triton, target, kernel), new) == []
    assert check_table([new]) == []


def test_alignment_is_listed_as_the_kernels_have_it() -> None:
    from vllm_ext.kernels.gpu.shipped import UNALIGNED

    for entry in list_entries("sm_90", [HELPERS, "w4a16"]):
        kernel = entry.shipped.kernel
        unaligned = [one.name for one in kernel.params if one.do_not_specialize_on_alignment]
        assert unaligned == [name for name in kernel.arg_names if name in UNALIGNED], entry.name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("folder", [None, *filter(None, [os.environ.get("VLLM_EXT_TRITON")])])
def test_all_kernels_compile_to_what_the_table_says(
    table: list[Row], tmp_path: Path, target: str, folder: str | None
) -> None:
    command = [sys.executable, "-m", "bench.kernels.compile_matrix", "--targets", target, "--sets", *SETS]
    command += ["--table", str(tmp_path / "table.csv"), *(["--triton", folder] if folder else [])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1700, check=False)
    new = read_table(tmp_path / "table.csv")
    assert len(new) > len(SETS), done.stderr[-2000:]
    known = {row.key: row for row in table}
    found = {row.key: compare_rows(known[row.key], row) for row in new if row.key in known}
    assert {key: differences for key, differences in found.items() if differences} == {}
    assert len(found) == len(new) or target not in COMPILED.get(new[0].triton, ())


def test_loops_are_found_in_a_listing() -> None:
    instructions, labels = parse_listing(LISTING)
    assert len(instructions) == 14
    (loop,) = find_loops(instructions, labels)
    assert (loop.multiply, loop.unit, loop.num_multiplies, loop.num_instructions) == (
        "HGMMA.64x16x16.F32.BF16", "wgmma", 1, 8,
    )  # fmt: skip
    assert loop.copies == {16: 1, 8: 1, 4: 1}
    assert (loop.loads, loop.stores, loop.spills) == (0, 1, 1)


def test_formats_are_read_from_names() -> None:
    assert list_formats("gate_up w2,16a16 64x16") == [LoopFormat(2, 16, 128), LoopFormat(16, 16, 128)]
    assert list_formats("down w4a16,w4a8 128x64") == [LoopFormat(4, 16, 128), LoopFormat(4, 8, 128)]
    assert list_formats("linear w4a8_g32 fp16 64x16") == [LoopFormat(4, 8, 32)]
    assert list_formats("sort_few") == []


def test_every_rule_is_seen(table: list[Row]) -> None:
    good = find_row(table, "3.9", "sm_90", "gate_up w4a16 128x64")
    assert list_violations(good) == []
    for change, text in (
        ({"stack_bytes": 8}, "spills: 8 bytes, 0 accesses, 0 of them in main loops"),
        ({"local_accesses": 3, "spills": (2,)}, "spills: 0 bytes, 3 accesses, 2 of them in main loops"),
        ({"shared_bytes": 233_000}, "233000 bytes of shared memory, 232448 are there"),
        ({"multiply": ("HMMA.16816.F32.BF16",)}, "multiplies by mma.sync, not by wgmma"),
        ({"num_multiplies": (7,)}, r"(7,) multiplications in main loops, expected [8]"),
        ({"stores": (4,)}, "(4,) stores to shared memory in main loops"),
        ({"loads": (1,)}, "(1,) unbuffered loads in main loops"),
        ({"copies": ("16x1+4x9",)}, "[1] copies of 16 bytes in main loops, weights alone need [2]"),
        ({"multiply": ()}, "0 main loops for 1 formats"),
    ):
        assert list_violations(replace(good, **change)) == [text]


@pytest.mark.parametrize(
    ("target", "warps", "act_bits", "unit"),
    [
        ("sm_80", 4, 16, "mma.sync"),
        ("sm_90", 8, 8, "wgmma"),
        # Four warps make one instruction.
        ("sm_90", 2, 16, "mma.sync"),
        ("sm_100", 4, 8, "tcgen05"),
        ("sm_103", 4, 16, "tcgen05"),
        ("sm_103", 8, 8, "mma.sync"),
        ("sm_120", 8, 16, "mma.sync"),
    ],
)
def test_each_target_multiplies_by_its_best_unit(
    table: list[Row], target: str, warps: int, act_bits: int, unit: str
) -> None:
    row = find_row(table, "3.9", "sm_90", "gate_up w4a16 128x64")
    assert find_unit(replace(row, target=target, warps=warps), act_bits) == unit


@pytest.mark.parametrize(
    ("target", "act_bits", "unit"), [("sm_100", 8, "mma.sync"), ("sm_100", 16, "tcgen05"), ("sm_90", 8, "wgmma")]
)
def test_an_older_triton_lacks_the_newest_unit_for_integers(
    table: list[Row], target: str, act_bits: int, unit: str
) -> None:
    row = find_row(table, "3.7", "sm_90", "gate_up w4a16 128x64")
    assert find_unit(replace(row, target=target), act_bits) == unit


def test_kernels_of_both_activations_may_have_two_units(table: list[Row]) -> None:
    row = find_row(table, "3.9", "sm_90", "gate_up w4a16,w4a8 128x64")
    mixed = {"multiply": ("UTCHMMA", "IMMA.16832.S8.S8.SAT"), "num_multiplies": (8, 32)}
    assert list_violations(replace(row, target="sm_103", **mixed)) == []
    assert "multiplies by mma.sync, tcgen05, not by tcgen05" in list_violations(replace(row, target="sm_100", **mixed))


def test_a_compiler_may_move_a_little(table: list[Row]) -> None:
    row = find_row(table, "3.9", "sm_90", "gate_up w4a16 64x16")
    assert compare_rows(row, replace(row, registers=row.registers + REGISTER_SLACK)) == []
    assert compare_rows(row, replace(row, registers=row.registers - 30)) == []
    assert "registers" in compare_rows(row, replace(row, registers=row.registers + REGISTER_SLACK + 1))[0]
    slower = replace(row, per_weight=tuple(1.06 * value for value in row.per_weight))
    assert "instructions per weight" in compare_rows(row, slower)[0]
    assert "copies" in compare_rows(row, replace(row, copies=("4x9",)))[0]


def test_a_table_is_read_as_it_was_written(table: list[Row], tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", table)
    assert (tmp_path / "table.csv").read_text() == TABLE.read_text()
    (tmp_path / "table.csv").write_text("triton,target\n3.9,sm_90\n")
    with pytest.raises(ValueError, match="has the columns"):
        read_table(tmp_path / "table.csv")
    assert read_table(tmp_path / "none.csv") == []


def test_bad_usage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--targets", "sm_75"])
    assert raised.value.code == 2
    assert "'sm_75' is none of sm_80" in capsys.readouterr().err
    assert main(["--triton", str(tmp_path)]) == 2
    assert "holds no triton" in capsys.readouterr().err
    with pytest.raises(ValueError, match="set of formats 'w9a16' is none of helpers w2a16"):
        list(list_entries("sm_90", ["w9a16"]))
