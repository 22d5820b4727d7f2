# SPDX-License-Identifier: Apache-2.0
"""Decode attention over quantized pages beside vLLM's own CPU attention in bf16 and fp8, with the caches cold.

    python -m bench.op --bind-threads 'cpu_kv_decode_*'

Without the binding that vLLM's workers have, two OpenMP runtimes are loaded, the idle threads of one spin on the cores
of the other, and no arm's time means anything.

Arms, call by call in turn, on 8 kv heads, 32 query heads and head_dim 128:

    bf16          `cpu_attention_with_kv_cache` with the instruction set that vLLM itself chooses here
    fp8           the same over pages of `--kv-cache-dtype fp8`
    skvq_k2v2 ... a preset of ours, the last 128 tokens and the first 5 in bf16 as it is served

Each arm has a pool of pages, and every call takes other ones. Codes are random: this is speed only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from bench.op import OpCase
from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells, view_section
from vllm_ext.kernels.native.load import load_ops

KV_HEADS, HEADS, HEAD_DIM, BLOCK_SIZE = 8, 32, 128, 128
SCALE = HEAD_DIM**-0.5
WINDOW, SINKS, RECENT_TOKENS = 128, 5, 16
CONTEXTS = (2048, 8192, 32768)
BATCHES = (1, 8)
#: Bytes of every arm's pages: several times the part of a shared last-level cache that a virtual machine gets.
POOL_BYTES = 1_200_000_000

FP16 = torch.float16
LAYOUTS: dict[str, CellLayout] = {
    "skvq_k2v2": plan_cells(Codec(2, 128), Codec(2, 128), HEAD_DIM, BLOCK_SIZE),
    "skvq_k2v15": plan_cells(Codec(2, 128), Codec(1.5, 128), HEAD_DIM, BLOCK_SIZE),
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), HEAD_DIM, BLOCK_SIZE),
    "kivi_k4v4": plan_cells(Codec(4, 32, per_channel=True), Codec(4, 32), HEAD_DIM, BLOCK_SIZE),
    "kv4": plan_cells(Codec(4, 128, scale_dtype=FP16), Codec(4, 128, scale_dtype=FP16), HEAD_DIM, BLOCK_SIZE),
}
PLAIN = CodecTensors()
#: Stock's arms: {arm: its kv_cache_dtype}.
STOCK: dict[str, str] = {"bf16": "auto", "fp8": "fp8"}


class Inputs(NamedTuple):
    """Set number, query bf16 [batch, heads, D], key and value bf16 [batch, kv heads, D] of the step."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


Arm = Callable[[Inputs], torch.Tensor]


