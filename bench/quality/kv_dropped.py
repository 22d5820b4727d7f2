# SPDX-License-Identifier: Apache-2.0
"""What a model loses when a cache stores nothing: the arm that says whether a task can judge a cache at all.

Where a model needs no more than the window and the sinks, every cache looks perfect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm_ext.kv_cache.calibrate_attention import Handler
    from vllm_ext.kv_cache.presets import Preset

#: Perplexity without the past, over perplexity with it, from which a text can judge caches.
LEAST_LOSS = 1.02


def drop_past(preset: Preset) -> Handler:
    """Attention of a transformers model whose queries read the window and the sinks of a preset alone."""
    import torch

    from vllm_ext.kv_cache.calibrate_attention import attend, mark_full_precision, score

    def run(module: object, query: Any, key: Any, value: Any, scaling: float) -> Any:
        outputs = []
        for one_query, one_key, one_value in zip(query, key, value, strict=True):
            exact = score(one_query, one_key, scaling)
            unread = torch.full_like(exact, -math.inf)
            is_full = mark_full_precision(len(one_key), preset)
            outputs.append(attend(exact, unread, one_value, torch.zeros_like(one_value.float()), is_full))
        return torch.stack(outputs).to(query)

    return run


def measure_dropped(model: Any, windows: np.ndarray, preset: Preset) -> float:
    """Perplexity of windows, int64 [windows, context], where queries read the window and sinks of a preset alone.

    model: of transformers. Without the engine, like the calibration of a cache.
    """
    import torch

    from vllm_ext.kv_cache.calibrate_attention import run_model

    total, handler = 0.0, drop_past(preset)
    for window in torch.from_numpy(np.asarray(windows)).split(1):
        logits = run_model(model, window, handler, logits=True)
        assert logits is not None
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum"))
    return math.exp(total / (len(windows) * (np.shape(windows)[1] - 1)))


def answer_dropped(model: Any, prompts: Sequence[Sequence[int]], keys: Sequence[Sequence[int]], preset: Preset) -> Any:
    """The tokens that a model would answer, int64 [prompts, tokens], with the past dropped as above.

    Every token is asked after the right ones before it, which can only help.
    """
    import torch

    from vllm_ext.kv_cache.calibrate_attention import run_model

    handler, answers = drop_past(preset), []
    for prompt, key in zip(prompts, keys, strict=True):
        logits = run_model(model, torch.tensor([[*prompt, *key]]), handler, logits=True)
        assert logits is not None
        answers.append(logits[0, len(prompt) - 1 : -1].argmax(-1))
    return torch.stack(answers).numpy()


def measure_loss(directory: Path, prompts: list[list[int]], preset: Preset) -> float:
    """Perplexity without the past over that of the model as it is, on prompts of one length, in float32."""
    import torch

    from vllm_ext.compress.evaluation import measure_perplexity
    from vllm_ext.compress.profile import load_model

    model, windows = load_model(directory, torch.float32), np.array(prompts)
    return measure_dropped(model, windows, preset) / measure_perplexity(model, windows)
