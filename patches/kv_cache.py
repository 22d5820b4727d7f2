# SPDX-License-Identifier: Apache-2.0
"""vllm/config/cache.py and the attention layer: names for our KV-cache quantizers, and our backend for their layers."""

from __future__ import annotations

from typing import Any

from vllm_ext import config
from vllm_ext.patches.wrapping import wrap


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
    from vllm.model_executor.layers.attention.attention import Attention

    wrap(Attention, "__init__", _give_backend)


def _give_backend(original: Any) -> Any:
    from vllm.config import get_current_vllm_config

    def make_attention(self: Any, *args: Any, **kwargs: Any) -> None:
        # The CPU platform ignores chosen backends, so the layer is handed its backend.
        cache_config = kwargs.get("cache_config", args[6] if len(args) > 6 else None)
        # Some classes of models pass none on; their layers would be left unquantized without a word.
        if not config.names_our_cache((cache_config or get_current_vllm_config().cache_config).cache_dtype):
            original(self, *args, **kwargs)
            return
        from vllm_ext.kv_cache import attach

        attach.make_layer(original, self, *args, **kwargs)

    return make_attention
