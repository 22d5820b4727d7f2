# SPDX-License-Identifier: Apache-2.0
"""Figures of pages are traced to records, and what is not traced is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import figures
from bench.figures import check_page, find_untraced, find_value, list_pages, write_like
from bench.records import RESULTS, Metric, Record, load_records, write_record
from bench.tables import render_case_table


def make_records() -> list[Record]:
    values = {"stock": (10.0, 12.0, 11.0), "pack": (5.0, 6.0, 5.5)}
    return [
        Record("decode", arm, number, {"tpot": Metric(value, "ms", "lower")}, {}, {"name": "CPU"}, "0" * 40)
        for arm, row in values.items()
        for number, value in enumerate(row)
    ]


def write_page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def list_problems(folder: Path, text: str) -> list[str]:
    return [problem.text for problem in check_page(write_page(folder, text), make_records()).problems]


@pytest.mark.parametrize(
    ("line", "untraced"),
    [
        ("It takes 12 ms a token.", ["12 ms"]),
        ("1.7x as fast, 40 % smaller and 2.5 times better", ["1.7x", "40 %", "2.5 times"]),
        ("1,234.5 tokens/s at 3.25 bits", ["1,234.5 tokens/s", "3.25 bits"]),
        ("a perplexity of 24.14 and a speed-up of 2", ["perplexity of 24.14", "speed-up of 2"]),
        ("after 3 s, 5s and 2 minutes", ["3 s", "5s", "2 minutes"]),
        ("12 streams, 3-bit codes, groups of 128, vLLM 0.32, 8 x 16 tokens, 4 bits", []),
        ("`sleep 5 s` and [two](http://host/5ms) and [three](page-2s.md)", []),
        ("40 ms/step, 3 MiB/layer, -5 % slower and a 7 % loss", ["40 ms", "3 MiB", "-5 %", "7 %"]),
        ("a factor of 2.3 faster, found in 14 of 20 trials", ["factor of 2.3", "14 of 20"]),
        ("14 <!-- figure: a/b/c --> of 20 trials", []),
        ("one of four, 3-bit and 2-5 layers, part 2 of the text", []),
        ("It takes 12 ms <!-- constant: a limit --> and 13 ms", ["13 ms"]),
        ("It takes 12 ms and 13 ms <!-- figure: a/b/c -->", ["12 ms"]),
        ("It takes 12 <!-- figure: a/b/c --> ms, at 4 clients", []),
        ("<!-- 12 ms --> nothing shown", []),
        ("`<!-- constant: x -->` is a marker, 12 ms is not marked by it", ["12 ms"]),
    ],
)
def test_measured_numbers_without_a_marker_are_found(line: str, untraced: list[str]) -> None:
    assert find_untraced(line) == untraced


def test_numbers_under_a_unit_must_be_traced(tmp_path: Path) -> None:
    head = "| arm | batch | TPOT (ms) | tokens/s |\n|---|---|---|---|\n"
    text = head + "| a | 4 | 12 | 90 <!-- constant: no --> |\n| b | 8 | | - |\n"
    assert list_problems(tmp_path, text) == ["'12' is traced to no record; add a figure or a constant marker"]


@pytest.mark.parametrize(
    "text",
    [
        "    takes 12 ms\n",
        "```\n12 ms\n```\n",
        "~~~text\n12 ms\n```\n12 ms\n~~~\n",
        "- item\n\n  ```\n  12 ms\n  ```\n",
    ],
)
def test_code_is_not_looked_at(tmp_path: Path, text: str) -> None:
    assert list_problems(tmp_path, text) == []


def test_text_after_code_is_looked_at(tmp_path: Path) -> None:
    assert len(list_problems(tmp_path, "```\n1 ms\n```\n2 ms\n")) == 1
    # An indented line that continues a paragraph is no code.
    assert len(list_problems(tmp_path, "text\n    2 ms\n")) == 1


@pytest.mark.parametrize(
    ("selector", "value"),
    [
        ("decode/tpot/stock", 11.0),
        ("decode/tpot/pack", 5.5),
        ("decode/tpot/stock:pack", 2.0),
        ("decode/tpot/pack:stock", 0.5),
        ("decode/tpot/pack *1e-3", 0.0055),
        ("decode/tpot/stock:pack *100", 200.0),
    ],
)
def test_value_of_a_marker(selector: str, value: float) -> None:
    assert find_value(selector, make_records()) == pytest.approx(value)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("decode/tpot", "is not CASE/METRIC/ARM"),
        ("encode/tpot/pack", "no records of case 'encode'; did you mean 'decode'"),
        ("decode/ttft/pack", "no metric in decode/pack: 'ttft'"),
        ("decode/tpot/packs", "did you mean 'pack'"),
        ("decode/tpot/pack *fast", "factor 'fast' is no number"),
    ],
)
def test_a_marker_that_leads_nowhere_is_named(tmp_path: Path, selector: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_value(selector, make_records())
    assert len(list_problems(tmp_path, f"It takes 1 ms <!-- figure: {selector} -->\n")) == 1


def test_a_wrong_figure_is_found_and_refreshed(tmp_path: Path) -> None:
    text = (
        "It takes 5.4 <!-- figure: decode/tpot/pack --> ms, a ratio of 2.00 <!-- figure: decode/tpot/stock:pack -->.\n"
    )
    page = check_page(write_page(tmp_path, text), make_records())
    assert [problem.line for problem in page.problems] == [1]
    assert page.refreshed == text.replace("5.4", "5.5")
    assert list_problems(tmp_path, page.refreshed) == []


def test_markers_in_code_are_text_and_numbers_in_code_are_not_refreshed(tmp_path: Path) -> None:
    text = "It takes 5.5 ms with `--reps 5` <!-- figure: decode/tpot/pack -->, see `<!-- figure: a/b/c -->`.\n"
    assert list_problems(tmp_path, text) == []
    assert list_problems(tmp_path, "As `<!-- table: decode -->` shows.\n") == []


@pytest.mark.parametrize("text", ["none <!-- figure: decode/tpot/pack -->\n", "<!-- constant: nothing -->\n"])
def test_a_marker_without_a_number_is_a_problem(tmp_path: Path, text: str) -> None:
    assert "no number stands before" in list_problems(tmp_path, text)[0]


def test_a_constant_says_what_it_is(tmp_path: Path) -> None:
    assert "does not say what 5 is" in list_problems(tmp_path, "5 s <!-- constant: -->\n")[0]
    assert list_problems(tmp_path, "5 s <!-- constant: a time limit -->\n") == []


@given(st.floats(0.001, 1e6), st.integers(0, 6))
def test_a_figure_keeps_its_digits(value: float, decimals: int) -> None:
    text = f"{value:.{decimals}f}"
    assert write_like(text, value) == text
    assert write_like(f"{value:,.{decimals}f}", value).replace(",", "") == text


def test_a_table_is_rendered_from_the_records(tmp_path: Path) -> None:
    records = make_records()
    table = render_case_table(records, ["tpot"])
    text = f"before\n\n<!-- table: decode tpot -->\n{table}\n<!-- end of table -->\n\nafter 3 ms\n"
    problems = list_problems(tmp_path, text)
    assert problems == ["'3 ms' is traced to no record; add a figure or a constant marker"]
    stale = text.replace("5.500", "5.400")
    assert stale != text
    page = check_page(write_page(tmp_path, stale), records)
    assert [problem.text for problem in page.problems] == ["the records say: another table of decode", *problems]
    assert page.refreshed == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: decode -->\n| a |\n", "is not followed by <!-- end of table -->"),
        ("<!-- table: encode -->\n<!-- end of table -->\n", "no records of case 'encode'"),
        ("<!-- table: decode ttft -->\n<!-- end of table -->\n", "no metric 'ttft' in case decode"),
    ],
)
def test_a_table_that_leads_nowhere_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in list_problems(tmp_path, text)[0]


def test_command_line_refreshes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    for record in make_records():
        write_record(results, record)
    page = write_page(tmp_path, "It takes 9.9 <!-- figure: decode/tpot/pack --> ms.\n")
    options = [str(page), "--results", str(results)]
    assert figures.main(options) == 1
    assert f"{page}:1: the records say: It takes 5.5" in capsys.readouterr().out
    assert figures.main([*options, "--write"]) == 0
    assert "5.5 <!--" in page.read_text()


def test_every_figure_of_the_pages_is_traced() -> None:
    records = load_records(RESULTS)
    problems = [str(problem) for path in list_pages() for problem in check_page(path, records).problems]
    assert not problems, "\n".join(problems)


def test_the_pages_are_found(repository: Path) -> None:
    pages = {path.relative_to(repository).as_posix() for path in list_pages()}
    assert {"README.md", "docs/mxmoe.md", "docs/format.md"} <= pages
