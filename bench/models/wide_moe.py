# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts whose experts are wider, and which writes the same text.

The shipped MoE is so small that what surrounds a forward pass takes longer than the pass; a random model of the size
wanted writes nothing that a drafter could foresee. Here every expert gets further channels with random weights, whose
output weights are zero: they are read and multiplied like the others, and what they add is 0.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def measure_weights(source: Path, moe_intermediate: int) -> int:
    """Bytes of the weights that `widen_experts` would write, at most."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    wider = max(1.0, moe_intermediate / config["moe_intermediate_size"])
    return int((source / "model.safetensors").stat().st_size * wider)


def widen_experts(source: Path, output: Path, moe_intermediate: int, seed: int = 0) -> Path:
    """Write the model of `source`, with `moe_intermediate` channels in each expert, into `output`; returns `output`.

    source: a directory with one safetensors file, experts under their usual names. The new rows of gate and up have
    standard deviation 1/sqrt(fan-in). Raises ValueError for fewer channels than there are.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    channels = config["moe_intermediate_size"]
    if moe_intermediate < channels:
        raise ValueError(f"moe_intermediate {moe_intermediate} is less than the experts have; give at least {channels}")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    for name in sorted(tensors):
        if ".experts." in name:
            tensors[name] = _widen(tensors[name], name, moe_intermediate, generator)
    output.mkdir(parents=True, exist_ok=True)
    for file_name in COPIED:
        shutil.copyfile(source / file_name, output / file_name)
    config["moe_intermediate_size"] = moe_intermediate
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def _widen(weight: torch.Tensor, name: str, channels: int, generator: torch.Generator) -> torch.Tensor:
    """[out, in] of one projection of one expert, with `channels` in place of the expert's own."""
    rows, columns = weight.shape
    if ".down_proj." in name:
        wide = weight.new_zeros(rows, channels)
    else:
        wide = weight.new_empty(channels, columns).normal_(0.0, 1 / math.sqrt(columns), generator=generator)
    wide[:rows, :columns] = weight
    return wide
