# SPDX-License-Identifier: Apache-2.0
"""The values that drafted tokens are sampled with, and when vLLM's own way to get them is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

from vllm_ext.patches.cpu_sampling import expand, wrap_expand_batch_to_tokens


@given(
    st.lists(st.tuples(st.integers(-2, 5), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(-2, 5),
    st.sampled_from([torch.float32, torch.int32, torch.int64]),
)
def test_every_token_gets_the_value_of_its_request(
    requests: list[tuple[int, int]], replace_from: int, dtype: torch.dtype
) -> None:
    values, counts = torch.tensor([value for value, _ in requests], dtype=dtype), [count for _, count in requests]
    totals = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    found = expand(values, totals, sum(counts), replace_from, 9)
    assert found.dtype == dtype
    assert found.tolist() == [9 if value == replace_from else value for value, count in requests for _ in range(count)]


def expand_as_on_cpu(x: torch.Tensor, totals: torch.Tensor, count: int, old: int = 0, new: int = 0) -> Any:
    """vLLM's function with its CPU kernel, over memory that holds something else."""
    expanded = torch.full((count,), 7, dtype=x.dtype)
    cpu_triton_utils._expand_kernel_impl(expanded, x, totals, old, new)
    return expanded


def test_values_on_the_cpu_no_longer_come_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    current_platform.import_kernels()
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", expand_as_on_cpu)
    values, totals = torch.tensor([0.25, 2.0]), torch.tensor([2, 3], dtype=torch.int32)
    # If this no longer fails, vLLM has mended its kernel and the record can go.
    assert rejection_sampler.expand_batch_to_tokens(values, totals, 3).tolist() != [0.25, 0.25, 2.0]
    wrap_expand_batch_to_tokens()
    wrapped = rejection_sampler.expand_batch_to_tokens
    assert wrapped(values, totals, 3).tolist() == [0.25, 0.25, 2.0]
    wrap_expand_batch_to_tokens()
    assert rejection_sampler.expand_batch_to_tokens is wrapped


def test_other_devices_keep_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", lambda *given: asked.append(given))
    wrap_expand_batch_to_tokens()
    values, totals = torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.int32, device="meta")
    rejection_sampler.expand_batch_to_tokens(values, totals, 3, 0, 1)
    assert asked == [(values, totals, 3, 0, 1)]
