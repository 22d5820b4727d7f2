# SPDX-License-Identifier: Apache-2.0
"""Attention over quantized pages in vLLM's V1 engine: backend, metadata and implementation.

A step of a layer:

    do_kv_cache_update   codes into the quantized pages; K and V as they are into the pages of the window
    forward              per-channel keys: groups that this step completes; then `kv_decode.attend`

All requests of a step are one call of a compiled kernel each; nothing here loops over them. On CUDA the kernels are
their references in torch, which wait for the device; what is made here for them does not, but for `completes_groups`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_ext import observability
from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_decode.rope import rotate
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout
from vllm_ext.kv_cache.presets import Preset
from vllm_ext.kv_cache.ranges import count_lost_groups

#: End of the name of the layer that holds a layer's window; see `recent_layer.RecentLayer`.
RECENT_SUFFIX = ".recent"
#: The blocks of a (block, head) are contiguous and lie by layer, as in vLLM's own CPU backend.
LAYOUTS = (KVCacheLayout.LBHNC,)
#: Pages of different sizes lie side by side within their block.
MIXED_LAYOUTS = (KVCacheLayout.BLHNC,)


@dataclass
class KVCacheMetadata:
    """Requests of one step, as `kv_decode.attend` takes them.

    completes_groups: does the step end some group of per-channel keys? num_tokens: without padding. positions: int64
    [num_tokens], where keys are stored before RoPE.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    no_recent_table: torch.Tensor
    num_tokens: int
    completes_groups: bool
    positions: torch.Tensor | None = None


