# SPDX-License-Identifier: Apache-2.0
"""What has to be seen on a GPU of the Triton kernels, in parts of eight minutes at most.

    python -m bench.kernels.gpu --part NAME [--out DIR] [--minutes 8] [--dry-run]
    python -m bench.kernels.gpu --store FILE...

    reference   every scheme with the inline PTX against the reference in float32
    graphs      CUDA graphs replayed with other inputs; the same call again and again
    engine      a small MoE served with Model Runner V2 and CUDA graphs, beside eager, the reference and a CPU
    sanitizer   compute-sanitizer's tools on small sizes
    decode      variants of the tile for few tokens beside each other
    stock       vLLM's bf16 Triton MoE and Marlin beside ours
    roofline    bytes and operations against what the GPU can do
    semipd      two lanes in an engine: answers, overlap, times between tokens, objectives by rate

A part writes `gpu_NAME.json` (records as bench/records.py has them, what was left out, what needs CUDA) and
`gpu_NAME.png` into DIR. The JSON is written again after every record, so that a part that is ended keeps what it had.
Time over, it begins nothing new, and lists what it left out. `--dry-run` goes through a part at tiny sizes in Triton's
interpreter (`engine` and `semipd`: in vLLM's CPU engine), on a CPU; its times mean nothing, and it says what it cannot
run. `--store` puts the records of such files into bench/results. bench/gpu_all.py runs all parts.

Exit codes: 0 ok, 1 something failed or was wrong, 2 bad usage, 3 nothing failed and something was left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.records import RESULTS, parse_record, write_record

if TYPE_CHECKING:
    from bench.kernels.gpu_parts.common import Result

PARTS = ("reference", "graphs", "engine", "sanitizer", "decode", "stock", "roofline", "semipd")
#: Where a part is that is not in gpu_parts.
ELSEWHERE = {"semipd": "bench.serve.gpu_semipd"}
MINUTES = 8.0

#: The exit code where nothing failed and time did not suffice for all.
LEFT_OUT = 3


class Ended(NamedTuple):
    """What is to be said of a part: its failed arms with their errors, and those that it left out."""

    failed: list[str]
    left_out: list[str]


class PartFile:
    """The JSON file of a part that runs."""

    def __init__(self, path: Path, is_dry_run: bool) -> None:
        self._path = path
        self._is_dry_run = is_dry_run
        self._records: list[str] = []

    def write(self, result: Result, is_complete: bool = False) -> None:
        """Write all that a part has found so far. Its earlier records must be those of the last call."""
        # Only those that are new are converted, which for hundreds of them is a good part of a second.
        new: dict[str, Any] = replace(result, records=result.records[len(self._records) :]).to_json(self._is_dry_run)
        self._records += [json.dumps(record, allow_nan=False) for record in new.pop("records")]
        head = json.dumps({"complete": is_complete, **new}, indent=1).removesuffix("\n}")
        records = ",\n".join(self._records)
        # Never half a file: the process may be ended at any moment.
        written = self._path.with_suffix(".part")
        written.write_text(f'{head},\n "records": [\n{records}\n]\n}}\n', encoding="utf-8")
        os.replace(written, self._path)


def run_part(name: str, out: Path, minutes: float = MINUTES, is_dry_run: bool = False) -> Ended:
    """Run a part and write its two files. Raises RuntimeError without a GPU, but for a dry run."""
    if is_dry_run:
        # Triton reads it when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from vllm_ext.kernels.gpu import launch

    if is_dry_run != launch.IS_INTERPRETED:
        raise RuntimeError(
            "a dry run needs Triton's interpreter, and nothing else does: TRITON_INTERPRET, set too late?"
        )
    if not is_dry_run and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA GPU here; --dry-run goes through everything on a CPU")
    from bench.kernels.gpu_parts.common import Context, draw

    # Half a minute for what is under way when time is over, and for the plot.
    deadline = time.monotonic() + 60 * minutes - 30
    context = Context(torch.device("cpu" if is_dry_run else "cuda"), is_dry_run, deadline)
    out.mkdir(parents=True, exist_ok=True)
    file = PartFile(out / f"gpu_{name}.json", is_dry_run)
    with observe_records(file.write):
        result = importlib.import_module(ELSEWHERE.get(name, f"bench.kernels.gpu_parts.{name}")).run(context)
    file.write(result, is_complete=True)
    draw(result, out / f"gpu_{name}.png")
    failed = [f"{record.case} {record.arm}: {record.error}" for record in result.records if record.status == "failed"]
    return Ended(failed, result.left_out)


@contextmanager
def observe_records(observer: Callable[[Result], None]) -> Iterator[None]:
    """Have `observer` called with a part's result after every record that is added to it."""
    from bench.kernels.gpu_parts.common import Result

    add = Result.add

    def add_and_tell(result: Result, *arguments: Any, **settings: Any) -> None:
        add(result, *arguments, **settings)
        observer(result)

    Result.add = add_and_tell  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Result.add = add  # type: ignore[method-assign]


def store_records(files: Sequence[Path], results: Path = RESULTS) -> int:
    """Put the records of parts' files into a folder of results; returns how many.

    Raises ValueError for a file of a dry run, whose times mean nothing, and for one that no part wrote.
    """
    stored = 0
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        # gpu_all.json holds the files of parts, by part; those that did not run have no records.
        parts = [content] if "records" in content else [part for part in content.values() if "records" in part]
        if not parts or any(part["dry_run"] for part in parts):
            raise ValueError(f"{path} is no file of a run on a GPU")
        for record in [record for part in parts for record in part["records"]]:
            write_record(results, parse_record(record))
            stored += 1
    return stored


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.gpu", description="What must be seen on a GPU.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--part", choices=PARTS)
    action.add_argument("--store", nargs="+", type=Path, metavar="FILE", help="put records into bench/results")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    options = parser.parse_args(argv)
    if options.store:
        print(f"{store_records(options.store)} records", file=sys.stderr)
        return 0
    try:
        ended = run_part(options.part, options.out, options.minutes, options.dry_run)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(options.out / f"gpu_{options.part}.json")
    # Failures last: bench/gpu_all.py keeps the end.
    for text in ended.left_out:
        print(f"left out, there was no time: {text}", file=sys.stderr)
    for text in ended.failed:
        print(f"failed: {text}", file=sys.stderr)
    if ended.failed:
        return 1
    return LEFT_OUT if ended.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
