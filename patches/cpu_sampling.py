# SPDX-License-Identifier: Apache-2.0
"""vllm/v1/sample/rejection_sampler.py: the temperature, top-k and top-p of drafted tokens on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from vllm_ext.patches.wrapping import wrap


def wrap_expand_batch_to_tokens() -> None:
    """Expand values of requests to their drafted tokens in plain torch where these are on the CPU.

    There vLLM 0.32's kernel (vllm/utils/cpu_triton_utils.py, `_expand_kernel_impl`) fills an int64 copy of the result
    and drops the copy: logits are divided by memory that nobody wrote, and what is accepted does not have the model's
    distribution. A batch of greedy requests alone does not read it.
    """
    from vllm.v1.sample import rejection_sampler

    wrap(rejection_sampler, "expand_batch_to_tokens", _expand_on_cpu)


def _expand_on_cpu(original: Any) -> Any:
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        return expand(x, cu_num_tokens, num_tokens, replace_from, replace_to)

    return expand_batch_to_tokens


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value for each of its tokens, [num_tokens] of x's dtype.

    x: [requests]. cu_num_tokens: int [requests], running totals of tokens. Values equal to replace_from become
    replace_to. Source: vLLM's `rejection_sampler.expand_batch_to_tokens`, in plain torch.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts, output_size=num_tokens)
