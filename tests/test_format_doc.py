# SPDX-License-Identifier: Apache-2.0
"""The reader printed in docs/format.md, run as it stands there, against the kernel that serves the same files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compress.small_model import EXPERTS, HIDDEN, INTERMEDIATE, write_model
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.kernels.arena import BlockFormat, view_block
from vllm_ext.kernels.mixed_moe.layout import Block, plan_arena
from vllm_ext.kernels.mixed_moe.reference import mixed_moe
from vllm_ext.quantization.checkpoint import Checkpoint, read_module, validate_checkpoint
from vllm_ext.quantization.plan import ExpertSchemes, Plan
from vllm_ext.quantization.scheme import Scheme

MAX_LINES = 60
#: By layer: every width, both activation widths, symmetric or not, and a block in full precision; and ternary ones.
SCHEMES = {
    0: [
        ("w1.6a16_g128_sym", "w1.6a8_g32_sym"),
        ("w1.6a8_g64_sym", "w1.6a16_g-1_sym"),
        ("w1.6a16_g-1_sym", "w1.6a16_g64_sym"),
        ("w1.6a16_g32_sym", "w2a16_g64_sym"),
    ],
    1: [
        ("w2a16_g32", "w3a16_g64"),
        ("w5a16_g128", "w4a8_g32_sym"),
        ("w6a8_g-1_sym", "w8a16_g-1"),
        ("w16a16", "w3a8_g32"),
    ],
}


def find_path(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


@pytest.fixture(scope="module")
def reader(repository: Path) -> dict[str, Any]:
    text = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= MAX_LINES
    imports = re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE)
    assert set(imports) == {"json", "pathlib", "numpy"}
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/format.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format")
    plan = {
        f"{find_path(layer)}.experts.{expert}": {"gate_up": gate_up, "down": down}
        for layer, pairs in SCHEMES.items()
        for expert, (gate_up, down) in enumerate(pairs)
    }
    quantize_model(write_model(folder / "model"), folder / "packed", plan=Plan.parse(plan), shard_bytes=50_000)
    return folder / "packed"


def describe(scheme: Scheme) -> BlockFormat:
    if scheme.is_ternary:
        return BlockFormat.ternary(scheme.act_bits, scheme.group_size)
    if not scheme.is_quantized:
        return BlockFormat.full_precision(torch.bfloat16)
    return BlockFormat(scheme.code_bits, scheme.act_bits, scheme.group_size, scheme.symmetric)


def run_kernel(checkpoint: Checkpoint, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by the reference kernel, on an arena filled from the checkpoint."""
    formats, blocks = [], []
    for expert in range(EXPERTS):
        module = f"{find_path(layer)}.experts.{expert}"
        schemes = checkpoint.plan.modules[module]
        assert isinstance(schemes, ExpertSchemes)
        tensors = {path.rpartition(".")[2]: value for path, value in read_module(checkpoint, module).items()}
        blocks.append([[tensors["gate_proj"], tensors["up_proj"]], [tensors["down_proj"]]])
        formats.append((describe(schemes.gate_up), describe(schemes.down)))
    plan = plan_arena(formats, HIDDEN, INTERMEDIATE)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    for expert in range(EXPERTS):
        for block, K in ((Block.GATE_UP, HIDDEN), (Block.DOWN, INTERMEDIATE)):
            row, parts = plan.table[expert, block].tolist(), blocks[expert][block]
            stacked = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
            N = next(iter(stacked.values())).shape[0]
            for suffix, place in view_block(arena, row, N, K).items():
                place.copy_(stacked[suffix])
    logits = x @ checkpoint.reader.read(f"{find_path(layer)}.gate.weight").float().T
    weights, ids = logits.softmax(-1).topk(checkpoint.config["num_experts_per_tok"])
    weights = weights / weights.sum(-1, keepdim=True)
    return mixed_moe(x, ids.int(), weights, arena, plan.table, None, INTERMEDIATE, "silu", False)


@pytest.mark.parametrize("layer", SCHEMES)
def test_reader_of_the_page_agrees_with_the_kernel(reader: dict[str, Any], directory: Path, layer: int) -> None:
    x = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = run_kernel(validate_checkpoint(directory), layer, x)
    found = reader["moe_layer"](directory, layer, x.numpy())
    assert found.dtype == np.float32
    # Only the order of float32 sums differs; an activation near the border between two codes may take the other.
    assert np.abs(found - expected.numpy()).max() < 2e-3 * float(expected.abs().max())
    assert np.median(np.abs(found - expected.numpy())) < 1e-6 * float(expected.abs().max())