def make_inputs(batch: int) -> Callable[[int], Inputs]:
    """Input set i: other tokens, other pages."""

    def make(index: int) -> Inputs:
        generator = torch.Generator().manual_seed(index)
        query, key, value = (
            torch.randn(batch, heads, HEAD_DIM, generator=generator).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        return Inputs(index, query, key, value)

    return make


class Tables:
    """Block tables int32 [batch, blocks] of consecutive blocks, other ones for every input set."""

    def __init__(self, batch: int, tokens: int, block_tokens: int, num_blocks: int) -> None:
        self.width = -(-tokens // block_tokens)
        self.shape = (batch, self.width)
        self.num_blocks = num_blocks

    def make(self, number: int) -> torch.Tensor:
        """Of input set `number`. Block 0 is left out: in recent pages it stands for none."""
        count = self.shape[0] * self.width
        blocks = 1 + (number * count + np.arange(count)) % (self.num_blocks - 1)
        return torch.from_numpy(blocks.astype(np.int32).reshape(self.shape))


@lru_cache(maxsize=len(STOCK))
def make_stock_pool(name: str) -> torch.Tensor:
    """Pages of vLLM's layout, bf16 or uint8 [blocks, kv heads, 2 * block size, D]; any numbers will do."""
    dtype = torch.uint8 if name == "fp8" else torch.bfloat16
    blocks = POOL_BYTES // (KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM * dtype.itemsize)
    pool = torch.empty(blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_DIM, dtype=dtype)
    # Bits of numbers from 0.5 to 2, of fp8 e4m3 or of bf16.
    if name == "fp8":
        return pool.random_(0x30, 0x40)
    return pool.view(torch.int16).random_(0x3F00, 0x4000).view(torch.bfloat16)


@lru_cache(maxsize=len(LAYOUTS))
def make_pool(name: str) -> torch.Tensor:
    """Pages of a preset with random codes and ordinary scales."""
    layout = LAYOUTS[name]
    blocks = POOL_BYTES // (KV_HEADS * BLOCK_SIZE * layout.cell_bytes)
    cache = torch.randint(0, 243, (blocks, KV_HEADS, BLOCK_SIZE, layout.cell_bytes), dtype=torch.uint8)
    for codec, sections in ((layout.key, layout.key_sections), (layout.value, layout.value_sections)):
        for section, number in ((sections.scales, 0.5), (sections.lows, -0.75)):
            dtype = codec.low_dtype if section is sections.lows else codec.scale_dtype
            stored = torch.tensor([number]).to(dtype).view(torch.uint8)
            view_section(cache, section)[...] = stored.repeat(section.row_bytes // stored.numel())
    return cache


@lru_cache(maxsize=1)
def make_recent_pool() -> torch.Tensor:
    """Full-precision pages, bf16 [pages, kv heads, tokens, 2 * D]."""
    pages = POOL_BYTES // 4 // (KV_HEADS * RECENT_TOKENS * 2 * HEAD_DIM * 2)
    pool = torch.empty(pages, KV_HEADS, RECENT_TOKENS, 2 * HEAD_DIM, dtype=torch.bfloat16)
    return pool.view(torch.int16).random_(0x3F00, 0x4000).view(torch.bfloat16)


def make_stock_arm(name: str, batch: int, context: int) -> Arm:
    """vLLM's operator, with the metadata of its scheduler made once: it is shared by all layers of a step."""
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache_dtype = STOCK[name]
    isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, HEAD_DIM, cache_dtype)
    pool = make_stock_pool(name)
    key_cache, value_cache = pool.chunk(2, dim=2)
    tables = Tables(batch, context, BLOCK_SIZE, len(pool))
    lens = torch.full((batch,), context, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        batch, HEADS, KV_HEADS, HEAD_DIM, lens, torch.bfloat16, starts, True, -1, isa, True, None, cache_dtype
    )

    def run(inputs: Inputs) -> torch.Tensor:
        out = torch.empty_like(inputs.query)
        vllm_ops.cpu_attention_with_kv_cache(
            inputs.query, key_cache, value_cache, out, starts, lens, SCALE, True, None, -1,
            tables.make(inputs.number), 0.0, metadata, None, None, 1.0, 1.0, cache_dtype,
        )  # fmt: skip
        return out

    return run


def make_arm(name: str, batch: int, context: int) -> Arm:
    """Our operator as a served model calls it. Raises RuntimeError where the kernels cannot be had."""
    if load_ops() is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    layout, cache, recent = LAYOUTS[name], make_pool(name), make_recent_pool()
    tables = Tables(batch, context, BLOCK_SIZE, len(cache))
    lens = torch.full((batch,), context, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    # Pages of the sinks, of the window, and of what is read with it where keys have scales of 32 tokens.
    near = torch.arange(context // RECENT_TOKENS)
    is_near = (near * RECENT_TOKENS < SINKS) | ((near + 1) * RECENT_TOKENS > context - WINDOW - 32)
    pages = Tables(batch, int(is_near.sum()) * RECENT_TOKENS, RECENT_TOKENS, len(recent))

    def run(inputs: Inputs) -> torch.Tensor:
        recent_table = torch.zeros(batch, len(near), dtype=torch.int32)
        recent_table[:, is_near] = pages.make(inputs.number)
        return attend(
            inputs.query, inputs.key, inputs.value, cache, tables.make(inputs.number), starts, lens, recent,
            recent_table, layout, PLAIN, PLAIN, SCALE, WINDOW, SINKS,
        )  # fmt: skip

    return run


@lru_cache(maxsize=1)
def make_arms(batch: int, context: int) -> dict[str, Arm]:
    """All arms of one shape; their pools are shared by all shapes."""
    arms = {name: make_stock_arm(name, batch, context) for name in STOCK}
    return arms | {name: make_arm(name, batch, context) for name in LAYOUTS}


def delay(batch: int, context: int, arm: str) -> Arm:
    """The arm, whose pool is made by its first call: listing the cases must not take gigabytes."""
    return lambda inputs: make_arms(batch, context)[arm](inputs)


def count_bytes(arm: str, batch: int, context: int) -> int:
    """Bytes of keys and values that one call reads."""
    full = KV_HEADS * 2 * HEAD_DIM * 2
    if arm in STOCK:
        return batch * context * full // (2 if arm == "fp8" else 1)
    return batch * ((context - WINDOW) * KV_HEADS * LAYOUTS[arm].cell_bytes + (WINDOW + SINKS) * full)


def describe_kernels() -> dict[str, str]:
    """The instruction set that our operator uses here. Raises RuntimeError where it cannot be had."""
    ops = load_ops()
    if ops is None:
        raise RuntimeError("the CPU kernels are not compiled; see the warning above")
    return {"cpu_kernels": ops.isa()}


def make_case(batch: int, context: int) -> OpCase:
    """One layer, one step of decoding."""
    arms = (*STOCK, *LAYOUTS)
    return OpCase(
        case=f"cpu_kv_decode_b{batch}_{context}",
        arms={arm: delay(batch, context, arm) for arm in arms},
        make_inputs=make_inputs(batch),
        working_set_bytes={arm: count_bytes(arm, batch, context) for arm in arms},
        stock="bf16",
        settings={
            "batch": batch,
            "context": context,
            "kv_heads": KV_HEADS,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "window": WINDOW,
            "sinks": SINKS,
            "series": f"cpu_kv_decode_b{batch}",
            "series_by": "context",
        },
        features=describe_kernels,
    )


def op_cases() -> list[OpCase]:
    """All batches and contexts."""
    return [make_case(batch, context) for batch in BATCHES for context in CONTEXTS]
