# SPDX-License-Identifier: Apache-2.0
"""The layer beside every attention layer that owns its full-precision pages, so that vLLM allocates and tables them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_ext.config import ConfigError
from vllm_ext.kv_cache.backend import LAYOUTS, MIXED_LAYOUTS, RECENT_SUFFIX
from vllm_ext.kv_cache.capacity import MIXED_PADDING, count_page_tokens, share_room
from vllm_ext.kv_cache.presets import Preset, is_mixed
from vllm_ext.kv_cache.recent import RecentSpec


@dataclass
class RecentMetadata:
    """block_table: int [requests, pages], 0 where nothing is kept. row, block, token: int64, which rows of the step go
    where; the others are not kept.
    """

    block_table: torch.Tensor
    row: torch.Tensor
    block: torch.Tensor
    token: torch.Tensor


class RecentMetadataBuilder(AttentionMetadataBuilder[RecentMetadata]):
    """Makes `RecentMetadata` once per step, for all layers."""

    # How many rows are kept depends on the step, and `KVCacheMetadataBuilder` waits for counts, too.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    # vLLM's is abstract.
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecentMetadata:
        """See `AttentionMetadataBuilder.build`."""
        slots, size = common_attn_metadata.slot_mapping, self.kv_cache_spec.block_size
        # Padding is -1, and tokens that are not kept lie in the null block, 0, of which nothing is read. Writing them
        # too saves waiting for a device; a CPU has nothing to wait for.
        is_cpu = slots.device.type == "cpu"
        row = (slots >= size).nonzero().squeeze(-1) if is_cpu else torch.arange(len(slots), device=slots.device)
        kept = slots[row] if is_cpu else slots.clamp(min=0)
        return RecentMetadata(common_attn_metadata.block_table_tensor, row, kept // size, kept % size)


class RecentBackend(AttentionBackend):
    """What vLLM asks about the layer; it computes nothing."""

    @staticmethod
    def get_name() -> str:
        """As of the attention layer."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """None to give: the attention layer reads the pages."""
        raise NotImplementedError("full-precision pages are read by the attention layer beside")

    @staticmethod
    def get_builder_cls() -> type[RecentMetadataBuilder]:
        """The metadata builder."""
        return RecentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those of all attention layers, which decide: vLLM takes what all layers support."""
        return LAYOUTS + MIXED_LAYOUTS


class RecentLayer(AttentionLayerBase):
    """K and V in full precision of an attention layer's window and sinks.

    presets: of every layer of the model. is_last: whether this is the last of them. pages: [blocks, kv heads, page
    tokens, 2*D] in the model's dtype, K, then V; set when vLLM binds the cache.
    """

    def __init__(self, attention: Any, presets: Sequence[Preset], is_last: bool, vllm_config: Any) -> None:
        self.attention = attention
        self.presets, self.is_last = presets, is_last
        self.layer_name = attention.layer_name + RECENT_SUFFIX
        self.pages = torch.empty(0)
        vllm_config.compilation_config.static_forward_context[self.layer_name] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """kv_cache: uint8 [blocks, kv heads, page tokens, bytes]."""
        self.kv_cache = kv_cache
        self.pages = kv_cache.view(self.attention.impl.dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """What vLLM asks about the layer."""
        return RecentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> RecentSpec:
        """Pages of as many tokens as fit a quantized page, a power of two: one pool has one page size.

        Where layers have presets of their own, a block has the pages of all layers one after the other, of any sizes.
        Declared as bytes, like the quantized pages: vLLM zeroes new blocks where groups differ in type, and our
        kernels read nothing that was not written. Raises ConfigError for a page that is too small for one token.
        """
        layer, impl = self.attention, self.attention.impl
        main = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
        plane_bytes = layer.num_kv_heads * main.block_size
        pages = [plane_bytes * one.plan_cells(layer.head_size, main.block_size).cell_bytes for one in self.presets]
        token_bytes = 2 * layer.head_size * impl.dtype.itemsize
        size = count_page_tokens(main.block_size, layer.num_kv_heads * token_bytes, share_room(self.presets, pages))
        if size == 0 or any(page % impl.dtype.itemsize for page in pages):
            raise ConfigError(
                f"pages of {', '.join(map(str, sorted(set(pages))))} bytes do not hold tokens in full precision: "
                f"use --block-size 128 instead of {main.block_size}"
            )
        padded = main.page_size_bytes
        if is_mixed(self.presets):
            padded = size * layer.num_kv_heads * token_bytes + (MIXED_PADDING if self.is_last else 0)
        speculative = vllm_config.speculative_config
        return RecentSpec(
            block_size=size,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            dtype=main.dtype,
            state_content_bytes=token_bytes,
            page_size_padded=padded,
            # One group has one window: the longest that any layer needs.
            sliding_window=max(preset.retained_window for preset in self.presets),
            sinks=impl.preset.sinks,
            draft_tokens=speculative.num_speculative_tokens if speculative else 0,
        )
