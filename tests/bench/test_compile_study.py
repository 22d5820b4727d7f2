# SPDX-License-Identifier: Apache-2.0
"""The study of loops that do not ship: what compiles, and the committed records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.kernels import compile_study
from bench.kernels.compile_matrix import name_version
from bench.kernels.compile_study import (
    CASE,
    SHAPES,
    Variant,
    compile_variant,
    describe_variant,
    list_variants,
    main,
    render_page,
)
from bench.kernels.compile_table import INSTRUCTION_SLACK, TABLE, read_table
from bench.kernels.machine_code import Loop, MachineCode, find_tools
from bench.records import RESULTS, Record, load_records

triton = pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

CODE = MachineCode(64, 0, 0, 900, (Loop("QGMMA.64x16x32.F32.E4M3.E4M3", 4, 167, {16: 3}, 0, 0, 0),))


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return {record.arm: record for record in load_records(RESULTS) if record.case == CASE}


def test_instructions_are_per_weight() -> None:
    variant = Variant("fp8", 4, 8, SHAPES[0])
    metrics = describe_variant(variant, CODE)
    assert metrics["per_weight_fp8_w4a8_64x16"].value == round(167 / 64, 2)
    assert metrics["registers_fp8_w4a8_64x16"].value == 64
    with pytest.raises(ValueError, match="fp8_w4a8_64x16: 0 loops multiply"):
        describe_variant(variant, replace(CODE, loops=()))


def test_records_have_every_loop(records: dict[str, Record]) -> None:
    assert set(records) == {
        f"triton{version}_{target}" for version in ("3.6", "3.7", "3.9") for target in ("sm_80", "sm_90")
    }
    for record in records.values():
        expected = {f"per_weight_{variant.name}" for variant in list_variants(record.settings["target"])}
        assert expected == {name for name in record.metrics if name.startswith("per_weight_")}
    assert (RESULTS / CASE / "README.md").read_text() == render_page(list(records.values()))


@pytest.mark.skipif(name_version(triton.__version__) != "3.9", reason="on GPU hosts triton is another one")
@pytest.mark.parametrize(
    ("kind", "act_bits", "unit"), [("fp8", 8, "wgmma"), ("int8", 8, "wgmma"), ("gate_up", 16, "mma.sync")]
)
def test_a_loop_compiles_to_what_its_record_says(
    records: dict[str, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, act_bits: int, unit: str
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = compile_study.SMALL_SHAPES[1] if kind == "gate_up" else SHAPES[0]
    variant = Variant(kind, 4, act_bits, shape)
    code = compile_variant(variant, "sm_90", find_tools(triton.__file__))
    assert [loop.unit for loop in code.loops] == [unit]
    new, known = describe_variant(variant, code), records["triton3.9_sm_90"].metrics
    for name, metric in new.items():
        value = known[name].value
        assert metric.value is not None
        assert value is not None
        assert metric.value <= (1 + INSTRUCTION_SLACK) * value + 8 * name.startswith("registers")


def test_the_int8_loop_is_as_long_as_the_one_that_ships(records: dict[str, Record]) -> None:
    shipped = {row.key: row.per_weight for row in read_table(TABLE)}
    for arm in ("triton3.9_sm_90", "triton3.6_sm_90"):
        for bits in (2, 3, 4):
            for tile in ("64x16", "64x64", "128x64"):
                value = records[arm].metrics[f"per_weight_int8_w{bits}a8_{tile}"].value
                (per_weight,) = shipped[arm[6:9], "sm_90", f"gate_up w{bits}a8 {tile}"]
                assert value == pytest.approx(per_weight, rel=0.05), (arm, bits, tile)


def test_planes_pass_no_shared_memory_where_joined_words_do(records: dict[str, Record]) -> None:
    for target in ("sm_80", "sm_90"):
        metrics = records[f"triton3.6_{target}"].metrics
        assert metrics["stores_joined_w4a16_64x8"].value != 0
        for bits, act_bits in ((2, 16), (4, 16), (8, 16), (2, 8), (4, 8)):
            name = f"gate_up_w{bits}a{act_bits}_64x8"
            assert (metrics[f"stores_{name}"].value, metrics[f"spilled_{name}"].value) == (0, 0), name


def test_bad_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--targets", "sm_100"])
    assert "nothing to compile for 'sm_100': use sm_80, sm_90" in capsys.readouterr().err
