# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on other machines: the pack says so once and runs on, and its cache does not grow for ever."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.child import run_child
from tests.kernels.native.test_build import Workshop
from vllm_ext.kernels.native import build, recipe

#: Counts the warnings of load_ops, and says whether it found something.
LOAD = """
import json, logging
from pathlib import Path
from vllm_ext.kernels.native import build, load, recipe
texts = []
handler = logging.Handler()
handler.emit = lambda record: texts.append(record.getMessage())
logging.getLogger("vllm.vllm_ext.kernels").addHandler(handler)
{before}
print(json.dumps([load.load_ops() is not None, load.load_ops() is not None, texts, load.describe_kernels()]))
"""


def test_a_prebuilt_library_that_does_not_load_is_compiled_instead(tmp_path: Path) -> None:
    """As one that was made on a system with a newer C library: complete, of these sources, and refused by dlopen."""
    before = f"""
build.PREBUILT = Path({str(tmp_path)!r})
library = build.PREBUILT / "vllm_ext_cpu.so"
library.write_bytes(b"not for this machine")
sources = [path for group in recipe.list_sources() for path in group]
note = recipe.describe_place() | {{"sources": recipe.hash_files(sources), "sha256": build.hash_file(library)}}
library.with_suffix(".json").write_text(json.dumps(note))
assert build.find_prebuilt() == library
"""
    child = run_child(LOAD.format(before=before))
    assert child.value is not None, child.stderr
    first, second, texts, _ = child.value
    assert [first, second] == [True, True]
    assert len(texts) == 1
    assert "those in the package do not load" in texts[0]


def test_a_user_without_a_home_gets_one_warning() -> None:
    """An arbitrary user id in a container is in no passwd."""
    before = """
def find_none():
    raise RuntimeError("Could not determine home directory.")
build.Path.home = find_none
"""
    child = run_child(LOAD.format(before=before), HOME=None, XDG_CACHE_HOME=None, VLLM_EXT_CACHE_DIR=None)
    assert child.value is not None, child.stderr
    first, second, texts, described = child.value
    assert [first, second] == [False, False]
    assert len(texts) == 1
    assert "set VLLM_EXT_CACHE_DIR to a folder of your own" in texts[0]
    assert described["status"] == "off"
    assert "VLLM_EXT_CACHE_DIR" in described["reason"]


def test_a_compiler_that_hangs_is_one_warning(tmp_path: Path) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\ntest "$1" = --version && exec echo "slow g++"\nexec sleep 60\n')
    script.chmod(0o755)
    cache = str(tmp_path / "cache")
    child = run_child(LOAD.format(before="recipe.PROBE_TIMEOUT = 0.5"), CXX=str(script), VLLM_EXT_CACHE_DIR=cache)
    assert child.value is not None, child.stderr
    first, second, texts, described = child.value
    assert [first, second] == [False, False]
    assert len(texts) == 1
    assert "did not compile one line within 0.5 s" in texts[0]
    assert described["status"] == "off"


def test_an_assembler_that_is_too_old_leaves_a_set_out(tmp_path: Path) -> None:
    """The compiler knows the flags, and what it writes is not known to the assembler behind it."""
    compiler = recipe.find_compiler()
    assert compiler is not None
    if not recipe.is_built("amx", compiler):
        pytest.skip("needs a compiler for x86-64 that knows AMX")
    assembler = tmp_path / "as"
    assembler.write_text(
        '#!/bin/sh\nfor file; do test -f "$file" && grep -q tdpbsud "$file" && exit 1; done\nexec as "$@"\n'
    )
    assembler.chmod(0o755)
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler.path} -B {tmp_path} -no-integrated-cpp "$@"\n')
    script.chmod(0o755)
    old = recipe.Compiler(str(script), compiler.version)
    flags = recipe.ISA_FLAGS["amx"]
    assert subprocess.run([old.path, *flags, "-x", "c++", "-E", os.devnull], capture_output=True).returncode == 0
    assert not recipe.is_built("amx", old)
    assert recipe.is_built("avx2", old)
    names = {unit.source.stem for unit in recipe.make_recipe(old).units}
    assert "isa_amx" not in names
    assert {"isa_scalar", "isa_avx2"} <= names


def test_every_set_with_flags_has_an_instruction_to_try() -> None:
    assert set(recipe.ISA_INSTRUCTIONS) == {isa for isa, flags in recipe.ISA_FLAGS.items() if flags}


def test_what_nobody_uses_is_removed_by_age(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    old = workshop.build()
    now = time.time()
    abandoned, running = workshop.cache / "compile-old", workshop.cache / "compile-new"
    for folder in (abandoned, running):
        folder.mkdir()
        (folder / "0-answer.o").write_bytes(b"half")
    os.utime(abandoned, (now, now - build.ABANDONED_AFTER - 60))
    other = workshop.cache / "another-library.so"
    other.write_bytes(b"of somebody else")
    os.utime(other, (now, now - 2 * build.UNUSED_AFTER))

    def make_another(value: int) -> Path:
        workshop.header.write_text(f"#define VALUE {value}\n")
        return workshop.build()

    recent = make_another(43)
    assert old.exists()
    assert not abandoned.exists()
    assert running.exists()
    for library in (old, recent):
        os.utime(library, (now, now - build.UNUSED_AFTER - 60))
    # Loading counts as use.
    assert make_another(43) == recent
    newest = make_another(44)
    assert not any(old.with_suffix(suffix).exists() for suffix in (".so", ".json", ".lock"))
    assert build.is_whole(recent)
    assert build.is_whole(newest)
    assert other.exists()
