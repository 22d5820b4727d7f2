# SPDX-License-Identifier: Apache-2.0
"""A fresh virtual environment with the same vLLM and torch as this one, and the pack only when asked for.

Installing vLLM takes minutes, so the new environment sees this one's packages through links. Not through the
whole site-packages folder: that holds the pack's own metadata, and vLLM would find its entry point there.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def make_clean_venv(path: Path, wheel: Path | None) -> Path:
    """Create an environment at `path`, with `wheel` installed in it when given; returns its Python executable.

    All distributions of the running environment are importable in it, except vllm-ext.
    Raises subprocess.CalledProcessError, with the output in its notes, when venv or pip fails.
    """
    _run([sys.executable, "-m", "venv", "--without-pip", str(path)])
    python = path / "bin" / "python"
    site_packages = path / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    borrowed = path / "borrowed"
    borrowed.mkdir()
    for folder in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}:
        for entry in _list_borrowed(folder):
            (borrowed / entry.name).symlink_to(entry)
    # A folder added by a .pth file has its own .pth files ignored, which keeps editable installs out.
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    if wheel is not None:
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        _run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)])
    return python


def _list_borrowed(site_packages: Path) -> Iterator[Path]:
    """Everything in `site_packages` but the pack: its package, its metadata and its editable finder."""
    for entry in site_packages.iterdir():
        if not entry.name.removeprefix("__editable__").lstrip("._").startswith("vllm_ext"):
            yield entry


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        error = subprocess.CalledProcessError(done.returncode, command)
        error.add_note(done.stdout + done.stderr)
        raise error
