# SPDX-License-Identifier: Apache-2.0
"""The builder on a library of one small file: cached, shared by processes, safe against damage and interruption."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.child import run_child
from vllm_ext.kernels.native import build, recipe
from vllm_ext.kernels.native.recipe import Compiler, Recipe, Unit

#: Logs one line per call, waits, then compiles.
WRAPPER = """#!/bin/sh
echo "$*" >> {log}
sleep {delay}
exec g++ "$@"
"""


class Workshop:
    """A recipe of two files and a header, and a compiler that counts its calls."""

    def __init__(self, folder: Path, delay: float = 0.0) -> None:
        self.folder, self.log, self.cache = folder, folder / "calls.log", folder / "cache" / "native"
        self.header = folder / "value.h"
        self.header.write_text("#define VALUE 42\n")
        sources = {"answer.cpp": '#include "value.h"\nextern "C" int answer() { return VALUE + OFFSET; }\n'}
        sources["other.cpp"] = 'extern "C" int other() { return 7; }\n'
        for name, text in sources.items():
            (folder / name).write_text(text)
        wrapper = folder / "compiler"
        wrapper.write_text(WRAPPER.format(log=self.log, delay=delay))
        wrapper.chmod(0o755)
        self.compiler = Compiler(str(wrapper), "counting g++")
        files = tuple(folder / name for name in (*sources, "value.h"))
        units = tuple(Unit(folder / name, ("-fPIC", "-O0", "-DOFFSET=0")) for name in sources)
        self.recipe = Recipe("tiny", units, files, ("-shared",))

    def build(self) -> Path:
        return build.build(self.recipe, self.compiler, self.cache)

    @property
    def calls(self) -> int:
        """Compiler calls so far: one per unit and one to link."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_it_builds_once_into_a_private_folder(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.find_built(workshop.recipe, workshop.compiler, workshop.cache) is None
    library = workshop.build()
    assert ctypes.CDLL(str(library)).answer() == 42
    assert workshop.calls == 3
    assert "compiling tiny with counting g++; once per machine" in capfd.readouterr().err
    assert stat.S_IMODE(workshop.cache.stat().st_mode) == 0o700
    assert workshop.build() == library == build.find_built(workshop.recipe, workshop.compiler, workshop.cache)
    assert workshop.calls == 3
    assert capfd.readouterr().err == ""
    assert sorted(path.suffix for path in workshop.cache.iterdir()) == [".json", ".lock", ".so"]
    assert json.loads(library.with_suffix(".json").read_text())["compiler"] == "counting g++"


def test_everything_that_matters_changes_the_name(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [workshop.build().name]
    workshop.header.write_text("#define VALUE 43\n")
    names.append(workshop.build().name)
    assert ctypes.CDLL(str(workshop.cache / names[-1])).answer() == 43
    units = tuple(replace(unit, flags=("-fPIC", "-O0", "-DOFFSET=1")) for unit in workshop.recipe.units)
    workshop.recipe = replace(workshop.recipe, units=units)
    names.append(workshop.build().name)
    workshop.compiler = replace(workshop.compiler, version="another g++")
    names.append(workshop.build().name)
    monkeypatch.setattr(torch, "__version__", "99.0")
    names.append(workshop.build().name)
    monkeypatch.setattr(recipe.platform, "machine", lambda: "aarch64")
    names.append(workshop.build().name)
    assert len(set(names)) == 6


@pytest.mark.parametrize("damage", ["truncated", "changed", "no description", "bad description"])
def test_a_damaged_library_is_built_again(workshop: Workshop, damage: str) -> None:
    library = workshop.build()
    content, note = library.read_bytes(), library.with_suffix(".json")
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no description":
        note.unlink()
    else:
        note.write_text("[]")
    assert not build.is_whole(library)
    assert workshop.build() == library
    assert workshop.calls == 6
    assert build.is_whole(library)
    assert ctypes.CDLL(str(library)).answer() == 42


def start_child(workshop: Workshop) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from vllm_ext.kernels.native import build\n"
        "from vllm_ext.kernels.native.recipe import Compiler, Recipe, Unit\n"
        f"print(build.build({workshop.recipe!r}, {workshop.compiler!r}, Path({str(workshop.cache)!r})))"
    ).replace("PosixPath(", "Path(")
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_concurrent_processes_compile_once(tmp_path: Path) -> None:
    # Slow enough that all of them arrive while the first compiles.
    workshop = Workshop(tmp_path, delay=1)
    children = [start_child(workshop) for _ in range(3)]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert workshop.calls == 3
    assert sum("compiling tiny" in err for _, err in results) == 1


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, delay=60)
    child = start_child(workshop)
    deadline = time.monotonic() + 60
    while workshop.calls == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workshop.calls > 0
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    Path(workshop.compiler.path).write_text(WRAPPER.format(log=workshop.log, delay=0))
    began = time.monotonic()
    assert ctypes.CDLL(str(workshop.build())).answer() == 42
    assert time.monotonic() - began < 30


def test_a_failing_compiler_is_quoted_and_leaves_no_library(workshop: Workshop) -> None:
    workshop.header.write_text("#error out of luck\n")
    with pytest.raises(build.BuildError, match="out of luck"):
        workshop.build()
    assert [path.suffix for path in workshop.cache.iterdir()] == [".lock"]
    gone = replace(workshop.compiler, path=str(workshop.folder / "nowhere"))
    with pytest.raises(build.BuildError, match="nowhere did not run"):
        build.build(workshop.recipe, gone, workshop.cache)


