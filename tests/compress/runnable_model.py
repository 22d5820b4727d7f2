# SPDX-License-Identifier: Apache-2.0
"""Random Qwen3-MoE directories that transformers runs, with gains, biases and shapes that hide no mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 4, 64, 32, 96


def write_runnable(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a model whose tensors are all random, the gains around one; returns the directory."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": 96, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "mlp_only_layers": [1],
        "decoder_sparse_step": 1, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((0.1 if name.endswith("bias") else 1.0) + 0.3 * draw)
            else:
                # A few columns are much larger, as outliers of trained models are.
                outliers = torch.rand(parameter.shape[-1], generator=generator) < 0.05
                parameter.copy_(draw / parameter.shape[-1] ** 0.5 * (1 + 4 * outliers))
    model.to(dtype).save_pretrained(directory)
    return directory


def make_tokens(windows: int = 6, context: int = 24, seed: int = 1) -> np.ndarray:
    """Random windows, int64 [windows, context], with some tokens far more frequent than others."""
    generator = np.random.default_rng(seed)
    return (VOCABULARY * generator.random((windows, context)) ** 2).astype(np.int64)


def add_tokenizer(directory: Path) -> None:
    """Give a model a tokenizer of its vocabulary's size: words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(directory)


def write_random_text(path: Path, num_tokens: int) -> Path:
    """So many words of the tokenizer above, some far more often than others."""
    words = np.random.default_rng(0).random(num_tokens) ** 2 * VOCABULARY
    path.write_text(" ".join(f"w{int(word)}" for word in words))
    return path
