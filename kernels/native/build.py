# SPDX-License-Identifier: Apache-2.0
"""Compile the CPU library once per machine, into a folder that is private to the user.

    python -m vllm_ext.kernels.native.build                   compile into the cache (what the first use does by itself)
    python -m vllm_ext.kernels.native.build --into-package    compile into the package, for a wheel with the library

    CACHE/native/                       mode 0700
        vllm_ext_cpu-<key>.so           key: sources, torch, compiler, machine, flags (recipe.describe_build)
        vllm_ext_cpu-<key>.json         the description, and the sha256 of the .so
        vllm_ext_cpu-<key>.lock         held while one process compiles; the others wait and find it done

The .so gets its name by a rename once it is complete, so no process loads half of one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .recipe import (
    LIBRARY,
    NATIVE,
    BuildError,
    Compiler,
    Recipe,
    describe_build,
    describe_place,
    find_compiler,
    hash_files,
    list_sources,
    make_key,
    make_recipe,
)

#: Names another cache folder than the user's own.
CACHE_ENV = "VLLM_EXT_CACHE_DIR"

#: Where a wheel carries a library that was compiled for it.
PREBUILT = NATIVE / "prebuilt"

#: Seconds after which a compiler that does not end is given up.
COMPILE_TIMEOUT = 600

#: Folder of a build in progress, in the cache folder: on the same file system, so that a rename is enough.
SCRATCH_PREFIX = "compile-"

#: Seconds after which such a folder was left by a builder that was killed: longer than any build.
ABANDONED_AFTER = 24 * 3600

#: Seconds after which a library that nobody has loaded is of other sources, another torch or another compiler.
UNUSED_AFTER = 60 * 24 * 3600


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of compiled libraries below `cache_dir`, else $VLLM_EXT_CACHE_DIR, else the user's cache directory.

    Raises BuildError where the user has no home, as an arbitrary user id in a container.
    """
    chosen = cache_dir or os.environ.get(CACHE_ENV)
    try:
        if chosen:
            return Path(chosen).expanduser() / "native"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "vllm_ext" / "native"
    except RuntimeError as error:
        raise BuildError(f"{error}; set {CACHE_ENV} to a folder of your own, or HOME") from error


def find_built(recipe: Recipe, compiler: Compiler, folder: Path) -> Path | None:
    """The library of this recipe in `folder`, where it is there and whole. Writes nothing."""
    library = name_library(recipe, describe_build(recipe, compiler), folder)
    return library if is_whole(library) else None


def name_library(recipe: Recipe, description: dict[str, str], folder: Path) -> Path:
    """Where `build` puts a library of this description."""
    return folder / f"{recipe.name}-{make_key(description)}.so"


def build(recipe: Recipe, compiler: Compiler, folder: Path) -> Path:
    """Compile and link a recipe into `folder`, unless it is there already; returns the path of the library.

    Safe to call from several processes at once: one compiles. Raises BuildError, with the compiler's words, where
    compiling fails, and OSError where the folder cannot be written.
    """
    make_private(folder)
    description = describe_build(recipe, compiler)
    library = name_library(recipe, description, folder)
    if is_whole(library):
        note_use(library)
        return library
    with hold_lock(library.with_suffix(".lock"), library.name):
        # Another process may have finished it while this one waited.
        if not is_whole(library):
            write_library(recipe, compiler, description, library)
            remove_stale(folder, recipe.name, library)
    return library


def note_use(library: Path) -> None:
    """Set a library's time to now, so that `remove_stale` sees that it is in use."""
    # A read-only folder is never cleaned either.
    with contextlib.suppress(OSError):
        os.utime(library)


