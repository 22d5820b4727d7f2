# SPDX-License-Identifier: Apache-2.0
"""What is hard on a quantized KV cache, and what is bad at it: planted outliers and biases in K; two naive bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.models.make_model import make_model
from vllm_ext.kv_cache.presets import PRESETS

#: Two bits, a whole head in one group, nothing in full precision and no clip: what presets are measured against.
NAIVE = replace(PRESETS["skvq_k2v2"], name="naive_2_bits", window=0, sinks=0, clips=(1.0,))
#: Of the model with planted outliers: four layers of two kv heads of 128.
PLANTED_SHAPE: dict[str, Any] = {"hidden": 512, "heads": 4, "kv_heads": 2, "intermediate": 512, "layers": 4}
#: Channels of K per head: so many are so much larger, and so many others stand off zero by a constant. Pairs of
#: channels that RoPE turns into each other are changed together, so that Q can be made smaller by the same factor.
LARGE_PAIRS, LARGE = 3, 12.0
BIASED_PAIRS, BIAS = 3, 8.0


def make_planted_model(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2-like model whose keys have a few large channels and a few with large biases, as Qwen2.5's do.

    Q is divided by what K is multiplied by: scores of the large channels are those of the unchanged model, so what an
    arm loses is lost in the cache. Q of the biased channels is divided, too, so that the biases alone do not decide.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    make_model("tiny-qwen2", partial, seed=seed, **PLANTED_SHAPE)
    (path,) = partial.glob("*.safetensors")
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = PLANTED_SHAPE["heads"], PLANTED_SHAPE["kv_heads"]
    head_dim = PLANTED_SHAPE["hidden"] // heads
    for layer in range(PLANTED_SHAPE["layers"]):
        factor, bias = torch.ones(kv_heads, head_dim), torch.zeros(kv_heads, head_dim)
        for head in range(kv_heads):
            pairs = torch.randperm(head_dim // 2, generator=generator)[: LARGE_PAIRS + BIASED_PAIRS]
            for half in (0, head_dim // 2):
                factor[head, pairs[:LARGE_PAIRS] + half] = LARGE
                signs = torch.randint(0, 2, (BIASED_PAIRS,), generator=generator) * 2.0 - 1
                bias[head, pairs[LARGE_PAIRS:] + half] = signs * BIAS
        smaller = torch.where(bias != 0, 1 / BIAS, 1 / factor).repeat_interleave(heads // kv_heads, 0).flatten()
        prefix = f"model.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            key, query = f"{prefix}.k_proj.{kind}", f"{prefix}.q_proj.{kind}"
            shape = (-1, 1) if kind == "weight" else (-1,)
            tensors[key] = (tensors[key].float() * factor.view(shape)).bfloat16()
            tensors[query] = (tensors[query].float() * smaller.view(shape)).bfloat16()
        tensors[f"{prefix}.k_proj.bias"] = (tensors[f"{prefix}.k_proj.bias"].float() + bias.flatten()).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    partial.rename(folder)
    return folder


def draw_tokens(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts, int [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Any = torch.randint(5, vocabulary, (count, length), generator=generator).tolist()
    return list(drawn)
