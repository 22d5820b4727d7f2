# SPDX-License-Identifier: Apache-2.0
"""The quality table: perplexity, divergence and experts changed, by method and true bits.

    python -m bench.quality [--quick] [--out DIR] [--seeds 0,1] [--engine] [--work DIR]

Each cell is a packed checkpoint of the shipped model, scored on the whole held-out texts of both domains, and becomes a
record in bench/results/quality the moment it is done. Cells that have a record of the same arguments are not run again
(records of other code are named); one that was killed goes on where it stopped. At the end the page and its plot are
written. `--engine` measures one checkpoint of every row
through `vllm-ext eval` too, on the first windows of a text, and records the difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality.cells import BF16, FIRST_SEED, TEXTS, Cell, list_cells
from bench.quality.figures import write_page
from bench.quality.score import Reference, Score, score_checkpoint
from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, read_record, record_path, write_record

CASE = "quality"
MODEL = ROOT / "bench" / "models" / "tiny_moe"
CONTEXT = 512
QUICK_WINDOWS = 8
#: What is measured through the engine too: one checkpoint of every row and one with rounded activations, on the first
#: windows of one text.
ENGINE_ARMS = ("rtn_2.5", "gptq_2.5", "gptaq_2.5", "mxmoe_2.5", "mxmoe_wide_2.5", "ours_2.5", "ours_5a8")
ENGINE_TEXT, ENGINE_WINDOWS = "kjv", 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no record yet and write the page; returns the exit code."""
    options = _parse(argv)
    out, work = options.out, options.work
    windows = QUICK_WINDOWS if options.quick else None
    cells = list(list_cells(options.seeds, options.quick))
    if options.only:
        cells = [cell for cell in cells if cell.arm in options.only]
    missing = [cell for cell in cells if not _has_record(out, cell.arm, cell.seed, windows, cell.describe())]
    _warn_of_other_code(out, cells)
    print(f"quality: {len(cells)} cells, {len(missing)} to run", file=sys.stderr)
    references: dict[str, Reference] = {}
    if missing or not _has_record(out, BF16, 0, windows):
        references = _make_references(work, windows)
        _write(out, BF16, 0, {name: one.score() for name, one in references.items()}, {}, {"windows": windows})
    for number, cell in enumerate(missing, start=1):
        if _has_record(out, cell.arm, cell.seed, windows, cell.describe()):
            continue  # another process with the same folder has done it meanwhile
        print(f"quality: {number} of {len(missing)}: {cell.arm}, seed {cell.seed}", file=sys.stderr)
        run_cell(cell, out, work, references, windows)
        write_page(out)
    if options.engine:
        for cell in cells:
            known = _has_record(out, cell.arm, cell.seed, windows, cell.describe())
            if cell.seed == FIRST_SEED and cell.arm in ENGINE_ARMS and known:
                cross_check(cell, out, work)
    write_page(out)
    return 0


