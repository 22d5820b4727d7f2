# SPDX-License-Identifier: Apache-2.0
"""Plots of the offline tools, as PNG files; matplotlib is needed for them alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_ext.compress.profile import ActivationProfile


class FigureError(ValueError):
    """A plot that cannot be made; the message names the fix."""


def check_figures() -> None:
    """Raises FigureError where matplotlib is not installed: before the work whose result is to be plotted."""
    if find_spec("matplotlib") is None:
        raise FigureError("plots need matplotlib: pip install 'vllm-ext[bench]'")


@contextmanager
def open_figure(path: Path, *, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of some inches, saved as PNG, in one step, when the context ends without an error.

    Raises FigureError where matplotlib is not installed, OSError where the file cannot be written.
    """
    check_figures()
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plot_profile(path: Path, profile: ActivationProfile) -> None:
    """Heat map of routing: share of a layer's routed tokens, by layer and expert. Raises as `open_figure`."""
    layers = list(profile.counts)
    shares = [profile.counts[layer] / max(profile.counts[layer].sum(), 1) for layer in layers]
    most = max(len(row) for row in shares)
    with open_figure(path, width=2.5 + 0.12 * most, height=1.6 + 0.22 * len(layers)) as figure:
        axes = figure.subplots()
        # Layers may differ in experts: missing ones stay empty.
        rows = [[*row, *[float("nan")] * (most - len(row))] for row in shares]
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set_xlabel("expert")
        axes.set_yticks(range(len(layers)), [name.removesuffix(".mlp.experts") for name in layers])
        figure.colorbar(image, ax=axes, label="share of routed tokens")