class KVCacheMetadataBuilder(AttentionMetadataBuilder[KVCacheMetadata]):
    """Makes `KVCacheMetadata` once per step, for all layers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    group_tokens: ClassVar[int] = 0
    needs_positions: ClassVar[bool] = False

    # vLLM's is abstract.
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVCacheMetadata:
        """See `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        starts, lens, size = common.query_start_loc, common.seq_lens, self.group_tokens
        num_tokens = int(common.query_start_loc_cpu[-1])
        completes = bool(size) and bool((lens // size > (lens - starts.diff()) // size).any())
        return KVCacheMetadata(
            starts,
            lens,
            common.block_table_tensor,
            common.block_table_tensor[:, :0],
            num_tokens,
            completes,
            list_positions(starts, lens, num_tokens) if self.needs_positions else None,
        )


def list_positions(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Position of every token of a step, int64 [num_tokens]. Arguments as `kv_decode.attend`. Waits for no device."""
    ends = query_start_loc[1:].long()
    row = torch.arange(num_tokens, device=ends.device)
    request = torch.searchsorted(ends, row, right=True)
    return row + (seq_lens.long() - ends)[request]


class KVCacheBackend(AttentionBackend):
    """Backend of the layers of one preset; `make_backend` makes the subclass that carries it."""

    preset: ClassVar[Preset]
    builder: ClassVar[type[KVCacheMetadataBuilder]]
    layouts: ClassVar[tuple[KVCacheLayout, ...]] = LAYOUTS
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """vLLM's name for backends that come from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVCacheImpl]:
        """The implementation."""
        return KVCacheImpl

    @classmethod
    def get_builder_cls(cls) -> type[KVCacheMetadataBuilder]:
        """The metadata builder of this preset."""
        return cls.builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: the preset's layout says what fits."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """See LAYOUTS and MIXED_LAYOUTS."""
        return cls.layouts

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages of the size that the preset's cells take."""
        cells = cls.preset.plan_cells(spec.head_size, spec.block_size)
        return replace(spec, state_content_bytes=cells.cell_bytes)


@functools.cache
def make_backend(preset: Preset, has_mixed_pages: bool = False) -> type[KVCacheBackend]:
    """The backend class of a fitted preset: vLLM asks classes, not instances, for the size of a page.

    has_mixed_pages: whether other layers of the model have pages of other sizes.
    """
    size = preset.key.group_size if preset.key.per_channel else 0
    members: dict[str, Any] = {"group_tokens": size, "needs_positions": preset.pre_rope, "__module__": __name__}
    builder = type("KVCacheMetadataBuilder", (KVCacheMetadataBuilder,), members)
    layouts = MIXED_LAYOUTS if has_mixed_pages else LAYOUTS
    members = {"preset": preset, "builder": builder, "layouts": layouts, "__module__": __name__}
    return type(f"KVCacheBackend_{preset.name}", (KVCacheBackend,), members)


class KVCacheImpl(AttentionImpl):
    """One layer's attention. `attach` completes it: vLLM tells an implementation neither its layer nor its preset."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **_unused: object,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.alibi_slopes, self.sliding_window, self.logits_soft_cap = alibi_slopes, sliding_window, logits_soft_cap
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def attach(
        self,
        layer_name: str,
        preset: Preset,
        dtype: torch.dtype,
        *,
        is_checked: bool,
        engine_index: int,
        keeps_recent: bool,
        cos_sin: torch.Tensor | None = None,
    ) -> None:
        """Set what vLLM's constructor does not pass.

        dtype: of K and V in full precision. is_checked: compare window and pages in every step (`checks.py`).
        engine_index: vLLM's data-parallel rank, for the counters. keeps_recent: whether there is a layer beside with
        full-precision pages. cos_sin: `attach.find_cos_sin`, for keys that are stored before RoPE.
        """
        self.layer_name, self.preset, self.dtype, self.is_checked = layer_name, preset, dtype, is_checked
        self.engine_index, self.cos_sin = engine_index, cos_sin
        self.recent_name = layer_name + RECENT_SUFFIX if keeps_recent else None
        self.clips: Sequence[float] = preset.clips
        self.tensors = (CodecTensors(), CodecTensors())
        self.layout: CellLayout | None = None
        # Made where vLLM makes the layer's weights.
        self.no_recent = torch.empty(1, self.num_kv_heads, 1, 2 * self.head_size, dtype=dtype)
        self.device = self.no_recent.device

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take this rank's part of the layer's calibration, where the engine has one."""
        from vllm_ext.kv_cache import calibrated

        self.tensors = calibrated.find_tensors(self)

    def find_layout(self, kv_cache: torch.Tensor) -> CellLayout:
        """The layout of pages uint8 [blocks, kv heads, N, C]; planned once, since N is the engine's."""
        if self.layout is None:
            self.layout = self.preset.plan_cells(self.head_size, kv_cache.shape[2])
        return self.layout

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store a step's keys and values, [tokens, kv heads, D]; rows past slot_mapping are padding."""
        layout, context = self.find_layout(kv_cache), get_forward_context()
        if context.attn_metadata is None:
            # A run without requests, as vLLM's warm-up and smartspec's sweep have: there is nothing to keep.
            return
        stored, tokens = key, slot_mapping.shape[0]
        if self.cos_sin is not None:
            position = _find(context, self.layer_name).positions
            # Rows of padding are not stored, wherever they are turned to.
            position = torch.nn.functional.pad(position, (0, len(key) - len(position)))
            stored = rotate(key, self.cos_sin[position], inverse=True)
        count_lost_groups(
            self.preset, self.tensors, stored[:tokens], value[:tokens], self.layer_name, self.engine_index
        )
        store_kv(stored, value, kv_cache, slot_mapping, layout, *self.tensors, self.clips)
        if self.recent_name is not None:
            recent, rows = context.no_compile_layers[self.recent_name], _find(context, self.recent_name)
            recent.pages[rows.block, :, rows.token] = torch.cat([key[rows.row], value[rows.row]], -1).to(self.dtype)
        observability.add("vllm_ext:kv_cache_stored_tokens_total", tokens, self.engine_index)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVCacheMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step's queries, [tokens, heads, D], into `output`; see `kv_decode.attend`."""
        if attn_metadata is None:
            # A profiling run, which has no cache yet.
            return output.zero_()
        step, preset = attn_metadata, self.preset
        layout = self.find_layout(kv_cache)
        recent, recent_table = self.no_recent, step.no_recent_table
        if self.recent_name is not None:
            context = get_forward_context()
            recent = context.no_compile_layers[self.recent_name].pages
            recent_table = _find(context, self.recent_name).block_table
        starts, lens = step.query_start_loc, step.seq_lens
        if step.completes_groups:
            store_completed_groups(
                torch.cat([key, value], -1), kv_cache, step.block_table, starts, lens, recent, recent_table, layout,
                self.tensors[0], self.clips,
            )  # fmt: skip
        if self.is_checked:
            from vllm_ext.kv_cache import checks

            checks.check_step(self, kv_cache, step, recent, recent_table, layout)
        attended = attend(
            query, key, value, kv_cache, step.block_table, starts, lens, recent, recent_table, layout, *self.tensors,
            self.scale, preset.window, preset.sinks, self.cos_sin,
        )  # fmt: skip
        output.copy_(attended)
        observability.add("vllm_ext:kv_cache_attended_tokens_total", step.num_tokens, self.engine_index)
        return output


def _find(context: Any, layer_name: str) -> Any:
    """Metadata of a layer; of several micro-batches, this one's are not told apart, and CPUs have one."""
    metadata = context.attn_metadata
    return (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
