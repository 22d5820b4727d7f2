# SPDX-License-Identifier: Apache-2.0
"""What is compiled into the CPU library: files, flags and everything else that decides whether a build still fits.

One object per instruction set (`isa_<name>.cpp`) and one per file that talks to torch. Files are found by name, so
that a new one needs no entry here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

#: Folder of this package; the C++ files of an op lie in the folder of the op beside it.
NATIVE = Path(__file__).resolve().parent

#: Name of the library, and of the namespace of its ops.
LIBRARY = "vllm_ext_cpu"

#: Operators with a `cpu.cpp` of their own.
OP_FOLDERS = ("act_quant", "kv_decode", "kv_store", "mixed_linear", "mixed_moe")

_AVX512 = ("-march=x86-64-v4", "-mavx512vnni")

#: Flags of each instruction set; the loader chooses among those compiled. Never -march=native: a cache folder may
#: be shared by machines that differ.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avxvnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "avx512vnni": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8"),
}

#: An instruction of each set, for the assembler: it may be older than the compiler, and fail on what that writes.
ISA_INSTRUCTIONS = {
    "avx2": "vpaddb %ymm0, %ymm1, %ymm2",
    "avxvnni": "{vex} vpdpbusd %ymm0, %ymm1, %ymm2",
    "avx512vnni": "vpdpbusd %zmm0, %zmm1, %zmm2",
    "amx": "tdpbsud %tmm0, %tmm1, %tmm2",
}

#: Machines whose compilers know the flags above; elsewhere only "scalar" is compiled.
X86_MACHINES = ("x86_64", "AMD64")

COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pipe")

#: Read in this order; the first that exists compiles.
COMPILERS = ("g++", "c++")

#: Seconds after which a compiler that does not even compile one line is given up.
PROBE_TIMEOUT = 60


class BuildError(RuntimeError):
    """The library cannot be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Unit:
    """One file to compile."""

    source: Path
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A shared library: its units, all files whose contents decide it, and the flags of the link step."""

    name: str
    units: tuple[Unit, ...]
    files: tuple[Path, ...]
    link_flags: tuple[str, ...]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler and the first line it says about itself."""

    path: str
    version: str


def find_compiler() -> Compiler | None:
    """The compiler that $CXX names, else the first of `COMPILERS` on the path; None where there is none that runs."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(path, (said.stdout.splitlines() or ["unknown"])[0])
    return None


def list_sources() -> tuple[list[Path], list[Path], list[Path]]:
    """(files of one instruction set each, files that include torch's headers, headers), sorted."""
    isa = sorted(NATIVE.glob("isa_*.cpp"))
    folders = [NATIVE.parent / folder for folder in OP_FOLDERS]
    sources = [path for folder in (NATIVE, *folders) for path in sorted(folder.glob("*.cpp"))]
    with_torch = [path for path in sources if path not in isa and not path.stem.endswith("_test")]
    headers = [path for folder in folders for path in sorted(folder.glob("*.h"))]
    return isa, with_torch, [*sorted(NATIVE.glob("include/*.h")), *headers]


@functools.cache
def accepts_flags(compiler: Compiler, flags: tuple[str, ...], instruction: str = "") -> bool:
    """Whether the compiler knows these flags, and its assembler this instruction.

    Raises BuildError where it does not end, and OSError where it cannot be started.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "probe.cpp", Path(scratch) / "probe.o"
        source.write_text(f'asm("{instruction}");\n', encoding="utf-8")
        command = [compiler.path, *flags, "-c", str(source), "-o", str(target)]
        try:
            return subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT).returncode == 0
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler.path} did not compile one line within {PROBE_TIMEOUT} s: {error}") from error


def is_built(isa: str, compiler: Compiler) -> bool:
    """Whether the library has this instruction set."""
    flags = ISA_FLAGS[isa]
    return not flags or (platform.machine() in X86_MACHINES and accepts_flags(compiler, flags, ISA_INSTRUCTIONS[isa]))


def make_recipe(compiler: Compiler) -> Recipe:
    """The recipe of the CPU library. Raises ValueError for an isa_*.cpp that `ISA_FLAGS` does not know, and BuildError
    for a compiler that does not end.

    An instruction set that the compiler or its assembler refuses is left out. Every unit sees one macro
    VLLM_EXT_ISA_<NAME> for each of those that are in.
    """
    isa, with_torch, headers = list_sources()
    names = {path: path.stem.removeprefix("isa_") for path in isa}
    unknown = [path.name for path, name in names.items() if name not in ISA_FLAGS]
    if unknown:
        raise ValueError(f"{unknown[0]} has no flags in ISA_FLAGS; known: {', '.join(ISA_FLAGS)}")
    built = [path for path in isa if is_built(names[path], compiler)]
    macros = [f"-DVLLM_EXT_ISA_{names[path].upper()}=1" for path in built]
    common = (*COMMON_FLAGS, f"-I{NATIVE / 'include'}", f"-I{NATIVE / '..'}", *macros)
    units = [Unit(path, (*common, *ISA_FLAGS[names[path]])) for path in built]
    units += [Unit(path, (*common, *torch_flags())) for path in with_torch]
    library = Path(torch.__file__).parent / "lib"
    # Not -fopenmp and no libgomp: the runtime's symbols come from the one that torch has loaded. A second copy would
    # bring a second pool of threads, spinning on the same cores.
    link_flags = ("-shared", f"-L{library}", "-ltorch_cpu", "-lc10")
    return Recipe(LIBRARY, tuple(units), (*isa, *with_torch, *headers), link_flags)


def torch_flags() -> tuple[str, ...]:
    """Flags of a file that includes torch's headers. Neither Python.h nor setuptools is needed."""
    include = Path(torch.__file__).parent / "include"
    return (
        # As system headers: their warnings are not ours to mend.
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        "-DAT_PARALLEL_OPENMP=1",
        "-fopenmp",
    )


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def describe_build(recipe: Recipe, compiler: Compiler) -> dict[str, str]:
    """Everything that decides whether a compiled library still fits, by name."""
    # Where torch and the pack are installed does not change the code.
    folders = (str(NATIVE), str(Path(torch.__file__).parent))
    flags = [" ".join(unit.flags) for unit in recipe.units] + [" ".join(recipe.link_flags)]
    for place, folder in enumerate(folders):
        flags = [text.replace(folder, f"<{place}>") for text in flags]
    return {
        **describe_place(),
        "sources": hash_files(recipe.files),
        "compiler": compiler.version,
        "flags": "\n".join(flags),
    }


def describe_place() -> dict[str, str]:
    """What a library must have been made for to be loaded in this process."""
    return {"torch": str(torch.__version__), "machine": platform.machine()}


def make_key(description: dict[str, str]) -> str:
    """Short name of a build: equal for equal descriptions."""
    text = "\n".join(f"{name}={value}" for name, value in sorted(description.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:20]
