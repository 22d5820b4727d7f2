# SPDX-License-Identifier: Apache-2.0
"""A layer's steps without an engine: what its pages give back is what the presets say, however a prompt is cut."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache import backend
from vllm_ext.kv_cache.backend import KVCacheImpl, KVCacheMetadataBuilder, list_positions, make_backend
from vllm_ext.kv_cache.calibrate_attention import Angles, attend, mark_full_precision, read_back, read_key, score
from vllm_ext.kv_cache.presets import PRESETS, Preset, get_preset
from vllm_ext.kv_cache.recent_layer import RecentMetadataBuilder

HEADS, KV_HEADS, HEAD_DIM, BLOCK, PAGE = 4, 2, 64, 32, 8
#: Tokens of two requests, which run side by side.
LENGTHS = (150, 67)
SCALE = 0.3
PLAIN = CodecTensors()


def make_angles() -> torch.Tensor:
    turns = torch.arange(256.0)[:, None] / 10000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return torch.cat([turns.cos(), turns.sin()], -1)


class Layer:
    """One attention layer with its pages, and a forward context for its steps."""

    def __init__(self, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.preset = preset
        layout = preset.plan_cells(HEAD_DIM, BLOCK)
        blocks = -(-max(LENGTHS) // BLOCK)
        # Beside pages of other layers, as in a block-outermost cache; cells that nobody wrote hold anything.
        size = KV_HEADS * BLOCK * layout.cell_bytes
        whole = torch.randint(0, 256, (2 * blocks, 64 + size), dtype=torch.uint8)
        self.cache = whole[:, 64:].unflatten(1, (KV_HEADS, BLOCK, layout.cell_bytes))
        self.table = torch.randperm(2 * blocks).view(2, blocks).int()
        pages = -(-max(LENGTHS) // PAGE)
        self.recent_table = 1 + torch.arange(2 * pages).view(2, pages).int()
        recent = SimpleNamespace(pages=torch.full((1 + 2 * pages, KV_HEADS, PAGE, 2 * HEAD_DIM), torch.nan))
        self.impl = KVCacheImpl(HEADS, HEAD_DIM, SCALE, KV_HEADS)
        self.cos_sin = make_angles() if preset.pre_rope else None
        self.impl.attach(
            "a", preset, torch.float32, is_checked=True, engine_index=0, keeps_recent=preset.keeps_recent,
            cos_sin=self.cos_sin,
        )  # fmt: skip
        self.context = SimpleNamespace(no_compile_layers={"a.recent": recent}, attn_metadata={})
        monkeypatch.setattr(backend, "get_forward_context", lambda: self.context)

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: list[int], lens: list[int]
    ) -> Any:
        """One step of both requests, [tokens, heads, D]; two rows of padding at its end."""
        query_start_loc, seq_lens = torch.tensor(starts).int(), torch.tensor(lens).int()
        position = list_positions(query_start_loc, seq_lens, starts[-1])
        request = torch.repeat_interleave(query_start_loc.diff())
        slots = {
            name: table[request, position // size].long() * size + position % size
            for name, table, size in (("a", self.table, BLOCK), ("a.recent", self.recent_table, PAGE))
        }
        device: Any = torch.device("cpu")
        for name, builder_class, table, size in (
            ("a", make_backend(self.preset).get_builder_cls(), self.table, BLOCK),
            ("a.recent", RecentMetadataBuilder, self.recent_table, PAGE),
        ):
            builder: Any = builder_class(SimpleNamespace(block_size=size), [name], None, device)
            common: Any = SimpleNamespace(
                query_start_loc=query_start_loc, query_start_loc_cpu=query_start_loc, seq_lens=seq_lens,
                block_table_tensor=table, slot_mapping=slots[name],
            )  # fmt: skip
            self.context.attn_metadata[name] = builder.build(0, common)
        rows = [torch.cat([x, torch.full_like(x[:2], torch.nan)]) for x in (query, key, value)]
        self.impl.do_kv_cache_update(torch.nn.Identity(), rows[1], rows[2], self.cache, slots["a"])
        output = torch.empty_like(rows[0])
        metadata = self.context.attn_metadata["a"]
        return self.impl.forward(torch.nn.Identity(), *rows, self.cache, metadata, output)[: len(query)]


def draw(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, key and value of every request, float32 [tokens, heads, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    drawn = [[torch.randn(length, heads, HEAD_DIM, generator=generator) for heads in shapes] for length in LENGTHS]
    return [(one[0], one[1], one[2]) for one in drawn]


def run_in_steps(layer: Layer, requests: Any, cuts: list[list[int]]) -> list[torch.Tensor]:
    """Outputs of both requests. cuts: of each, the same number of places in order."""
    outputs: list[list[torch.Tensor]] = [[], []]
    for (first, end), (other_first, other_end) in zip(*map(itertools.pairwise, cuts), strict=True):
        spans = ((first, end), (other_first, other_end))
        rows = [
            torch.cat([request[side][begin:stop] for request, (begin, stop) in zip(requests, spans, strict=True)])
            for side in range(3)
        ]
        starts = [0, end - first, end - first + other_end - other_first]
        out = layer.run(rows[0], rows[1], rows[2], starts, [end, other_end])
        for output, part in zip(outputs, out.split([starts[1], starts[2] - starts[1]]), strict=True):
            output.append(part)
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("name", [*PRESETS, "k3v8", "k15v4"])
def test_pages_give_back_what_the_preset_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    preset = dataclasses.replace(get_preset(name), window=20, sinks=3).fit(HEAD_DIM)
    requests = draw(1)
    cuts = [[0, 1, 64, 65, 100, 149, 150], [0, 33, 40, 41, 64, 66, 67]]
    found = run_in_steps(Layer(preset, monkeypatch), requests, cuts)
    whole = run_in_steps(Layer(preset, monkeypatch), requests, [[0, 150], [0, 67]])
    for (query, key, value), output, once in zip(requests, found, whole, strict=True):
        # The formulas of calibration, which know no pages.
        angles = Angles(make_angles()) if preset.pre_rope else None
        exact, read = score(query, key, SCALE), score(query, read_key(key, preset, PLAIN, angles), SCALE)
        read_value = read_back(value, preset.value, PLAIN, preset.clips)
        expected = attend(exact, read, value, read_value, mark_full_precision(len(key), preset))
        assert torch.allclose(output, expected, atol=2e-5)
        assert torch.allclose(output, once, atol=2e-5)


def test_runs_without_requests_store_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """smartspec's sweep has slots, and no metadata."""
    layer = Layer(PRESETS["skvq_k2v2"].fit(HEAD_DIM), monkeypatch)
    before, (query, key, value) = layer.cache.clone(), draw(0)[0]
    layer.context.attn_metadata = None
    layer.impl.do_kv_cache_update(torch.nn.Identity(), key, value, layer.cache, torch.arange(len(key)))
    assert torch.equal(layer.cache, before)
    output = torch.ones_like(query)
    assert not bool(layer.impl.forward(torch.nn.Identity(), query, key, value, layer.cache, None, output).any())


def test_positions_of_a_step() -> None:
    """A prompt's second chunk, a request without tokens in this step, and one that decodes."""
    positions = list_positions(torch.tensor([0, 3, 3, 4]), torch.tensor([10, 5, 8]), 4)
    assert positions.tolist() == [7, 8, 9, 7]


@pytest.mark.parametrize("builder", [KVCacheMetadataBuilder, RecentMetadataBuilder])
def test_metadata_that_waits_for_counts_promises_no_graphs(builder: Any) -> None:
    assert builder._cudagraph_support is AttentionCGSupport.NEVER
