# SPDX-License-Identifier: Apache-2.0
"""Safetensors files of a checkpoint directory: headers without data, single tensors, and a writer that streams.

The safetensors library writes a file from tensors that are all in memory. A quantized checkpoint is made layer by
layer, and every name, type and shape is known before the first tensor is: so `ShardWriter` writes the headers first
and each tensor at its place when it comes, and memory holds one tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: Names of element types in a safetensors header.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The library refuses longer headers; a length beyond it means that the file is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file or tensor, the value and the fix."""


class TensorInfo(NamedTuple):
    """Type and shape of one tensor, as a header states them."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Type and shape of every tensor of a file, in the order of its data, and the byte where data begins.

    Tensors lie one after the other without gaps. Raises CheckpointError for a file that is not safetensors, and
    for one whose length is not what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({size} bytes, header of {length}): copy it again"
            )
        try:
            header = json.loads(file.read(length))
            infos: dict[str, TensorInfo] = {}
            offsets: dict[str, tuple[int, ...]] = {}
            unsupported: dict[str, str] = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    unsupported |= {entry["dtype"]: name} if entry["dtype"] not in DTYPES else {}
                    infos[name] = TensorInfo(DTYPES.get(entry["dtype"], torch.uint8), _read_sizes(entry["shape"]))
                    offsets[name] = _read_sizes(entry["data_offsets"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header ({error}): copy it again") from error
    for kind, name in unsupported.items():
        raise CheckpointError(f"{path}: {name} has element type {kind!r}; known are {', '.join(DTYPES)}")
    end = 0
    for name in sorted(infos, key=offsets.__getitem__):
        if offsets[name] != (end, end + infos[name].num_bytes):
            raise CheckpointError(
                f"{path}: {name} is {infos[name]}, {infos[name].num_bytes} bytes from {end}, "
                f"but its header places it at {list(offsets[name])}: write the file again"
            )
        end += infos[name].num_bytes
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {8 + length + end}: it is "
            f"{'truncated' if size < 8 + length + end else 'longer than it should be'}; copy it again"
        )
    return dict(sorted(infos.items(), key=lambda item: offsets[item[0]])), 8 + length


class TensorReader:
    """The tensors of a checkpoint directory, single file or sharded, read one at a time.

    infos: {name: type and shape}. Raises CheckpointError for missing files, a damaged header, a file that lacks
    what the index says it holds, and two files with the same tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}
        index = directory / INDEX_FILE
        expected: Mapping[str, str] = {}
        if index.is_file():
            try:
                expected = _check_weight_map(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{index} is damaged ({error!r}): copy it again") from error
            files = sorted(set(expected.values()))
        elif (directory / SINGLE_FILE).is_file():
            # As vLLM: other files beside it, such as a consolidated copy, hold the same weights under other names.
            files = [SINGLE_FILE]
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} has no *.safetensors file; convert the weights to safetensors first")
        for name in files:
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory} lacks {name}, which {INDEX_FILE} names: copy it again")
            self._stamps[name] = _stamp((directory / name).stat())
            infos, offset = read_header(directory / name)
            for tensor, info in infos.items():
                if tensor in self._files:
                    raise CheckpointError(f"{tensor} is in both {self._files[tensor]} and {name} of {directory}")
                self.infos[tensor] = info
                self._files[tensor] = name
                self._offsets[tensor] = offset
                offset += info.num_bytes
        for tensor, name in expected.items():
            if self._files.get(tensor) != name:
                raise CheckpointError(
                    f"{INDEX_FILE} places {tensor} in {name} of {directory}, which does not hold it"
                    f"{suggest(tensor, self._files)}: copy the directory again"
                )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises CheckpointError for a name the checkpoint does not hold, and for a file that is not the one whose header
        was read: the offsets would be those of another.
        """
        info = self.infos.get(name)
        return self.read_part(name, 0, () if info is None else info.shape)

    def read_part(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A piece of a tensor that lies in one stretch: `first` elements before it. Raises as `read`."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.directory} has no tensor {name}{suggest(name, self._files)}")
        # Read, not mapped: pages of a mapped shard count as this process's memory until the shard is closed.
        dtype, path = self.infos[name].dtype, self.directory / file
        data = bytearray(TensorInfo(dtype, shape).num_bytes)
        try:
            with path.open("rb") as stream:
                changed = _stamp(os.fstat(stream.fileno())) != self._stamps[file]
                stream.seek(self._offsets[name] + first * dtype.itemsize)
                count = stream.readinto(data)
        except OSError as error:
            raise CheckpointError(f"reading {name} from {path} failed ({error.strerror})") from error
        if count != len(data):
            raise CheckpointError(f"{path} became shorter while it was read: copy it again")
        if changed:
            raise CheckpointError(f"{path} was changed while it was read: start again when it is complete")
        # frombuffer refuses an empty buffer.
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)


class ShardWriter:
    """Writes a known set of tensors into one or more safetensors files of `directory`, in any order.

    Tensors are assigned to files in the order of `infos`, at most `shard_bytes` of data in each (a larger tensor has
    a file of its own); with more than one file an index is written. The same infos and data give the same bytes.
    Use as a context manager; leaving it checks that every tensor came. Raises CheckpointError for a tensor that is
    unknown, written twice, of another type or shape, or missing, and OSError where the disk does.
    """

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        self._infos = infos
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        shards = _split(infos, shard_bytes)
        names = [
            SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        try:
            for file_name, shard in zip(names, shards, strict=True):
                file = (directory / file_name).open("xb")
                self._files.append(file)
                header, offsets = _make_header({name: infos[name] for name in shard})
                file.write(header)
                self._places.update({name: (file, len(header) + offset) for name, offset in offsets.items()})
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
                    "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
                }
                (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except BaseException:
            self._close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place."""
        if name not in self._places:
            reason = "was written already" if name in self._infos else "is not a tensor of this checkpoint"
            raise CheckpointError(f"{name} {reason}")
        found = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if found != self._infos[name]:
            raise CheckpointError(f"{name} is {found}, expected {self._infos[name]}")
        file, offset = self._places.pop(name)
        file.seek(offset)
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._places:
                    missing = next(iter(self._places))
                    raise CheckpointError(f"{len(self._places)} tensors were never written, among them {missing}")
                for file in self._files:
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._close(hide_errors=kind is not None)

    def _close(self, hide_errors: bool = True) -> None:
        for file in self._files:
            try:
                file.close()
            except OSError:
                # On a full disk closing flushes and fails again; the first error is the one to report.
                if not hide_errors:
                    raise


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_weight_map(weight_map: Any) -> dict[str, str]:
    """{tensor: file} of an index. Raises ValueError for anything else, and for a file outside of the directory."""
    if not isinstance(weight_map, dict):
        raise ValueError(f"weight_map is a {type(weight_map).__name__}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise ValueError(f"weight_map places {tensor} in {file!r}, which is no file name")
    return weight_map


def _read_sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} is not a list of sizes")
    return tuple(values)


def suggest(name: str, known: Iterable[str]) -> str:
    """' (nearest: ...)' for a tensor or module path that is not among `known`; '' where none is near."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" (nearest: {close[0]})" if close else ""


def _split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def _make_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor's data begins after them."""
    # Wide elements first, as the library does: every tensor then starts at a multiple of its element's size.
    order: Sequence[str] = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        offsets[name] = end
        end += infos[name].num_bytes
        header[name] = {
            "dtype": _NAMES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets
