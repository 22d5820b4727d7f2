# SPDX-License-Identifier: Apache-2.0
"""Static check of every patch record against a vLLM source tree, without importing vLLM.

    python -m vllm_ext.patches.check [--root .../site-packages/vllm] [--json]

`--root` may be an installed, an unpacked (wheel) or a checked-out vLLM package directory; by default the
installed one. Exit code 1 when a symbol is absent or has another signature.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from . import registry, signature


@dataclass(frozen=True)
class CheckedSymbol:
    """Outcome for one symbol of one record; `reason` is the found signature and its digest, or what is missing."""

    record: str
    feature: str
    target: str
    status: Literal["match", "mismatch", "absent"]
    reason: str


def find_installed_root() -> Path | None:
    """Package directory of the installed vLLM, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def check_records(root: Path) -> list[CheckedSymbol]:
    """Compare every symbol of every record with the source under `root` (the `vllm` package directory)."""
    results = []
    for record in registry.RECORDS:
        for symbol in record.symbols:
            try:
                found = signature.read_source_signature(root, symbol.target)
            except signature.SymbolAbsentError as error:
                results.append(CheckedSymbol(record.name, record.feature, symbol.target, "absent", str(error)))
                continue
            digest = signature.compute_digest(found)
            status: Literal["match", "mismatch"] = "match" if digest == symbol.digest else "mismatch"
            results.append(CheckedSymbol(record.name, record.feature, symbol.target, status, f"{found} {digest}"))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Command line of the check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vllm_ext.patches.check", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="vllm package directory (default: the installed one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    options = parser.parse_args(arguments)
    root = options.root or find_installed_root()
    if root is None or not (root / "__init__.py").is_file():
        parser.error(f"no vllm package at {root}; give --root .../site-packages/vllm")
    results = check_records(root)
    if options.json:
        print(json.dumps({"patches": [asdict(result) for result in results]}))
    else:
        _print_table(results)
    return 0 if all(result.status == "match" for result in results) else 1


def _print_table(results: list[CheckedSymbol]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("patch", "feature", "symbol", "status", "found", title="vLLM symbols the pack patches")
    for column in table.columns:
        column.overflow = "fold"
    for result in results:
        style = "green" if result.status == "match" else "red"
        table.add_row(
            result.record, result.feature, result.target, f"[{style}]{result.status}[/{style}]", result.reason
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
