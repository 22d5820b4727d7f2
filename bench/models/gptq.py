# SPDX-License-Identifier: Apache-2.0
"""Rewrite a bf16 model directory as a 4-bit checkpoint in GPTQ's format, with plain rounding.

The format is the one that AutoGPTQ and GPTQModel write (symmetric, `desc_act` false, "gptq" version 1), as read by
`vllm.model_executor.layers.quantization.auto_gptq`. Per linear layer of K inputs and N outputs:

    qweight  int32 [K/8, N]     eight codes along K in a word, the first in the lowest bits
    qzeros   int32 [K/g, N/8]   eight zero points along N in a word, each stored minus one
    scales   fp16  [K/g, N]     weight = scale * (code - zero)
    g_idx    int32 [K]          group of each input: k // g
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS = 4
CODES_PER_WORD = 32 // BITS
ZERO_POINT = 1 << (BITS - 1)

#: Parts of a layer whose weights GPTQ checkpoints hold in 4 bits; routers, norms and embeddings stay as they are.
QUANTIZED_SUFFIXES = tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def quantize_directory(directory: Path, group_size: int) -> None:
    """Replace the linear weights of `directory/model.safetensors` and set `quantization_config` in config.json.

    Raises FileNotFoundError when the weights are in several files.
    """
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path).items():
        if name.endswith(QUANTIZED_SUFFIXES):
            prefix = name.removesuffix("weight")
            tensors.update({prefix + part: value for part, value in pack_linear(weight, group_size).items()})
        else:
            tensors[name] = weight
    save_file(tensors, path, metadata={"format": "pt"})
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": BITS,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    if "num_experts" in config:
        # GPTQModel's way to say which linears are as they were: the routers.
        config["quantization_config"]["dynamic"] = {r"-:.*\.mlp\.gate$": {}}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack_linear(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """Round a weight [N, K] to 4 bits, symmetric, nearest, and pack it: the tensors of this module's docstring.

    Raises ValueError where `group_size` does not divide K, or N or K is not a multiple of 8.
    """
    import torch

    N, K = weight.shape
    if K % group_size or N % CODES_PER_WORD or K % CODES_PER_WORD:
        raise ValueError(
            f"a weight of {N} x {K} cannot be packed with group_size {group_size}: the group must divide "
            f"{K}, and both sizes must be multiples of {CODES_PER_WORD}"
        )
    groups = weight.float().view(N, K // group_size, group_size)
    largest = groups.abs().amax(dim=2)
    # The scale is rounded to its stored type first, so that codes fit what a reader multiplies by.
    scales = (largest / (ZERO_POINT - 1)).clamp_min(torch.finfo(torch.float16).tiny).to(torch.float16)
    codes = torch.round(groups / scales.float().unsqueeze(2)) + ZERO_POINT
    codes = codes.clamp_(0, 2 * ZERO_POINT - 1).to(torch.int32).view(N, K)
    zeros = torch.full((K // group_size, N), ZERO_POINT - 1, dtype=torch.int32)
    return {
        "qweight": pack_words(codes.t().contiguous(), dim=0),
        "qzeros": pack_words(zeros, dim=1),
        "scales": scales.t().contiguous(),
        "g_idx": torch.arange(K, dtype=torch.int32) // group_size,
    }


def pack_words(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack int32 codes of 0..15 [R, C], eight along `dim` to an int32 word, the first in the lowest bits."""
    import torch

    split = codes.unflatten(dim, (-1, CODES_PER_WORD)).to(torch.int64)
    shape = [1] * split.dim()
    shape[dim + 1] = CODES_PER_WORD
    words = (split << (torch.arange(CODES_PER_WORD) * BITS).view(shape)).sum(dim=dim + 1)
    # The top code reaches the sign bit: words from 2**31 on are the negative int32 of the same bits.
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack_words(words: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `pack_words`."""
    import torch

    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = CODES_PER_WORD
    codes = (words.unsqueeze(dim + 1) >> (torch.arange(CODES_PER_WORD, dtype=torch.int32) * BITS).view(shape)) & 15
    return codes.flatten(dim, dim + 1)


def unpack_linear(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weight [N, K] that a reader of the packed tensors computes with."""
    codes = unpack_words(tensors["qweight"], dim=0)
    zeros = unpack_words(tensors["qzeros"], dim=1) + 1
    group = tensors["g_idx"].long()
    return (tensors["scales"].float()[group] * (codes - zeros[group])).t().contiguous()
