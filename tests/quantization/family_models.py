# SPDX-License-Identifier: Apache-2.0
"""Small random models of every family that `quantize` knows, and plans that name all they may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.models.make_model import make_model
from vllm_ext.compress.families import QUANTIZABLE, Kind, Module
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme

#: {preset of bench.models.make_model: model_type}. Those that differ most from the shipped model come first.
FAMILY_PRESETS = {
    "tiny-deepseek-v2": "deepseek_v2",
    "tiny-mixtral": "mixtral",
    "tiny-qwen2-moe": "qwen2_moe",
    "tiny-olmoe": "olmoe",
    "tiny-qwen3-moe": "qwen3_moe",
    "tiny-deepseek-v2-grouped": "deepseek_v2",
    "tiny-llama": "llama",
    "tiny-qwen2": "qwen2",
    "tiny-qwen3": "qwen3",
}
LAYERS = 2
#: Weight-only, so that transformers in float32 computes the same.
EXPERT_SCHEMES = ("w2a16_g32", "w4a16_g128", "w3a16_g64", "w8a16_g-1_sym", "w16a16", "w6a16_g64_sym", "w5a16_g32")
LINEAR_SCHEMES = ("w4a16_g64", "w6a16_g128", "w3a16_g32", "w8a16_g-1_sym")


def make_family(preset: str, directory: Path, **sizes: Any) -> Path:
    """A random model of two layers."""
    return make_model(preset, directory, **{"layers": LAYERS, **sizes})


def make_full_plan(model: Path, split: int = 1) -> Plan:
    """Every expert, attention and dense linear, schemes dealt in turn; parts that vLLM fuses share theirs.

    split: ranks that inputs are divided over, whose parts are whole groups.
    """
    source = open_source(model)
    modules: dict[str, Any] = {}
    fused: dict[tuple[str, tuple[str, ...]], str] = {}
    for number, module in enumerate(m for m in source.modules.values() if m.kind in QUANTIZABLE):
        fitting = [name for name in LINEAR_SCHEMES if _fits(name, module, split)]
        if module.kind is Kind.EXPERT:
            experts = [name for name in EXPERT_SCHEMES if _fits(name, module, split)]
            gate_up, down = (experts[(factor * number) % len(experts)] for factor in (1, 3))
            modules[module.path] = {"gate_up": gate_up, "down": down}
            continue
        parent, _, name = module.path.rpartition(".")
        group = next((group for group in source.family.fused if name in group), (name,))
        modules[module.path] = fused.setdefault((parent, group), fitting[number % len(fitting)])
    return Plan.parse(modules)


def _fits(name: str, module: Module, split: int) -> bool:
    """Whether every block takes a scheme, and a rank's part of its inputs whole groups and bytes."""
    scheme = Scheme.parse(name)
    parts = [block.K // split for block in module.blocks]
    return all(part % max(scheme.group_size, 1) == 0 and part % 32 == 0 for part in parts)


def write_plan(plan: Plan, path: Path) -> Path:
    """A plan file for `vllm-ext quantize --plan`."""
    path.write_text(json.dumps(plan.to_config()))
    return path
