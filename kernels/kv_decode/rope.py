# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of keys and its inverse, for caches that hold keys before it (KVQuant).

A pair (a, b) of channels at position p becomes (a cos - b sin, b cos + a sin). Pairs are channel i and i + rotary/2;
channels from rotary on are left alone.
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """float32 of x [..., heads, D], rotated by its rows' angles.

    cos_sin: float [..., rotary]: cosines, then sines, of the rows' positions; rows of vLLM's `cos_sin_cache`. A
    rotation that also scales (YaRN's magnitude) is undone by inverse=True, too. Raises ValueError where rotary is odd
    or exceeds D. Source: RoFormer (arXiv:2104.09864), vLLM's `ApplyRotaryEmb`.
    """
    rotary = cos_sin.shape[-1]
    if rotary % 2 or rotary > x.shape[-1]:
        raise ValueError(f"rotary size {rotary} must be even and at most head_dim={x.shape[-1]}")
    cos, sin = cos_sin.float().unsqueeze(-2).chunk(2, -1)
    if inverse:
        norm = cos.square() + sin.square()
        cos, sin = cos / norm, -sin / norm
    turned, rest = x.float().split([rotary, x.shape[-1] - rotary], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
