# SPDX-License-Identifier: Apache-2.0
"""vllm/config/cache.py and the attention layer: names for our KV-cache quantizers, and our backend for their layers."""

from __future__ import annotations

import functools
from typing import Any

from vllm_ext import config


def add_cache_dtypes() -> None:
    """Add the pack's names to those of `--kv-cache-dtype`, stored as bytes.

    `CacheDType` is one Literal that parser, configuration and selector share; the configuration's validator has copied
    its names and is built again.
    """
    import torch
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import cache
    from vllm.utils import torch_utils

    names: Any = cache.CacheDType
    missing = tuple(name for name in config.KV_CACHE_DTYPES if name not in names.__args__)
    if not missing:
        return
    names.__args__ = (*names.__args__, *missing)
    torch_utils.STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(missing, torch.uint8))
    rebuild_dataclass(cache.CacheConfig, force=True)


def wrap_attention() -> None:
    """Give attention layers with a dtype of ours our backend, their name, and pages for their window."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention

    original = Attention.__init__
    if getattr(original, "_wrapped_by_vllm_ext", False):
        return

    @functools.wraps(original)
    def make_attention(self: Any, *args: Any, **kwargs: Any) -> None:
        # The CPU platform ignores chosen backends, so the layer is handed its backend.
        cache_config = kwargs.get("cache_config", args[6] if len(args) > 6 else None)
        # Some classes of models pass none on; their layers would be left unquantized without a word.
        if not config.names_our_cache((cache_config or get_current_vllm_config().cache_config).cache_dtype):
            original(self, *args, **kwargs)
            return
        from vllm_ext.kv_cache import attach

        attach.make_layer(original, self, *args, **kwargs)

    make_attention._wrapped_by_vllm_ext = True  # type: ignore[attr-defined]
    Attention.__init__ = make_attention
