# SPDX-License-Identifier: Apache-2.0
"""Trace every measured figure of a Markdown page to benchmark records.

    python -m bench.figures [--write] [FILE...]

checks README.md and docs/*.md (or the files given); `--write` brings figures and tables up to the records. Markers are
HTML comments, invisible on the rendered page:

    24.36 <!-- figure: demo/perplexity_kjv/mxmoe -->       median of a metric over an arm's repetitions: CASE/METRIC/ARM
    1.31 <!-- figure: decode/tpot/stock:pack -->           paired ratio of the second arm to the first; above 1: better
    0.84 <!-- figure: decode/latency/pack *1e-3 -->        times a factor: here us as ms
    30 s <!-- constant: a time limit -->                   a number that nobody measured, and what it is

    <!-- table: decode tpot,ttft -->
    (the comparison of the case, of these metrics or all, as bench/results/README.md has it)
    <!-- end of table -->

A marker belongs to the last number before it on its line. The number keeps its digits: it must equal the record's,
rounded to as many. Numbers with a unit of time, rate, size or ratio, and numbers in a table's column whose head has
such a unit, must have a marker. Code, links and comments are not looked at.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench.comparison import compare_arms, find_arm_values, find_case
from bench.records import RESULTS, ROOT, Record, load_records
from bench.tables import render_case_table

NUMBER = r"(?<![\w.,/:-])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
UNITS = (
    r"(?:\s?(?:ns|us|µs|ms|s|sec(?:onds?)?|min(?:utes?)?|hours?|h"
    r"|[KMGT]i?B(?:/s)?|bytes|[GT]FLOPS|tok(?:ens)?(?:/s| per second)|requests?(?:/s| per second)"
    r"|times|%|percent)|[x\N{MULTIPLICATION SIGN}])"
)
FRACTION = r"(?<![\w.,/:-])-?\d+\.\d+"
#: A number with its unit: "1.7x", "-12 ms", "40 ms/step"; bits where there is a fraction of one; a count of trials, as
#: "14 of 20". The unit ends with its word ("12 streams" is none) and x has no space before it ("8 x 4" is a product).
MEASURED = re.compile(
    rf"({NUMBER}){UNITS}(?![\w-])(?!/\d)|({FRACTION})\s?bits?(?![\w/-])|({NUMBER}) (?:out )?of {NUMBER}(?![\w/-])"
)
#: Words of quality that stand before their number.
NAMED = re.compile(
    rf"\b(?:perplexity|perplexities|speed-?up|ratio|factor of)\b[^.;|\d]{{0,24}}?({NUMBER})(?![\w/-])", re.IGNORECASE
)
#: A table's head that makes numbers of its column figures.
MEASURED_HEAD = re.compile(
    rf"(?:^|[\s(,]){UNITS}(?:$|[\s),])|\bbits\b|perplexity|latency|throughput|speed-?up|\bratio\b|TTFT|TPOT",
    re.IGNORECASE,
)
MARKER = re.compile(r"<!--\s*(figure|constant):\s*(.*?)\s*-->")
FIGURE = re.compile(
    r"(?P<case>[^/\s]+)/(?P<metric>[^/\s]+)/(?P<arm>[^/:\s]+)(?::(?P<other>[^/:\s]+))?(?:\s*\*(?P<factor>\S+))?"
)
TABLE = re.compile(r"<!--\s*table:\s*(\S+)(?:\s+(\S+))?\s*-->")
TABLE_END = "<!-- end of table -->"


@dataclass(frozen=True)
class Problem:
    """What is wrong at a line of a page."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Page:
    """A page as it is, as the records would have it, and what is wrong with it."""

    text: str
    refreshed: str
    problems: list[Problem]


