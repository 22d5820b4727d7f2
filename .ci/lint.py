# SPDX-License-Identifier: Apache-2.0
"""Run ruff and mypy over the tree; exit code 1 when either finds something.

mypy knows modules by their folders, and `kernels/` and `patches/` install as `vllm_ext.kernels` and
`vllm_ext.patches`. So it reads a tree of symbolic links, build/lint, that looks like the installed package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHADOW = ROOT / "build" / "lint"


def build_shadow(root: Path, shadow: Path) -> dict[str, str]:
    """Link the sources under their installed names; returns {folder in the shadow: folder in the tree}."""
    if shadow.exists():
        shutil.rmtree(shadow)
    shadow.mkdir(parents=True)
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["package-dir"]
    nested = {name for name in packages if "." in name}
    folders = {}
    for name, folder in packages.items():
        place = shadow.joinpath(*name.split("."))
        folders[str(place.relative_to(root))] = folder
        if any(other.startswith(f"{name}.") for other in nested):
            # Others are linked into it, so it is a real folder and its entries are the links.
            place.mkdir(parents=True)
            for entry in (root / folder).iterdir():
                if entry.name != "__pycache__":
                    (place / entry.name).symlink_to(entry)
        else:
            place.symlink_to(root / folder)
    if any((root / "bench").rglob("*.py")):
        (shadow / "bench").symlink_to(root / "bench")
        folders[str((shadow / "bench").relative_to(root))] = "bench"
    return folders


def run_mypy() -> int:
    """mypy over the package under its installed names, bench and .ci; paths are shown as they are in the tree."""
    folders = build_shadow(ROOT, SHADOW)
    tops = sorted(str(entry.relative_to(ROOT)) for entry in SHADOW.iterdir())
    command = [sys.executable, "-m", "mypy", "--explicit-package-bases", *tops]
    command += [str(path.relative_to(ROOT)) for path in sorted((ROOT / ".ci").glob("*.py"))]
    search = os.pathsep.join(["build/lint", ".ci"])
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MYPYPATH": search}, capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    for place in sorted(folders, key=len, reverse=True):
        output = output.replace(f"{place}/", f"{folders[place]}/")
    print(output, end="", flush=True)
    return result.returncode


def main() -> int:
    """All checks, each to its end, so that one run shows everything."""
    ruff = [sys.executable, "-m", "ruff"]
    failed = []
    for command in ([*ruff, "check", "."], [*ruff, "format", "--check", "."]):
        print("$ ruff", *command[3:], flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            failed.append(f"ruff {command[3]}")
    print("$ mypy", flush=True)
    if run_mypy() != 0:
        failed.append("mypy")
    if failed:
        print(f"lint failed: {', '.join(failed)} (`ruff format .` and `ruff check --fix .` mend most)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