def remove_stale(folder: Path, name: str, keep: Path) -> None:
    """Delete what nobody will use again: libraries that no process has loaded for `UNUSED_AFTER`, and the folders of
    builders that were killed. By age alone: who has loaded a library keeps its pages when the file goes."""
    now = time.time()
    for path in folder.iterdir():
        try:
            age = now - path.stat().st_mtime
            if path.name.startswith(SCRATCH_PREFIX) and age > ABANDONED_AFTER:
                shutil.rmtree(path)
            elif path.name.startswith(f"{name}-") and path.suffix == ".so" and path != keep and age > UNUSED_AFTER:
                for suffix in (".so", ".json", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
        except OSError as error:
            say(f"cannot remove {path}, which is no longer used: {error}")


def write_library(recipe: Recipe, compiler: Compiler, description: dict[str, str], library: Path) -> None:
    """Compile, link, and put library and description at their place. The caller holds the lock."""
    say(
        f"compiling {recipe.name} with {compiler.version}; once per machine, 20 to 60 s. "
        f"The result is kept in {library.parent}"
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=library.parent) as scratch:
        compiled = compile_units(recipe, compiler, Path(scratch))
        made = Path(scratch) / library.name
        run([compiler.path, *map(str, compiled), *recipe.link_flags, "-o", str(made)])
        note = Path(scratch) / "description.json"
        note.write_text(json.dumps({**description, "sha256": hash_file(made)}, indent=1) + "\n", encoding="utf-8")
        # The description first: a library counts only beside its checksum.
        os.replace(note, library.with_suffix(".json"))
        os.replace(made, library)
    say(f"{recipe.name} is ready after {time.monotonic() - began:.0f} s")


def compile_units(recipe: Recipe, compiler: Compiler, scratch: Path) -> list[Path]:
    """Objects of all units, several at a time. Raises BuildError for the first that fails."""
    objects = [scratch / f"{index}-{unit.source.stem}.o" for index, unit in enumerate(recipe.units)]
    commands = [
        [compiler.path, *unit.flags, "-c", str(unit.source), "-o", str(target)]
        for unit, target in zip(recipe.units, objects, strict=True)
    ]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        pending = [pool.submit(run, command) for command in commands]
        try:
            for done in pending:
                done.result()
        except BaseException:
            # Not started ones would keep the caller waiting for a result that nobody wants.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return objects


def run(command: list[str]) -> None:
    """Run one step of the compiler. Raises BuildError with the end of what it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{said[-4000:]}")


def is_whole(library: Path) -> bool:
    """Whether a library is there with the contents that its description states.

    Loading a truncated one would kill the process, which no exception handler can catch.
    """
    try:
        stated = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        return bool(hash_file(library) == stated)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_private(folder: Path) -> None:
    """Create a folder with mode 0700. Raises BuildError for one of another user, whose code we would run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user; set {CACHE_ENV} to a folder of your own")
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


@contextlib.contextmanager
def hold_lock(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock between processes. It is released even when its holder is killed."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that compiles {name}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def say(text: str) -> None:
    """Progress, on stderr: a first start that is silent for half a minute looks hung."""
    print(f"vllm-ext: {text}", file=sys.stderr, flush=True)


def find_prebuilt() -> Path | None:
    """The library that a wheel carries, where it is whole and was made from these sources for this torch.

    Compiler and flags are not compared: they were the choice of who made the wheel.
    """
    library = PREBUILT / f"{LIBRARY}.so"
    if not is_whole(library):
        return None
    made = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    isa, with_torch, headers = list_sources()
    wanted = describe_place() | {"sources": hash_files([*isa, *with_torch, *headers])}
    return library if all(made.get(name) == value for name, value in wanted.items()) else None


def require_compiler() -> Compiler:
    """The compiler of this machine. Raises BuildError where there is none."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler; install g++, or name one in CXX")
    return compiler


def build_into_package() -> Path:
    """Compile the library into the package, where a wheel made from this tree will carry it."""
    compiler = require_compiler()
    recipe = make_recipe(compiler)
    PREBUILT.mkdir(exist_ok=True)
    library = PREBUILT / f"{recipe.name}.so"
    write_library(recipe, compiler, describe_build(recipe, compiler), library)
    return library


def main() -> int:
    """Command line; see the module's docstring. Prints the library's path on stdout."""
    parser = argparse.ArgumentParser(prog="python -m vllm_ext.kernels.native.build", description="Compile CPU kernels.")
    parser.add_argument("--into-package", action="store_true", help="put the library into the package, for a wheel")
    parser.add_argument("--cache-dir", help=f"cache folder; default: ${CACHE_ENV}, then the user's cache directory")
    options = parser.parse_args()
    try:
        if options.into_package:
            print(build_into_package())
            return 0
        compiler = require_compiler()
        print(build(make_recipe(compiler), compiler, cache_folder(options.cache_dir)))
    except (BuildError, OSError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
