# SPDX-License-Identifier: Apache-2.0
"""The models and prompts of the KV cache's quality tables: what is planted, what is asked, what training sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.quality import kv_cache, kv_models
from bench.quality.kv_dropped import answer_dropped
from bench.quality.kv_engine import Arm
from bench.quality.kv_models import draw_tokens, make_planted_model
from bench.quality.passkey import (
    FIRST_TOKEN,
    KEY_TOKENS,
    RETRIEVER,
    VOCABULARY,
    draw_repetitions,
    find_stage,
    make_prompts,
)
from bench.records import Metric, load_records
from vllm_ext.kv_cache.presets import PRESETS


def test_a_key_follows_its_name_and_lies_outside_of_the_window() -> None:
    prompts, keys = make_prompts(50, 300, seed=3)
    assert {len(prompt) for prompt in prompts} == {300}
    places = set()
    for prompt, key in zip(prompts, keys, strict=True):
        noise, name = prompt[:-1], prompt[-1]
        # Each token once, so that there is one answer.
        assert len(set(noise)) == len(noise)
        assert min(noise) >= FIRST_TOKEN
        assert max(noise) < VOCABULARY
        place = noise.index(name)
        assert noise[place + 1 : place + 1 + KEY_TOKENS] == key
        assert place + KEY_TOKENS < 300 - 128
        places.add(place)
    assert len(places) > 30
    assert make_prompts(50, 300, seed=3) == (prompts, keys)
    assert make_prompts(50, 300, seed=4) != (prompts, keys)


def test_training_repeats_its_noise_from_anywhere() -> None:
    tokens = draw_repetitions(20, torch.Generator().manual_seed(0))
    half = tokens.shape[1] // 2
    starts = set()
    for row in tokens.tolist():
        first, second = row[:half], row[half:]
        start = first.index(second[0])
        assert second == first[start:] + first[:start]
        starts.add(start)
    assert len(starts) > 5
    assert [find_stage(share) for share in (0.0, 0.39, 0.5, 0.9, 1.0)] == [32, 32, 80, 200, 200]


def test_planted_outliers_change_keys_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kv_models.PLANTED_SHAPE, "layers", 2)
    ids = torch.tensor(draw_tokens(1, 40, 4096, 0))

    def run(name: str, large: float, bias: float) -> torch.Tensor:
        monkeypatch.setattr(kv_models, "LARGE", large)
        monkeypatch.setattr(kv_models, "BIAS", bias)
        model = AutoModelForCausalLM.from_pretrained(make_planted_model(tmp_path / name), dtype=torch.float32)
        with torch.inference_mode():
            logits: torch.Tensor = model(ids).logits
        return logits.log_softmax(-1)

    # Powers of two, which bf16 weights take without rounding; a bias of 1 divides queries by 1.
    plain, large = run("plain", 1.0, 1.0), run("large", 16.0, 1.0)
    assert torch.allclose(plain, large, atol=1e-4)
    keys = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "large")]
    weights = [tensors["model.layers.0.self_attn.k_proj.weight"].float().norm(dim=1) for tensors in keys]
    assert sorted((weights[1] / weights[0]).round().int().unique().tolist()) == [1, 16]
    assert int((weights[1] > 8 * weights[0]).sum()) == 2 * 2 * kv_models.LARGE_PAIRS
    biased = run("biased", 1.0, 8.0)
    assert not torch.allclose(plain, biased, atol=1e-2)
    assert make_planted_model(tmp_path / "biased") == tmp_path / "biased"


def test_the_retriever_finds_keys_and_without_the_past_none() -> None:
    model = AutoModelForCausalLM.from_pretrained(RETRIEVER, dtype=torch.float32)
    prompts, keys = make_prompts(3, 300, seed=1)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *key] for prompt, key in zip(prompts, keys, strict=True)])).logits
    assert logits[:, 299:-1].argmax(-1).tolist() == keys
    dropped = answer_dropped(model, prompts, keys, PRESETS["skvq_k2v2"])
    assert dropped.shape == (3, KEY_TOKENS)
    assert not (dropped == keys).all(1).any()


def test_arms_can_be_chosen_and_bf16_always_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measure(work: Path, size: int, record: Callable[..., None], pick: kv_cache.Pick) -> None:
        for arm in pick([Arm("bf16"), Arm("fp8", "fp8"), Arm("kv4", "kv4", {"calibration": str(tmp_path)})]):
            seen.append(arm.name)
            record(arm, {"found": Metric(float(size), "%")}, {"tokens": 3})

    monkeypatch.setitem(kv_cache.TABLES, "passkey", (measure, 200, 16))
    assert kv_cache.main(["passkey", "--arms", "kv4", "--quick", "--out", str(tmp_path)]) == 0
    assert seen == ["bf16", "kv4"]
    records = load_records(tmp_path)
    assert [(one.case, one.arm, one.metrics["found"].value) for one in records] == [
        ("kv_passkey", "bf16", 16.0), ("kv_passkey", "kv4", 16.0)
    ]  # fmt: skip
    # Paths of this machine are nobody's settings.
    assert records[1].settings == {"tokens": 3, "stock_arm": "bf16", "kv_cache_dtype": "kv4", "block": {}}
    assert kv_cache.main(["passkey", "--out", str(tmp_path)]) == 0
    assert seen[2:] == ["bf16", "fp8", "kv4"]


def test_an_unknown_table_ends_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        kv_cache.main(["texts"])