def test_folders_of_others_are_refused_and_open_ones_closed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.cache.mkdir(parents=True, mode=0o777)
    workshop.cache.chmod(0o777)
    workshop.build()
    assert stat.S_IMODE(workshop.cache.stat().st_mode) == 0o700
    monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    with pytest.raises(build.BuildError, match=f"{workshop.cache} belongs to another user; set VLLM_EXT_CACHE_DIR"):
        workshop.build()


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_EXT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "vllm_ext" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "vllm_ext" / "native"
    monkeypatch.setenv("VLLM_EXT_CACHE_DIR", "~/here")
    assert build.cache_folder() == tmp_path / "here" / "native"
    assert build.cache_folder(tmp_path / "given") == tmp_path / "given" / "native"


def test_the_recipe_names_every_source_and_no_machine() -> None:
    compiler = recipe.find_compiler()
    assert compiler is not None
    isa, with_torch, headers = recipe.list_sources()
    made = recipe.make_recipe(compiler)
    assert {unit.source for unit in made.units} <= {*isa, *with_torch}
    assert {unit.source for unit in made.units} >= set(with_torch)
    assert set(made.files) == {*isa, *with_torch, *headers}
    assert not any(path.name.endswith("_test.cpp") for path in made.files)
    flags = {flag for unit in made.units for flag in (*unit.flags, *made.link_flags)}
    assert "-march=native" not in flags
    # The link step must not bring a second OpenMP runtime.
    assert not {"-fopenmp", "-lgomp"} & set(made.link_flags)
    # Where things are installed does not enter the key.
    assert str(recipe.NATIVE) not in recipe.describe_build(made, compiler)["flags"]


def test_unknown_instruction_sets_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = recipe.find_compiler()
    assert compiler is not None
    assert recipe.accepts_flags(compiler, ("-O1",))
    assert not recipe.accepts_flags(compiler, ("-mno-such-set",))
    (tmp_path / "isa_scalar.cpp").write_text("int nothing;\n")
    (tmp_path / "isa_avx2.cpp").write_text("int nothing;\n")
    monkeypatch.setattr(recipe, "NATIVE", tmp_path)
    monkeypatch.setattr(recipe.platform, "machine", lambda: "aarch64")
    made = recipe.make_recipe(compiler)
    assert [unit.source.name for unit in made.units] == ["isa_scalar.cpp"]
    assert "-DVLLM_EXT_ISA_AVX2=1" not in made.units[0].flags
    (tmp_path / "isa_abacus.cpp").write_text("int nothing;\n")
    with pytest.raises(ValueError, match=r"isa_abacus\.cpp has no flags in ISA_FLAGS"):
        recipe.make_recipe(compiler)


def test_a_prebuilt_library_is_taken_only_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    assert build.find_prebuilt() is None
    library = tmp_path / "vllm_ext_cpu.so"
    library.write_bytes(b"code")
    isa, with_torch, headers = recipe.list_sources()
    fitting = {
        **recipe.describe_place(),
        "sources": recipe.hash_files([*isa, *with_torch, *headers]),
        "compiler": "of the wheel's maker",
        "sha256": build.hash_file(library),
    }
    for change, expected in [
        ({}, library), ({"torch": "1.0"}, None), ({"sources": "other"}, None), ({"machine": "z80"}, None),
        ({"sha256": "0"}, None),
    ]:  # fmt: skip
        library.with_suffix(".json").write_text(json.dumps(fitting | change))
        assert build.find_prebuilt() == expected, change


def test_no_compiler_is_one_warning_and_the_torch_path(tmp_path: Path) -> None:
    child = run_child(
        """
import json, logging, torch
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.mixed_moe import cpu, reference
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.native import load
texts = []
handler = logging.Handler()
handler.emit = lambda record: texts.append(record.getMessage())
logging.getLogger("vllm.vllm_ext.kernels").addHandler(handler)
found = [load.load_ops(), load.load_ops()]
layer = make_layer([(BlockFormat(3, 16, 32, layout=Layout.CPU_RECORD),) * 2] * 2, 64, 32)
inputs = make_inputs(5, 64, 2, 2, torch.bfloat16)
arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 32, "silu", False)
error = tolerances.relative_error(cpu.mixed_moe(*arguments), reference.mixed_moe(*arguments))
print(json.dumps([found, texts, error, load.describe_kernels(), load.is_loaded()]))
""",
        CXX=str(tmp_path / "no-compiler"),
        VLLM_EXT_CACHE_DIR=str(tmp_path / "cache"),
        PYTHONPATH=str(Path(__file__).resolve().parents[3]),
    )
    assert child.value is not None, child.stderr
    found, texts, error, described, loaded = child.value
    assert found == [None, None]
    assert not loaded
    assert len(texts) == 1
    assert "there is no C++ compiler; install g++, or name one in CXX" in texts[0]
    assert error < 2e-2
    assert described == {"status": "off", "reason": "no C++ compiler: install g++, or name one in CXX"}


def test_an_unwritable_cache_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    child = run_child(
        "import json; from vllm_ext.kernels.native import load; print(json.dumps(load.load_ops()))",
        VLLM_EXT_CACHE_DIR=str(tmp_path / "file"),
    )
    assert child.returncode == 0, child.stderr
    assert child.value is None
    assert child.stderr.count("vllm-ext runs its CPU operators on torch alone") == 1


def test_importing_the_kernels_compiles_and_loads_nothing(tmp_path: Path) -> None:
    child = run_child(
        """
import json, vllm_ext.kernels.mixed_moe, vllm_ext.kernels.mixed_linear, vllm_ext.kernels.act_quant
from vllm_ext.kernels.native import load
print(json.dumps([load.is_loaded(), load.describe_kernels()["status"]]))""",
        VLLM_EXT_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert child.value == [False, "pending"], child.stderr
    assert not (tmp_path / "cache").exists()
