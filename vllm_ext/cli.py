# SPDX-License-Identifier: Apache-2.0
"""The `vllm-ext` command. Exit codes: 0 ok, 1 failed, 2 bad usage. `--json` prints one object on the last line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_ext import __version__


def make_parser() -> argparse.ArgumentParser:
    """The command line; each command's module adds its own arguments and is imported only when it runs."""
    parser = argparse.ArgumentParser(prog="vllm-ext", description="Tools of the vllm-ext extension pack.")
    parser.add_argument("--version", action="version", version=f"vllm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is active, what fits this vLLM, what does not and why")
    doctor.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    doctor.add_argument("--server", metavar="URL", help="also read the pack's metrics of a running vLLM server")
    doctor.add_argument(
        "--fix", action="store_true", help="install what is missing for the `vllm` command on the CPU wheel"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (argparse exits with 2 on bad usage)."""
    options = make_parser().parse_args(arguments)
    if options.command == "doctor":
        from vllm_ext import doctor

        return doctor.run(as_json=options.json, server=options.server, fix=options.fix)
    raise AssertionError(f"command {options.command} is parsed but not handled")


if __name__ == "__main__":
    sys.exit(main())
