# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a transformers model whose attention goes through quantized pages, without a serving engine.

Every layer stores its keys and values and attends by the reference ops, a whole window as one step: since what a query
reads depends on positions alone, that is what an engine computes token by token.

    python -m tests.kv_cache.quality_probe bench/models/tiny_moe --context 512 --windows 8 kjv_val.txt py_val.txt
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from bench.quality.kv_models import NAIVE
from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.evaluation import measure_perplexity
from vllm_ext.compress.profile import load_model
from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_decode.rope import rotate
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.calibration import calibrate_layer
from vllm_ext.kv_cache.presets import PRESETS, Preset

BLOCK_SIZE = 128
#: The name under which transformers finds the probe's attention.
INTERFACE = "kv_quality_probe"

LayerTensors = dict[int, tuple[CodecTensors, CodecTensors]]


class Probe:
    """The attention of every layer: `presets` are stored and read; what goes in is kept in `seen` where recording."""

    def __init__(self, model: Any, preset: Preset, tensors: LayerTensors | None = None, record: bool = False) -> None:
        self.rotary = model.model.rotary_emb
        self.preset, self.tensors, self.record = preset, tensors or {}, record
        self.seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        scaling: float,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """query [batch, heads, tokens, D], key and value [batch, kv heads, tokens, D] -> [batch, tokens, heads, D]."""
        batch, _, length, head_dim = query.shape
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        preset, layer = self.preset, module.layer_idx
        positions = torch.arange(length)
        cos_sin, stored_key, stored_query = None, key, query
        if preset.pre_rope:
            cos, sin = self.rotary(key, positions[None])
            cos_sin = torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], -1)
            stored_key = rotate(key, cos_sin.repeat(batch, 1), inverse=True)
            stored_query = rotate(query, cos_sin.repeat(batch, 1), inverse=True)
        if self.record:
            self.seen.setdefault(layer, []).append((stored_key, value, stored_query))
        layout = preset.plan_cells(head_dim, BLOCK_SIZE)
        key_tensors, value_tensors = self.tensors.get(layer, (CodecTensors(), CodecTensors()))
        blocks = -(-length // BLOCK_SIZE)
        cache = torch.zeros(batch * blocks, key.shape[1], BLOCK_SIZE, layout.cell_bytes, dtype=torch.uint8)
        table = torch.arange(batch * blocks).view(batch, blocks)
        starts = torch.arange(batch + 1) * length
        lens = torch.full((batch,), length)
        slots = (table[:, :1] * BLOCK_SIZE + positions).flatten()
        store_kv(stored_key, value, cache, slots, layout, key_tensors, value_tensors, preset.clips)
        # The whole window is one step, so nothing is kept from steps before.
        recent, recent_table = key.new_zeros(1, key.shape[1], 1, 2 * head_dim), torch.zeros(batch, 1)
        if preset.key.per_channel:
            step = torch.cat([stored_key, value], -1)
            store_completed_groups(
                step, cache, table, starts, lens, recent, recent_table, layout, key_tensors, preset.clips
            )
        out = attend(
            query, key, value, cache, table, starts, lens, recent, recent_table, layout, key_tensors, value_tensors,
            scaling, preset.window, preset.sinks, cos_sin,
        )  # fmt: skip
        return out.unflatten(0, (batch, length)), None


@contextmanager
def attention(model: Any, probe: Probe | None) -> Iterator[None]:
    """Let the model's attention be the probe; None: as it is."""
    before = model.config._attn_implementation
    if probe is not None:
        AttentionInterface.register(INTERFACE, probe)
        model.config._attn_implementation = INTERFACE
    try:
        yield
    finally:
        model.config._attn_implementation = before


def measure_preset(model: Any, windows: Any, preset: Preset | None, tensors: LayerTensors | None = None) -> float:
    """Perplexity of windows, int64 [windows, context], with the cache quantized; None: as the model is."""
    with attention(model, None if preset is None else Probe(model, preset, tensors)):
        return measure_perplexity(model, windows)


def calibrate_model(model: Any, windows: Any, preset: Preset) -> LayerTensors:
    """Calibrate every layer on windows of text, int64 [windows, context], run unquantized."""
    everything = dataclasses.replace(preset, window=windows.shape[1] + preset.extra_window)
    probe = Probe(model, everything, record=True)
    with attention(model, probe):
        measure_perplexity(model, windows)
    return {
        layer: calibrate_layer(
            *(torch.cat(parts) for parts in list(zip(*seen, strict=True))[:2]),
            preset,
            torch.cat([part[2] for part in seen]),
        )
        for layer, seen in probe.seen.items()
    }


def main() -> None:
    """Print a row per preset: perplexity on each text, and how much worse than bf16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", nargs="+", help="files of the model's directory")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, torch.float32), load_tokenizer(options.model)
    texts = {
        text: cut_windows(options.model / text, tokenizer, options.context)[: options.windows] for text in options.texts
    }
    plain = {text: measure_preset(model, windows, None) for text, windows in texts.items()}
    print(f"context {options.context}, {options.windows} windows; bf16:", {k: round(v, 3) for k, v in plain.items()})
    train = [options.model / text.replace("_val", "_train") for text in options.texts]
    calibration = torch.cat([torch.from_numpy(cut_windows(path, tokenizer, 512)[:4]) for path in train]).numpy()
    for preset in [NAIVE, *(PRESETS[name] for name in options.presets)]:
        arms = {"": None} if preset is NAIVE else {"": None, "calibrated": calibrate_model(model, calibration, preset)}
        for arm, tensors in arms.items():
            worse = [
                f"{100 * (measure_preset(model, windows, preset, tensors) / plain[text] - 1):+8.2f} %"
                for text, windows in texts.items()
            ]
            print(f"{preset.name:14s} {arm:11s}", *worse, flush=True)


if __name__ == "__main__":
    main()
