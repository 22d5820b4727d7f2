# SPDX-License-Identifier: Apache-2.0
"""How an instruction set is chosen, and AMX as far as a machine without it can tell."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext.kernels.native import recipe

HERE = Path(__file__).parent

#: Bytes that a store of each register, or each suffix of `mov`, writes.
WIDTHS = {"zmm": 64, "ymm": 32, "xmm": 16, "q": 8, "l": 4, "w": 2, "b": 1}


def find_compiler() -> recipe.Compiler:
    compiler = recipe.find_compiler()
    assert compiler is not None, "these tests need a C++ compiler (g++), as `make bootstrap` does"
    return compiler


def find_flags(isa: str) -> tuple[str, ...]:
    """Flags of an instruction set's unit. Skips where the compiler does not know it."""
    units = {unit.source.stem.removeprefix("isa_"): unit for unit in recipe.make_recipe(find_compiler()).units}
    if isa not in units:
        pytest.skip(f"this compiler makes no code for {isa}")
    return units[isa].flags


def compile_file(source: Path, flags: Sequence[str], target: Path) -> Path:
    command = [find_compiler().path, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_set_that_fails_is_left_for_the_next(tmp_path: Path) -> None:
    """native/dispatch_test.cpp: wrong results, illegal instructions and endless loops in a set's self-test."""
    flags = [*find_flags("scalar"), "-O0"]
    run(compile_file(recipe.NATIVE / "dispatch_test.cpp", flags, tmp_path / "dispatch_test"))


def test_tiles_are_configured_before_their_use(tmp_path: Path) -> None:
    """All stores to the configuration are in the code: some compilers drop those to all but its first 8 bytes."""
    source = tmp_path / "enter.cpp"
    source.write_text('#include "amx.h"\nnamespace vllm_ext { ThreadState enter() { return enter_with_tiles(); } }\n')
    code = compile_file(source, [*find_flags("amx"), "-S"], tmp_path / "enter.s").read_text()
    assert code.count("ldtilecfg") == 1
    before, _, after = code.partition("ldtilecfg")
    place = re.match(r"\s*(-?\d*)\((%\w+)\)", after)
    assert place is not None, after[:80]
    base = int(place[1] or 0)
    # Bytes 16 to 31 and 48 to 55: bytes per row and rows of tiles 0 to 7. Zeros are stored to all of it in one go.
    stores = re.findall(rf"\tv?mov(\w*)\s+([^\n]+), (-?\d*)\({place[2]}\)\n", before)
    values = [
        (int(offset or 0) - base, WIDTHS[suffix if suffix in WIDTHS else source_register[1:4]])
        for suffix, source_register, offset in stores
    ]
    narrow = {start + byte for start, width in values if width < 64 for byte in range(width)}
    assert narrow >= {0, *range(16, 32), *range(48, 56)}, code


@pytest.mark.slow
def test_kernels_for_tiles_in_emulation(tmp_path: Path) -> None:
    """The AMX kernels with tiles in plain C++ (emulated_tiles.h) give the bits of the vector kernels."""
    if not Path("/proc/cpuinfo").exists() or "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a CPU with AVX-512 VNNI, for everything beside the tiles")
    main = tmp_path / "main.cpp"
    main.write_text(
        """
#include <cstdio>
#include "self_test.h"
int main() {
  for (int tokens = 1; tokens <= 40; ++tokens) {
    if (vllm_ext::agree(vllm_ext::kAmxKernels, vllm_ext::kAvx512VnniKernels, tokens)) continue;
    std::printf("differs at %d tokens\\n", tokens);
    return 1;
  }
}
"""
    )
    # -O2, where stores that nobody seems to read are dropped.
    emulated = [*find_flags("amx"), "-O2", "-include", str(HERE / "emulated_tiles.h"), "-c"]
    jobs = [
        (recipe.NATIVE / "isa_amx.cpp", emulated, tmp_path / "amx.o"),
        (recipe.NATIVE / "isa_avx512vnni.cpp", [*find_flags("avx512vnni"), "-O1", "-c"], tmp_path / "vector.o"),
        (main, [*find_flags("scalar"), "-c"], tmp_path / "main.o"),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_file(*job), jobs))
    run(compile_file(objects[0], [*map(str, objects[1:])], tmp_path / "emulated"))
