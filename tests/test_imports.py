# SPDX-License-Identifier: Apache-2.0
"""Who may import whom (DESIGN, "The house"), read from the source of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child import run_child

#: Folder -> top-level names or dotted prefixes that nothing below it may import.
FORBIDDEN = {
    "kernels": ("vllm", "vllm_ext", "transformers"),
    "vllm_ext/compress": ("vllm",),
    "vllm_ext/speculation": ("vllm", "transformers"),
    "vllm_ext/scheduling/phases": ("vllm", "transformers"),
}
#: Features meet in scheduling/factory.py and config.py, never in each other.
FEATURE_FOLDERS = ("quantization", "kv_cache", "speculation", "structured")


def list_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def list_imports(repository: Path, path: Path) -> Iterator[str]:
    """Absolute names imported anywhere in a file, imports inside functions and relative ones included."""
    package = name_package(repository, path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                origin = f"{parent}.{origin}".rstrip(".")
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def name_package(repository: Path, path: Path) -> str:
    """Installed name of the package a file belongs to: kernels/x.py is in vllm_ext.kernels."""
    parts = path.parent.relative_to(repository).parts
    return ".".join(("vllm_ext", *parts) if parts[0] in ("kernels", "patches") else parts)


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layers(repository: Path, folder: str) -> None:
    # The package imports itself by relative names, or by its installed name.
    own = "vllm_ext.kernels" if folder == "kernels" else "vllm_ext"
    for path in list_sources(repository / folder):
        for name in list_imports(repository, path):
            if folder == "kernels" and is_below(name, own):
                continue
            broken = [prefix for prefix in FORBIDDEN[folder] if is_below(name, prefix)]
            assert not broken, f"{path.relative_to(repository)} imports {name}"


def test_relative_imports_are_resolved(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels" / "op"
    folder.mkdir(parents=True)
    source = folder / "file.py"
    source.write_text("from . import a\nfrom .. import b\nfrom ..c import d\nfrom ...quantization import scheme\n")
    assert list(list_imports(tmp_path, source)) == [
        "vllm_ext.kernels.op.a", "vllm_ext.kernels.b", "vllm_ext.kernels.c.d", "vllm_ext.quantization.scheme",
    ]  # fmt: skip


def test_kernels_and_compress_load_without_vllm(repository: Path) -> None:
    """The same in a running interpreter: what they import must not import vLLM either."""
    modules = [
        ".".join((name_package(repository, path), path.stem)).removesuffix(".__init__")
        for folder in ("kernels", "vllm_ext/compress")
        for path in list_sources(repository / folder)
    ]
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print(json.dumps([name for name in ('vllm', 'transformers') if name in sys.modules]))"
    result = run_child(code)
    assert result.value == [], result.stderr


@pytest.mark.parametrize("feature", FEATURE_FOLDERS)
def test_features_do_not_import_each_other(repository: Path, feature: str) -> None:
    others = [f"vllm_ext.{other}" for other in FEATURE_FOLDERS if other != feature]
    for path in list_sources(repository / "vllm_ext" / feature):
        for name in list_imports(repository, path):
            assert not any(is_below(name, other) for other in others), f"{path.name} imports {name}"


def test_installed_names_only(repository: Path) -> None:
    """`import kernels` works in the source tree by accident and nowhere else."""
    for path in [source for folder in ("vllm_ext", "kernels", "patches", "tests", "bench") for source in
                 list_sources(repository / folder)]:  # fmt: skip
        for name in list_imports(repository, path):
            assert name.split(".")[0] not in {"kernels", "patches"}, f"{path.relative_to(repository)} imports {name}"


def test_every_source_names_its_licence(repository: Path) -> None:
    for folder in ("vllm_ext", "kernels", "patches", "tests", "bench", ".ci"):
        for path in list_sources(repository / folder):
            assert path.read_text().splitlines()[:2].count("# SPDX-License-Identifier: Apache-2.0") == 1, path
