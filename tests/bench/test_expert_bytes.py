# SPDX-License-Identifier: Apache-2.0
"""What counts as an expert's weight, in files and in a server's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.demo import MODEL
from bench.expert_bytes import count_expert_weights, read_mxmoe_metrics


class Exposition:
    """Stands where the server does; only its metrics are read."""

    def __init__(self, **values: float | None) -> None:
        self.values = values

    def read_metric(self, name: str) -> float | None:
        return self.values.get(name.removeprefix("vllm_ext:mxmoe_"))


def test_expert_weights_of_the_shipped_model() -> None:
    # 5 layers, 16 experts, 3 projections of 256 x 128, two bytes each.
    weights = 5 * 16 * 3 * 256 * 128
    assert count_expert_weights(MODEL) == (2 * weights, weights)


def test_expert_weights_are_summed_over_files(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    save_file({name.format(0): torch.zeros(3, 5), "model.norm.weight": torch.ones(7)}, tmp_path / "a.safetensors")
    save_file({name.format(1): torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    assert count_expert_weights(tmp_path) == (15 * 4 + 4 * 2, 19)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(7)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no tensor with '\.experts\.'"):
        count_expert_weights(tmp_path)


def test_bits_come_from_the_metrics() -> None:
    server: Any = Exposition(weight_bytes=375.0, weight_count=1000.0)
    assert read_mxmoe_metrics(server, 1000) == (375, 3.0)


def test_missing_metrics_are_named() -> None:
    server: Any = Exposition(weight_count=1000.0)
    with pytest.raises(ValueError, match=r"no vllm_ext:mxmoe_weight_bytes; run `vllm-ext doctor`"):
        read_mxmoe_metrics(server, 1000)


def test_uncounted_weights_are_refused() -> None:
    server: Any = Exposition(weight_bytes=375.0, weight_count=900.0)
    with pytest.raises(ValueError, match="is 900, but the model has 1000"):
        read_mxmoe_metrics(server, 1000)
