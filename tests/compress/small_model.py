# SPDX-License-Identifier: Apache-2.0
"""Random Qwen3-MoE directories, small enough to quantize in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 2, 4, 128, 64
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "vocab_size": 96,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": True,
}


def make_tensors(seed: int = 0, dense_layer: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of the model; `dense_layer` has one dense MLP instead of experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(CONFIG["vocab_size"], HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, rows in (("q", 128), ("k", 64), ("v", 64), ("o", 128)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = draw(rows, HIDDEN)
        if layer == dense_layer:
            add_mlp(tensors, f"{prefix}.mlp", CONFIG["intermediate_size"], draw)
            continue
        tensors[f"{prefix}.mlp.gate.weight"] = draw(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            add_mlp(tensors, f"{prefix}.mlp.experts.{expert}", INTERMEDIATE, draw)
    return tensors


def add_mlp(tensors: dict[str, torch.Tensor], path: str, intermediate: int, draw: Any) -> None:
    tensors[f"{path}.gate_proj.weight"] = draw(intermediate, HIDDEN)
    tensors[f"{path}.up_proj.weight"] = draw(intermediate, HIDDEN)
    tensors[f"{path}.down_proj.weight"] = draw(HIDDEN, intermediate)


def write_model(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Write the model, config.json changed by `config`; returns the directory."""
    directory.mkdir(parents=True)
    save_file(make_tensors() if tensors is None else tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "generation_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "notes.txt").write_text("not part of the model")
    return directory


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Rewrite model.safetensors with tensors replaced, or removed where the value is None. Dots are written __."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, path, {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of quantization_config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
