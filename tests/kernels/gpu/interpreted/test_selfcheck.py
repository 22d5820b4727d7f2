# SPDX-License-Identifier: Apache-2.0
"""The check before a model relies on the kernels: silent where they are right, and it does notice where not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from vllm_ext.kernels.gpu import selfcheck
from vllm_ext.kernels.mixed_moe import triton

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget() -> None:
    selfcheck.is_sound.cache_clear()


@pytest.mark.slow
def test_right_kernels_are_trusted() -> None:
    assert selfcheck.is_sound(CPU, torch.bfloat16)


def test_a_float32_model_is_not_asked_about() -> None:
    assert not selfcheck.is_sound(CPU, torch.float32)


def test_a_wrong_order_of_rows_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = triton.mixed_moe

    def swap_neighbours(*arguments: Any, **options: Any) -> torch.Tensor:
        out = real(*arguments, **options)
        assert out is not None
        return out.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    monkeypatch.setattr(triton, "mixed_moe", swap_neighbours)
    with caplog.at_level(logging.ERROR, logger="vllm.vllm_ext.kernels"):
        assert not selfcheck.is_sound(CPU, torch.bfloat16)
    assert "w2-8a16 in tiles of 16 tokens: relative error 0.5" in caplog.text


def test_a_compiler_that_gives_up_is_a_fault(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(triton, "mixed_moe", fail)
    with caplog.at_level(logging.ERROR, logger="vllm.vllm_ext.kernels"):
        assert not selfcheck.is_sound(CPU, torch.float16)
    assert "RuntimeError: no kernel image" in caplog.text
