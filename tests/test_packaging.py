# SPDX-License-Identifier: Apache-2.0
"""The source distribution and the wheel: what they hold, and that the plugin starts from the installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

from tests.child import run_child
from tests.clean_venv import make_clean_venv

#: Folder of the tree -> folder of the wheel.
PACKAGE_FOLDERS = {"vllm_ext": "vllm_ext", "kernels": "vllm_ext/kernels", "patches": "vllm_ext/patches"}
#: Made by tools, never part of the sources.
GENERATED = shutil.ignore_patterns(
    ".git", ".venv", ".venv-next", "build", "dist", "results", "__pycache__", "*.egg-info", "*.log",
    ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".benchmarks", ".carry",
)  # fmt: skip
LARGEST_WHEEL_FILE = 1 << 20


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: building writes into it."""
    return Path(shutil.copytree(repository, tmp_path_factory.mktemp("source") / "tree", ignore=GENERATED))


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source distribution and the wheel, which is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build_distributions(source, folder)
    return folder


def build_distributions(source: Path, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", *options, "--outdir", str(folder), str(source)]
    if int(metadata.version("setuptools").split(".")[0]) >= 77:
        command.insert(3, "--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    return next(distributions.glob("vllm_ext-*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel and nothing else of the pack."""
    return make_clean_venv(tmp_path_factory.mktemp("clean") / "venv", wheel)


def list_files(folder: Path) -> set[str]:
    """Paths of the files below `folder`, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_package_list_matches_the_tree(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join([installed.replace("/", "."), *path.parent.relative_to(repository / folder).parts])
        for folder, installed in PACKAGE_FOLDERS.items()
        for path in (repository / folder).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found


def test_wheel_holds_every_file_of_the_packages(source: Path, wheel: Path) -> None:
    expected = {
        f"{installed}/{name}" for folder, installed in PACKAGE_FOLDERS.items() for name in list_files(source / folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    held = {name for name in sizes if not name.split("/")[0].endswith(".dist-info")}
    assert held == expected
    assert "vllm_ext/py.typed" in held
    assert {name: size for name, size in sizes.items() if size > LARGEST_WHEEL_FILE} == {}


def test_wheel_names_its_licence_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        prefix = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        fields = Parser().parsestr(archive.read(f"{prefix}/METADATA").decode())
        notice = archive.read(f"{prefix}/licenses/NOTICE").decode()
        assert f"{prefix}/licenses/LICENSE" in archive.namelist()
    assert fields["License-Expression"] == "Apache-2.0"
    assert set(fields.get_all("Provides-Extra") or []) == {"vllm", "cpu", "bench", "dev", "triton"}
    assert "King James" in notice
    assert "Python Software Foundation" in notice


def test_source_distribution_is_the_tree(source: Path, distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("vllm_ext-*.tar.gz"))) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    # Written by setuptools into the archive; our own dot files of version control do not belong in it.
    made = {name for name in held if name == "PKG-INFO" or name == "setup.cfg" or ".egg-info/" in name}
    tree = {name for name in list_files(source) if ".egg-info/" not in name and name != ".gitignore"}
    assert held - made == tree


def test_stock_environment_does_not_see_the_pack(tmp_path: Path) -> None:
    """The other arm of the idle test: an environment made the same way, without the wheel."""
    python = make_clean_venv(tmp_path / "stock", wheel=None)
    child = run_child(
        """
import importlib.metadata as metadata, importlib.util as util, json
print(json.dumps({
    "pack": util.find_spec("vllm_ext") is not None,
    "vllm": util.find_spec("vllm") is not None,
    "points": [point.name for point in metadata.entry_points(group="vllm.general_plugins")],
    "distributions": [found.name for found in metadata.distributions() if found.name == "vllm-ext"],
}))""",
        python=str(python),
        PYTHONPATH=None,
    )
    assert child.value is not None, child.stderr
    assert child.value["vllm"] is True
    assert child.value["pack"] is False
    assert "vllm_ext" not in child.value["points"]
    assert child.value["distributions"] == []


def test_plugin_starts_from_the_wheel(clean_python: Path) -> None:
    child = run_child(
        """
import importlib, json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
import vllm_ext, vllm_ext.plugin
names = ["vllm_ext", "vllm_ext.kernels.mixed_moe", "vllm_ext.patches"]
print(json.dumps({
    "files": {name: importlib.import_module(name).__file__ for name in names},
    "registered": vllm_ext.plugin._registered,
    "mxmoe": "mxmoe" in QUANTIZATION_METHODS,
    "config": get_quantization_config("mxmoe").__module__,
}))""",
        python=str(clean_python),
        PYTHONPATH=None,
        VLLM_PLUGINS=None,
    )
    assert child.value is not None, child.stderr
    environment = clean_python.parent.parent
    for name, file in child.value["files"].items():
        assert Path(file).is_relative_to(environment / "lib"), f"{name} is imported from {file}"
    assert child.value["registered"] is True
    assert child.value["mxmoe"] is True
    assert child.value["config"] == "vllm_ext.quantization.config"


def test_doctor_runs_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    done = subprocess.run(
        [str(clean_python.parent / "vllm-ext"), "doctor", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == (1 if report["problems"] else 0), report
    assert report["plugin_loaded"] is True, report
    assert {patch["status"] for patch in report["patches"]} == {"match"}


@pytest.mark.slow
def test_a_wheel_with_kernels_needs_no_compiler(repository: Path, tmp_path: Path) -> None:
    """The steps of docs/cpu-kernels.md, "Images without a compiler"."""
    tree = Path(shutil.copytree(repository, tmp_path / "tree", ignore=GENERATED))
    (tmp_path / "plain").mkdir()
    build_distributions(tree, tmp_path / "plain", "--wheel")
    builder = make_clean_venv(tmp_path / "builder", next((tmp_path / "plain").glob("*.whl")))
    command = [str(builder), "-m", "vllm_ext.kernels.native.build", "--into-package"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    prebuilt = Path(done.stdout.strip()).parent
    assert prebuilt.is_relative_to(tmp_path / "builder")
    shutil.copytree(prebuilt, tree / "kernels" / "native" / "prebuilt")
    build_distributions(tree, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())

    python = make_clean_venv(tmp_path / "image", wheel)
    (tmp_path / "home").mkdir()
    child = run_child(
        """
import json
from vllm_ext.kernels.native.load import describe_kernels, load_ops
before = describe_kernels()
ops = load_ops()
print(json.dumps({"before": before, "isa": ops.isa() if ops else None}))""",
        python=str(python),
        PYTHONPATH=None, CXX="/nowhere/g++", PATH=str(python.parent), HOME=str(tmp_path / "home"),
        XDG_CACHE_HOME=None, VLLM_EXT_CACHE_DIR=None,
    )  # fmt: skip
    assert child.value is not None, child.stderr
    assert child.value["before"]["status"] == "ready"
    assert child.value["before"]["reason"].startswith("in the package")
    assert child.value["isa"]
    assert list_files(tmp_path / "home") == set()
