# SPDX-License-Identifier: Apache-2.0
"""Directories and files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_ext.quantization.safetensors_io import CheckpointError


def check_output(output: Path) -> None:
    """Raises CheckpointError where `output` exists: nothing is ever overwritten."""
    if os.path.lexists(output):
        raise CheckpointError(f"{output} exists already: remove it or give another output directory")


def check_parent(path: Path) -> None:
    """Raises CheckpointError where there is no folder to write `path` into: better before the work than after."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory: create it, or write {path.name} somewhere else")


def write_file(path: Path, text: str) -> None:
    """Write a new text file in one step. Raises CheckpointError where it exists, and OSError where the disk does."""
    check_output(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        check_output(path)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def make_directory(output: Path, num_bytes: int) -> Iterator[Path]:
    """Gives a hidden directory beside `output` to fill; leaving flushes it to the disk and renames it.

    num_bytes: what will be written at least, so that a disk too small is refused before any work. On any error or
    interrupt the hidden directory is removed. Raises CheckpointError where `output` exists or appears meanwhile, and
    in place of every OSError, such as a full disk.
    """
    check_output(output)
    partial: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if num_bytes > free:
            raise CheckpointError(
                f"{output} needs {num_bytes} bytes, its disk has only {free}: free space or choose another"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        yield partial
        _publish(partial, output)
    except OSError as error:
        _remove(partial)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = f"free {num_bytes} bytes there or choose another disk" if full else "check the path and its permissions"
        raise CheckpointError(
            f"writing {output} failed ({error.strerror or error}): {fix}; nothing was left behind"
        ) from error
    except BaseException:
        _remove(partial)
        raise
    try:
        _flush(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"{output} is complete, but its folder could not be flushed to the disk ({error.strerror or error}): "
            f"run sync before you rely on it"
        ) from error


def _publish(partial: Path, output: Path) -> None:
    """Flush every file to the disk, then give the directory its name."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp makes it private
    for path in partial.rglob("*"):
        _flush(path)
    _flush(partial)
    check_output(output)
    partial.rename(output)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(partial: Path | None) -> None:
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
