# SPDX-License-Identifier: Apache-2.0
"""Plots are PNG files; without matplotlib the message names the extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_ext.compress import figures
from vllm_ext.compress.figures import FigureError, check_figures, open_figure, plot_profile
from vllm_ext.compress.profile import ActivationProfile


def test_heat_map_of_layers_with_different_experts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the bench extra brings")
    counts = {"model.layers.0.mlp.experts": np.array([3, 1]), "model.layers.1.mlp.experts": np.zeros(4, np.int64)}
    plot_profile(tmp_path / "profile.png", ActivationProfile(4, counts, counts))
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_after_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the bench extra brings")
    with pytest.raises(RuntimeError, match="while drawing"), open_figure(tmp_path / "a.png", width=2, height=2):
        raise RuntimeError("while drawing")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(FigureError, match=r"plots need matplotlib: pip install 'vllm-ext\[bench\]'"):
        check_figures()
