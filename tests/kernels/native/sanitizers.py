# SPDX-License-Identifier: Apache-2.0
"""A program of the torch-free headers, compiled with sanitizers for every instruction set and run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_ext.kernels.native import recipe

#: What is checked of each instruction set. All of "undefined" in the 512-bit loops takes the compiler many minutes.
SANITIZERS = {
    "scalar": "address,undefined",
    "avx2": "address,undefined",
    "avxvnni": "address,undefined",
    "avx512vnni": "address,shift,alignment,signed-integer-overflow",
}


def run_sanitized(program: Path, folder: Path) -> None:
    """Compile `program` with the kernels of every known instruction set in `folder`, and run it; it must return 0."""
    compiler = recipe.find_compiler()
    assert compiler is not None
    units = {unit.source.stem.removeprefix("isa_"): unit for unit in recipe.make_recipe(compiler).units}
    chosen = [name for name in SANITIZERS if name in units]
    assert chosen
    macros = [f"-DVLLM_EXT_ISA_{name.upper()}=1" for name in chosen]

    def compile_one(source: Path, flags: Sequence[str], checks: str) -> Path:
        target = folder / f"{source.stem}.o"
        flags = [flag for flag in flags if not flag.startswith("-DVLLM_EXT_ISA_")]
        options = ["-O1", "-g1", f"-fsanitize={checks}", "-fno-sanitize-recover=all", "-c", str(source)]
        command = [compiler.path, *flags, *macros, *options, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
        return target

    jobs = [(units[name].source, units[name].flags, SANITIZERS[name]) for name in chosen]
    jobs.append((program, units["scalar"].flags, "address,undefined"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    binary = folder / "standalone_test"
    linked = [compiler.path, "-fsanitize=address,undefined", *map(str, objects), "-o", str(binary)]
    subprocess.run(linked, check=True, timeout=120)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
