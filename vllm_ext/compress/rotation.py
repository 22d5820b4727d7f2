# SPDX-License-Identifier: Apache-2.0
"""A randomized Hadamard rotation of the residual stream, folded into the weights: same function, milder weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from scipy.fft import dct

from vllm_ext.compress.families import Residual
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorReader

#: Values that are rotated at a time.
_CHUNK_VALUES = 2**22


class Rotation:
    """An orthogonal matrix R = diag(signs) (C x H / 2^(k/2)) of size m * 2^k, m odd: random signs, the orthonormal
    cosine matrix C of size m, and the Hadamard matrix H of size 2^k, so that no size is left out.

    size: of the residual stream. seed: of the signs. Raises ValueError for a size below 2.
    Source: QuaRot (arXiv:2404.00456, section 3), which has Hadamard matrices only; the cosine part is ours.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 2:
            raise ValueError(f"a rotation needs at least two dimensions, got {size}")
        self.size, self.seed = size, seed
        self._power = (size & -size).bit_length() - 1
        odd = size >> self._power
        self._signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size))
        self._cosines = torch.from_numpy(dct(np.eye(odd), norm="ortho", axis=0)) if odd > 1 else None

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [..., size] times R, in float64."""
        rotated = (rows.double() * self._signs.to(rows.device)).unflatten(-1, (-1, 2**self._power))
        for bit in range(self._power):
            pairs = rotated.unflatten(-1, (-1, 2, 2**bit))
            first, second = pairs.unbind(-2)
            rotated = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        rotated = rotated / math.sqrt(2**self._power)
        if self._cosines is not None:
            rotated = torch.einsum("...mk,mn->...nk", rotated, self._cosines.to(rows.device))
        return rotated.flatten(-2)


class RotatedReader(TensorReader):
    """The tensors of a checkpoint after rotation, computed when they are read, in the types of the original.

    dtype: of the rotated tensors; None: each one's own, to which it is rounded once. original: the tensors before.
    recipe: what, with them, decides the rotated ones.
    """

    def __init__(
        self, reader: TensorReader, residual: Residual, rotation: Rotation, dtype: torch.dtype | None = None
    ) -> None:
        # Not the base's: there is no directory of rotated tensors to read headers of.
        self.directory = reader.directory
        self.infos = dict(reader.infos)
        self.original, self._residual, self._rotation = reader, residual, rotation
        self.recipe = f"rotated: size {rotation.size}, seed {rotation.seed}, dtype {dtype}"
        self._writers = frozenset(residual.writers)
        self._gains = frozenset(residual.gains)
        self.infos[residual.untied_head] = reader.infos[residual.head]
        if dtype is not None:
            changed = {residual.embedding, residual.untied_head, *residual.readers, *self._writers, *self._gains}
            for name in changed:
                self.infos[name] = self.infos[name]._replace(dtype=dtype)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises CheckpointError for a name the checkpoint does not hold."""
        residual, read = self._residual, self.original.read
        dtype = self.infos[name].dtype
        if name == residual.untied_head:
            return self._rotate_rows(read(residual.head), dtype, read(residual.head_gain))
        if name == residual.embedding:
            return self._rotate_rows(read(name), dtype)
        if name in residual.readers:
            return self._rotate_rows(read(name), dtype, read(residual.readers[name]))
        if name in self._writers:
            # A weight [hidden, K] by its columns, a bias [hidden] as it is.
            tensor = read(name)
            rows = tensor.mT if tensor.dim() == 2 else tensor[None]
            return self._rotate_rows(rows, dtype).mT.reshape(tensor.shape).contiguous()
        if name in self._gains:
            return torch.ones_like(read(name), dtype=dtype)
        return read(name)

    def _rotate_rows(self, rows: torch.Tensor, dtype: torch.dtype, gain: torch.Tensor | None = None) -> torch.Tensor:
        """rows [n, hidden] times gain [hidden] times R. A few at a time: the embedding of a large vocabulary takes
        several times its size in float64."""
        rotated = torch.empty(rows.shape, dtype=dtype)
        step = max(1, _CHUNK_VALUES // rows.shape[-1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double()
            rotated[start : start + step] = self._rotation.apply(part if gain is None else part * gain.double())
        return rotated


def rotate_source(source: SourceModel, seed: int = 0, dtype: torch.dtype | None = None) -> SourceModel:
    """The same model with its residual stream rotated and the gains of its norms folded into the weights after them.

    Its logits are those of the original up to rounding: of the arithmetic, and of the rotated weights to `dtype`
    (None: the types of the checkpoint). Tied embeddings come apart: the head takes the last norm's gain, the
    embedding does not, so the rotated checkpoint has one tensor more. Nothing is read yet.
    Raises CheckpointError for a checkpoint whose tensors do not have the width of the stream.
    """
    residual = source.family.describe_residual(source.config, source.reader.infos)
    hidden = int(source.config["hidden_size"])
    for name in (residual.embedding, residual.head, *residual.readers):
        info = source.reader.infos[name]
        if info.shape[-1] != hidden:
            raise CheckpointError(f"{name} is {info}, config.json says hidden_size = {hidden}: copy the model again")
    for name in (*residual.writers, *residual.gains):
        found = source.reader.infos.get(name)
        if found is None or found.shape[0] != hidden:
            raise CheckpointError(
                f"{name} is {found or 'missing'}, config.json says hidden_size = {hidden}: copy it again"
            )
    reader = RotatedReader(source.reader, residual, Rotation(hidden, seed), dtype)
    config = {**source.config, "tie_word_embeddings": False}
    modules = {module.path: module for module in source.family.list_modules(config, reader.infos)}
    return dataclasses.replace(source, config=config, reader=reader, modules=modules)
