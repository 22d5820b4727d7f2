# SPDX-License-Identifier: Apache-2.0
"""Results of stages on disk, named by what they were made from: a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vllm_ext import __version__
from vllm_ext.compress.rotation import RotatedReader
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.safetensors_io import CheckpointError

#: Changes whenever the meaning of what is stored does.
CACHE_VERSION = 2

#: Names of tensors in a file whose value is one tensor, not a mapping of them.
_SINGLE = "value"

_SUFFIXES = (".safetensors", ".json")


class StageCache:
    """A folder with one file per stored result of a key.

    folder: made when something is stored. key: everything that the results depend on, JSON-ready; the release of this
    package is part of it. Results of another key lie in another sub-folder and are never seen. Files are written
    beside their place, flushed and renamed, so a result is there whole or not at all; one that was damaged later
    counts as missing. No pickle: tensors are safetensors, all else is JSON.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        full = {"cache_version": CACHE_VERSION, "vllm_ext": __version__, **key}
        text = json.dumps(full, sort_keys=True, separators=(",", ":"))
        self.key_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.folder = folder / self.key_sha256[:32]
        self._text = text

    def load(self, name: str) -> Any:
        """What `store` was given under this name, tensors on the CPU; None where there is nothing usable.

        Arrays come back as tensors.
        """
        try:
            tensors = load(self._place(name, ".safetensors").read_bytes())
            return tensors[_SINGLE] if set(tensors) == {_SINGLE} else tensors
        except FileNotFoundError:
            pass  # the other kind of file
        except SafetensorError:
            return None
        try:
            record = json.loads(self._place(name, ".json").read_text(encoding="utf-8"))
            return record["value"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None

    def store(self, name: str, value: Any) -> None:
        """Keep a tensor, an array, a mapping of names to either, or anything JSON-ready but None.

        Raises TypeError for anything else, and CheckpointError, naming the folder, where the disk refuses.
        """
        if value is None:
            raise TypeError(f"{name}: None means that nothing is stored; store a value")
        if isinstance(value, torch.Tensor | np.ndarray):
            value = {_SINGLE: value}
        tensors = {}
        if isinstance(value, Mapping):
            tensors = {key: item for key, item in value.items() if isinstance(item, torch.Tensor | np.ndarray)}
            if tensors and len(tensors) != len(value):
                raise TypeError(f"{name}: a mapping holds tensors and other values; store them apart")
        if tensors:
            data, suffix, other = save({key: _to_tensor(item) for key, item in tensors.items()}), *_SUFFIXES
        else:
            data, (other, suffix) = json.dumps({"value": value}).encode(), _SUFFIXES
        place = self._place(name, suffix)
        try:
            self._make_folder()
            _write(place, data)
            self._place(name, other).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"keeping unfinished work in {self.folder.parent} failed ({error.strerror or error}): free "
                f"{len(data)} bytes there, or give another folder with --work; what was finished before is kept"
            ) from error

    def has(self, name: str) -> bool:
        """Whether something is stored under this name, without reading it; it may have been damaged since."""
        return any(self._place(name, suffix).is_file() for suffix in _SUFFIXES)

    def discard(self, name: str) -> None:
        """Drop one result, if there is one."""
        for suffix in _SUFFIXES:
            self._place(name, suffix).unlink(missing_ok=True)

    @contextmanager
    def make_scratch(self, name: str) -> Iterator[Path]:
        """An empty folder in this one, removed when the context ends; those that killed processes left go first."""
        self._make_folder()
        for old in self.folder.glob(f"{name}-*"):
            if not _is_alive(int(old.name.rpartition("-")[2])):
                shutil.rmtree(old, ignore_errors=True)
        scratch = self.folder / f"{name}-{os.getpid()}"
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove(self) -> None:
        """Drop everything stored under this key."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "key.json", self._text.encode())

    def _place(self, name: str, suffix: str) -> Path:
        if not name or Path(name).name != name or name == "key":
            raise ValueError(f"a stored result needs a plain file name, got {name!r}")
        return self.folder / f"{name}{suffix}"


def hash_source(source: SourceModel) -> str:
    """sha256 of a model's config.json and of every tensor's name, type, shape and bytes; reads all of them once.

    A rotated model has another hash than the one on disk: of the same tensors and of what rotates them.
    """
    digest = hashlib.sha256(json.dumps(dict(source.config), sort_keys=True).encode())
    reader = source.reader
    if isinstance(reader, RotatedReader):
        # Rotating every tensor, only to hash it, takes minutes at real sizes.
        digest.update(reader.recipe.encode())
        reader = reader.original
    for name in sorted(reader.infos):
        tensor = reader.read(name)
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_array(values: np.ndarray) -> str:
    """sha256 of an array's type, shape and values."""
    header = f"{values.dtype.str}{list(values.shape)}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(values).tobytes()).hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _to_tensor(value: torch.Tensor | np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    return tensor.detach().cpu().contiguous()


def _write(path: Path, data: bytes) -> None:
    """One file, complete or absent, whatever happens meanwhile."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
