# SPDX-License-Identifier: Apache-2.0
"""Which layout packed weights get in memory."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.native import load
from vllm_ext.quantization import resident


@pytest.mark.parametrize(
    ("isa", "variable", "expected"),
    [
        ("avx2", None, Layout.CPU_RECORD),
        ("scalar", None, Layout.PLAIN_CODES),
        ("scalar", "scalar", Layout.CPU_RECORD),
    ],
)
def test_kernels_slower_than_torch_are_used_only_where_asked_for(
    isa: str, variable: str | None, expected: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Operators:
        @staticmethod
        def isa() -> str:
            return isa

    monkeypatch.setattr(resident, "load_ops", lambda *_: Operators)
    monkeypatch.delenv(load.ISA_ENV, raising=False)
    if variable is not None:
        monkeypatch.setenv(load.ISA_ENV, variable)
    assert resident.choose_layout(torch.bfloat16, torch.device("cpu")) == expected
    assert resident.choose_layout(torch.float32, torch.device("cpu")) == Layout.PLAIN_CODES


@pytest.mark.parametrize(("sound", "expected"), [(True, Layout.GPU_FRAGMENT), (False, Layout.PLAIN_CODES)])
def test_a_gpu_gets_its_layout_where_its_kernels_pass_the_check(
    sound: bool, expected: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident.selfcheck, "is_sound", lambda device, dtype: sound)
    layout = resident.choose_layout(torch.bfloat16, torch.device("cuda"))
    assert layout == expected
    stored = BlockFormat(4, 16, 128)
    assert resident.place_in_memory(stored, layout).layout == expected
    assert resident.choose_layout(torch.float32, torch.device("cuda")) == Layout.PLAIN_CODES
