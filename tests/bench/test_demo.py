# SPDX-License-Identifier: Apache-2.0
"""The demonstration without servers: what it counts, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench import demo


class Exposition:
    """Stands where the server does; only its metrics are read."""

    def __init__(self, **values: float | None) -> None:
        self.values = values

    def read_metric(self, name: str) -> float | None:
        return self.values.get(name.removeprefix("vllm_ext:mxmoe_"))


def test_expert_weights_of_the_shipped_model() -> None:
    # 5 layers, 16 experts, 3 projections of 256 x 128, two bytes each.
    weights = 5 * 16 * 3 * 256 * 128
    assert demo.count_expert_weights(demo.MODEL) == (2 * weights, weights)


def test_expert_weights_are_summed_over_files(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    save_file({name.format(0): torch.zeros(3, 5), "model.norm.weight": torch.ones(7)}, tmp_path / "a.safetensors")
    save_file({name.format(1): torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    assert demo.count_expert_weights(tmp_path) == (15 * 4 + 4 * 2, 19)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(7)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no tensor with '\.experts\.'"):
        demo.count_expert_weights(tmp_path)


def test_bits_come_from_the_metrics() -> None:
    server: Any = Exposition(weight_bytes=375.0, weight_count=1000.0)
    assert demo.read_mxmoe_metrics(server, 1000) == (375, 3.0)


def test_missing_metrics_are_named() -> None:
    server: Any = Exposition(weight_count=1000.0)
    with pytest.raises(ValueError, match=r"no vllm_ext:mxmoe_weight_bytes; run `vllm-ext doctor`"):
        demo.read_mxmoe_metrics(server, 1000)


def test_uncounted_weights_are_refused() -> None:
    server: Any = Exposition(weight_bytes=375.0, weight_count=900.0)
    with pytest.raises(ValueError, match="is 900, but the model has 1000"):
        demo.read_mxmoe_metrics(server, 1000)


def test_failed_step_is_named_with_the_end_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A real `vllm serve` refuses this option before it imports much.
    monkeypatch.setitem(demo.ARMS, "bf16", ["--no-such-option"])
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert demo.main(["--windows", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "demo failed: bf16: start vllm serve --no-such-option: the server ended" in captured.err
    assert "unrecognized arguments: --no-such-option" in captured.err
    assert f"logs: {tmp_path}" in captured.err
    assert (tmp_path / "bf16.log").is_file()


def test_bad_usage_ends_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--windows", "-1"])
