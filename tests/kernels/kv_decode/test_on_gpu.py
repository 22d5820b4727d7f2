# SPDX-License-Identifier: Apache-2.0
"""The torch reference of quantized pages gives the same on a GPU as on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOKENS, HEADS, GROUPS = 70, 2, 2
PLAIN = CodecTensors()
LAYOUTS = {
    "skvq_k2v15": plan_cells(Codec(2, 64), Codec(1.5, 64), 64, 32),
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 64, 32),
    "kvquant_k3v3": plan_cells(Codec(3, 64, outliers=2), Codec(3, 64, outliers=2), 64, 32),
}


def run_prompt(layout: CellLayout, device: str) -> torch.Tensor:
    """A prompt in one step, window 16: most of it is read from its quantized pages."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    query, key, value = draw(TOKENS, HEADS * GROUPS, 64), draw(TOKENS, HEADS, 64), draw(TOKENS, HEADS, 64)
    cache = torch.zeros(4, HEADS, layout.block_size, layout.cell_bytes, dtype=torch.uint8, device=device)
    table = torch.tensor([[2, 0, 3]], device=device)
    position = torch.arange(TOKENS, device=device)
    slots = table[0, position // 32] * 32 + position % 32
    starts, lens = torch.tensor([0, TOKENS], device=device).int(), torch.tensor([TOKENS], device=device).int()
    recent: Any = torch.empty(1, HEADS, 1, 128, device=device), table[:, :0]
    store_kv(key, value, cache, slots, layout, PLAIN, PLAIN, (1.0, 0.8))
    if layout.key.per_channel:
        both = torch.cat([key, value], -1)
        store_completed_groups(both, cache, table, starts, lens, *recent, layout, PLAIN, (1.0, 0.8))
    out = attend(query, key, value, cache, table, starts, lens, *recent, layout, PLAIN, PLAIN, 0.125, 16, 4, None)
    return out.cpu()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prompt_is_attended_as_on_a_cpu(name: str) -> None:
    outputs = [run_prompt(LAYOUTS[name], device) for device in ("cpu", "cuda")]
    # Sums of float32 in another order; a code beside the nearest one would show as 0.05.
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-3)
