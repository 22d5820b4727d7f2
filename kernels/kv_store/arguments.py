# SPDX-License-Identifier: Apache-2.0
"""Checks shared by every implementation that reads or writes quantized pages. Metadata only: no device is read."""

from __future__ import annotations

import torch

from .layout import CellLayout


def check_cache(cache: torch.Tensor, layout: CellLayout) -> None:
    """Raise ValueError, naming shape and fix, for a cache whose pages are not those of the layout."""
    expected = (layout.block_size, layout.cell_bytes)
    if cache.dim() != 4 or cache.dtype != torch.uint8 or cache.shape[2:] != expected:
        raise ValueError(
            f"cache must be uint8 [blocks, kv heads, {layout.block_size}, {layout.cell_bytes}], "
            f"got {cache.dtype} {list(cache.shape)}"
        )


def check_rows(name: str, x: torch.Tensor, cache: torch.Tensor, layout: CellLayout) -> None:
    """Raise ValueError for keys, or values, that are not [tokens, kv heads, head_dim] floating-point numbers."""
    expected = (cache.shape[1], layout.head_dim)
    if x.dim() != 3 or x.shape[1:] != expected or not x.is_floating_point():
        raise ValueError(f"{name} must be float [tokens, {expected[0]}, {expected[1]}], got {x.dtype} {list(x.shape)}")


def check_groups(keys: torch.Tensor, cache: torch.Tensor, first_slots: torch.Tensor, layout: CellLayout) -> None:
    """Raise ValueError for a layout with keys per token, and keys that are not as many groups of it as slots."""
    check_cache(cache, layout)
    codec = layout.key
    if not codec.per_channel:
        raise ValueError("store_key_groups needs per-channel keys; store_kv stores per-token ones")
    expected = (first_slots.numel(), codec.group_size, cache.shape[1], layout.head_dim)
    if keys.shape != expected or not keys.is_floating_point():
        raise ValueError(f"keys must be float {list(expected)}, got {keys.dtype} {list(keys.shape)}")