def check_page(
    path: Path, records: Sequence[Record], render: Callable[[Sequence[Record], Sequence[str]], str] = render_case_table
) -> Page:
    """Compare the figures of one page with the records.

    `render(records of one case, metrics, or none for all)` gives the text of a table, without a line break at the end.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    code = _find_code(lines)
    columns = _find_measured_columns(lines, code)
    problems: list[Problem] = []
    refreshed: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        try:
            if number in code:
                new, used = [line], 1
            elif table := TABLE.search(_hide_code(line)):
                new, used = _refresh_table(table, lines[number:], records, render)
            else:
                problems += [
                    Problem(path, number + 1, f"{found!r} is traced to no record; add a figure or a constant marker")
                    for found in find_untraced(line, columns.get(number, ()))
                ]
                new, used = [_refresh_line(line, records)], 1
        except ValueError as error:
            problems.append(Problem(path, number + 1, str(error)))
            new, used = [line], 1
        if new != lines[number : number + used]:
            said = new[0].strip() if used == 1 else f"another table of {table[1] if table else ''}"
            problems.append(Problem(path, number + 1, f"the records say: {said}"))
        refreshed += new
        number += used
    return Page(text, "\n".join(refreshed) + "\n", problems)


def find_untraced(line: str, measured_columns: Sequence[int] = ()) -> list[str]:
    """Figures of a line without a marker, as they are written; in `measured_columns` of a table row, every number."""
    plain = _hide_code(line)
    markers = [match.span() for match in MARKER.finditer(plain)]
    plain = re.sub(r"<!--.*?-->", lambda match: "\0" * len(match[0]), plain)
    found = {match.start(match.lastindex or 0): match[0] for match in MEASURED.finditer(plain)}
    found |= {match.start(1): match[0] for match in NAMED.finditer(plain)}
    for column, (start, cell) in enumerate(_split_row(plain)):
        if column in measured_columns:
            found |= {start + match.start(): match[0] for match in re.finditer(NUMBER, cell)}
    every = sorted({match.start() for match in re.finditer(NUMBER, plain)} | found.keys())
    untraced = []
    for position, text in sorted(found.items()):
        following = next((other for other in every if other > position), len(line))
        if not any(position < start < following for start, _ in markers):
            untraced.append(text.strip())
    return untraced


def find_value(selector: str, records: Sequence[Record]) -> float:
    """The value of `CASE/METRIC/ARM`, `CASE/METRIC/ARM:OTHER`, with or without ` *FACTOR`.

    Raises ValueError naming the part that the records do not have.
    """
    parts = FIGURE.fullmatch(selector)
    if parts is None:
        raise ValueError(f"{selector!r} is not CASE/METRIC/ARM, CASE/METRIC/ARM:OTHER, or one of them with *FACTOR")
    mine = find_case(records, parts["case"])
    if parts["other"] is None:
        value = find_arm_values(mine, parts["metric"], parts["arm"]).median
    else:
        value = compare_arms(mine, parts["metric"], parts["arm"], parts["other"]).ratio
    try:
        return value * float(parts["factor"] or 1)
    except ValueError:
        raise ValueError(f"{selector!r}: the factor {parts['factor']!r} is no number") from None


def write_like(text: str, value: float) -> str:
    """`value` with as many decimals and thousands separators as the number `text`."""
    decimals = len(text.partition("e")[0].partition(".")[2])
    return f"{value:{',' if ',' in text else ''}.{decimals}{'e' if 'e' in text else 'f'}}"


def _refresh_table(
    table: re.Match[str],
    lines: Sequence[str],
    records: Sequence[Record],
    render: Callable[[Sequence[Record], Sequence[str]], str],
) -> tuple[list[str], int]:
    """(lines as the records have them, lines of the page) from a table's marker to its end."""
    end = next((number for number, line in enumerate(lines) if line.strip() == TABLE_END), None)
    if end is None:
        raise ValueError(f"{table[0]} is not followed by {TABLE_END}")
    metrics = table[2].split(",") if table[2] else []
    rendered = render(find_case(records, table[1]), metrics).split("\n")
    return [lines[0], *rendered, lines[end]], end + 1


def _refresh_line(line: str, records: Sequence[Record]) -> str:
    plain = _hide_code(line)
    position = 0
    parts = []
    for marker in MARKER.finditer(plain):
        numbers = list(re.finditer(NUMBER, plain[position : marker.start()]))
        if not numbers:
            raise ValueError(f"no number stands before {marker[0]}")
        last = numbers[-1]
        start, end = position + last.start(), position + last.end()
        if marker[1] == "figure":
            value = write_like(last[0], find_value(marker[2], records))
        elif marker[2]:
            value = last[0]
        else:
            raise ValueError(f"{marker[0]} does not say what {last[0]} is")
        parts += [line[position:start], value, line[end : marker.end()]]
        position = marker.end()
    return "".join(parts) + line[position:]


def _hide_code(line: str) -> str:
    """The line with spaces for inline code, targets of links and addresses, so that positions stay."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", lambda match: " " * len(match[0]), line)


def _find_code(lines: Sequence[str]) -> set[int]:
    """Lines of fenced and of indented code blocks, the fences included."""
    code: set[int] = set()
    fence = ""
    for number, line in enumerate(lines):
        opening = re.match(r"\s*(```+|~~~+)", line)
        if fence:
            code.add(number)
            if opening and opening[1].startswith(fence) and line.strip() == opening[1]:
                fence = ""
        elif opening:
            fence = opening[1]
            code.add(number)
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip() or number - 1 in code):
            code.add(number)
    return code


def _find_measured_columns(lines: Sequence[str], code: set[int]) -> dict[int, list[int]]:
    """For each row of a table: the columns whose head names a unit."""
    columns: dict[int, list[int]] = {}
    measured: list[int] = []
    for number, line in enumerate(lines):
        if number in code or not line.lstrip().startswith("|"):
            measured = []
        elif re.fullmatch(r"[\s|:-]+", line) and number > 0:
            head = _split_row(lines[number - 1])
            measured = [column for column, (_, cell) in enumerate(head) if MEASURED_HEAD.search(cell)]
        elif measured:
            columns[number] = measured
    return columns


def _split_row(line: str) -> list[tuple[int, str]]:
    """(position, text) of the cells of a table row; nothing for another line."""
    if not line.lstrip().startswith("|"):
        return []
    bars = [match.start() for match in re.finditer(r"(?<!\\)\|", line)]
    return [(start + 1, line[start + 1 : end]) for start, end in pairwise(bars)]


def list_pages(root: Path = ROOT) -> list[Path]:
    """The pages whose figures must be traced: README.md and docs/*.md."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exit codes: 0 ok, 1 a figure is not traced, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description="Trace figures of pages to records.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: README.md and docs/*.md")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--write", action="store_true", help="bring figures and tables up to the records")
    options = parser.parse_args(argv)
    records = load_records(options.results)
    problems: list[Problem] = []
    for path in options.files or list_pages():
        page = check_page(path, records)
        if options.write and page.refreshed != page.text:
            path.write_text(page.refreshed, encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)
            page = check_page(path, records)
        problems += page.problems
    print("\n".join(map(str, problems)), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
