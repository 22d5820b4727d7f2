# SPDX-License-Identifier: Apache-2.0
"""Command line of `bench.workloads`; see the package's docstring."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.workloads.prepare import WORKLOADS, list_options, prepare_workload


def main(argv: Sequence[str] | None = None) -> int:
    """Write one workload and print the client's options. Exit codes: 0 ok, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.workloads", description="Make requests for a benchmark.")
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--num-requests", type=int, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the file (default: here)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the workload; values are YAML"
    )
    options = parser.parse_args(argv)
    settings: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(
                f"--set {text}: expected OPTION=VALUE; options: {', '.join(sorted(list_options(options.name)))}"
            )
        settings[name] = yaml.safe_load(value)
    try:
        workload = prepare_workload(
            options.name,
            options.out,
            options.tokenizer,
            num_requests=options.num_requests,
            seed=options.seed,
            options=settings,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    environment = [f"{name}={value}" for name, value in workload.environment.items()]
    print(" ".join([*environment, "vllm bench serve", shlex.join(workload.client_args)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