def run_cell(cell: Cell, out: Path, work: Path, references: dict[str, Reference], windows: int | None = None) -> None:
    """Quantize, score, and write the record."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        directory = Path(folder) / "model"
        report = quantize_cell(cell, directory, work)
        metrics = {
            "bits": Metric(report.planned.bits_per_weight, "bits"),
            "quantized_bytes": Metric(report.planned.quantized_bytes, "bytes"),
        }
        settings: dict[str, Any] = {
            "windows": windows,
            "arguments": cell.describe(),
            "plan": report.planned.plan.sha256,
            "chosen": report.planned.chosen,
            "measure": report.planned.measure,
            "gap": report.planned.gap,
            "notes": list(report.planned.notes),
        }
        if (comparison := report.planned.comparison) is not None:
            settings["comparison"] = comparison.to_json()
        if (repair := report.repair) is not None:
            settings["router_repair"] = repair.to_json()
            metrics["changed_before_repair_held_out"] = Metric(100 * repair.changed_before, "%")
            metrics["changed_after_repair_held_out"] = Metric(100 * repair.changed_after, "%")
        _write(out, cell.arm, cell.seed, score_checkpoint(directory, references), metrics, settings)


def quantize_cell(cell: Cell, directory: Path, work: Path) -> Any:
    """The checkpoint of a cell; returns the report of `quantize_model`."""
    from vllm_ext.compress.quantize import quantize_model

    return quantize_model(MODEL, directory, work=work / "stages", **cell.arguments(MODEL))


def cross_check(cell: Cell, out: Path, work: Path) -> None:
    """Add the engine's perplexity of the first windows to a cell's record, and that of `score` on the same windows."""
    from vllm_ext.evaluate import evaluate_model

    record = read_record(record_path(out.parent, out.name, cell.arm, cell.seed))
    if f"engine_perplexity_{ENGINE_TEXT}" in record.metrics:
        return
    references = {ENGINE_TEXT: _make_references(work, ENGINE_WINDOWS)[ENGINE_TEXT]}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        directory = Path(folder) / "model"
        quantize_cell(cell, directory, work)
        simulated = score_checkpoint(directory, references)[ENGINE_TEXT].perplexity
        text = MODEL / TEXTS[ENGINE_TEXT][1]
        found = evaluate_model(directory, text, context=CONTEXT, windows=ENGINE_WINDOWS).perplexity
    record.metrics[f"engine_perplexity_{ENGINE_TEXT}"] = Metric(found, "")
    record.metrics[f"engine_difference_{ENGINE_TEXT}"] = Metric(100 * (found / simulated - 1), "%")
    write_record(out.parent, record)


def _make_references(work: Path, windows: int | None) -> dict[str, Reference]:
    from vllm_ext.compress.calibration import cut_windows, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    return {
        name: Reference(MODEL, cut_windows(MODEL / held, tokenizer, CONTEXT)[:windows], work / "references")
        for name, (_, held) in TEXTS.items()
    }


def _write(
    out: Path,
    arm: str,
    seed: int,
    scores: dict[str, Score],
    metrics: dict[str, Metric],
    settings: dict[str, Any],
) -> None:
    found = dict(metrics)
    for name, score in scores.items():
        found[f"perplexity_{name}"] = Metric(score.perplexity, "")
        found[f"divergence_{name}"] = Metric(score.divergence, "nats")
        found[f"changed_{name}"] = Metric(100 * score.changed, "%")
        found[f"tokens_{name}"] = Metric(score.tokens, "")
    record = Record(
        CASE, arm, seed, found, seed=seed,
        settings={"stock_arm": BF16, "context": CONTEXT, "model": "bench/models/tiny_moe", **settings},
        **describe_environment(),
    )  # fmt: skip
    path = write_record(out.parent, record)
    assert path.parent == out


def _has_record(out: Path, arm: str, seed: int, windows: int | None, arguments: dict[str, Any] | None = None) -> bool:
    """Whether there is a record of this cell, made with the same windows and the same arguments."""
    path = record_path(out.parent, out.name, arm, seed)
    if not path.is_file():
        return False
    record = read_record(path)
    made_with = record.settings["windows"], record.settings.get("arguments")
    return record.status == "ok" and made_with == (windows, arguments)


def _warn_of_other_code(out: Path, cells: Sequence[Cell]) -> None:
    """One line for the cells whose record is kept though it was made from another state of the code."""
    now = describe_environment()["git_hash"]
    paths = [record_path(out.parent, out.name, cell.arm, cell.seed) for cell in cells]
    others = [path.stem for path in paths if path.is_file() and read_record(path).git_hash != now]
    if others:
        print(
            f"quality: {len(others)} of {len(cells)} cells have records of other code than {now}, delete those that it "
            f"changes: {', '.join(others)}",
            file=sys.stderr,
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="The quality table.")
    parser.add_argument("--quick", action="store_true", help="two methods, one budget, few windows")
    parser.add_argument("--out", type=Path, help=f"folder of the records, named {CASE!r}")
    parser.add_argument("--seeds", default="0,1", type=lambda text: tuple(int(part) for part in text.split(",")))
    parser.add_argument("--only", action="append", help="cells to run, by name; may be repeated")
    parser.add_argument("--engine", action="store_true", help="cross-check one checkpoint of every row in the engine")
    parser.add_argument("--work", type=Path, help="where unfinished work is kept; default: in the temporary folder")
    options = parser.parse_args(argv)
    default = Path(tempfile.gettempdir()) / "vllm-ext-quality" if options.quick else RESULTS
    options.out = options.out or default / CASE
    if options.out.name != CASE:
        parser.error(
            f"--out must be a folder named {CASE!r}, got {options.out.name!r}: records lie in CASE/ARM-SEED.json"
        )
    options.work = options.work or Path(tempfile.gettempdir()) / "vllm-ext-quality-work"
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
