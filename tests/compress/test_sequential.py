# SPDX-License-Identifier: Apache-2.0
"""Quantizing with calibration: the written checkpoint, and runs that were killed and started again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compress.runnable_model import EXPERTS, VOCABULARY, add_tokenizer, make_tokens, write_runnable
from vllm_ext import cli
from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.evaluation import load_dequantized
from vllm_ext.compress.profile import load_model
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rounders import HessianRounder
from vllm_ext.compress.sequential import make_cache, round_layers, split_plan
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.checkpoint import read_module, validate_checkpoint
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme

PLAN = Plan.parse(
    {
        **{
            f"model.layers.{layer}.mlp.experts.{e}": {"gate_up": "w2a16_g32", "down": "w3a16_g32_sym"}
            for layer in (0, 2)
            for e in range(EXPERTS)
        },
        **{f"model.layers.2.self_attn.{name}_proj": "w4a16_g64" for name in "qkv"},
        "model.layers.2.self_attn.o_proj": "w3a16_g64",
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_runnable(tmp_path_factory.mktemp("models") / "model", max_position_embeddings=512)
    add_tokenizer(directory)
    words = np.random.default_rng(0).random(4 * 512) ** 2 * VOCABULARY
    (directory.parent / "text.txt").write_text(" ".join(f"w{int(word)}" for word in words))
    return directory


def quantize(model: Path, output: Path, **changes: Any) -> str:
    """Quantize and hash every file of the result."""
    arguments: dict[str, Any] = {
        "plan": PLAN, "rounding": "gptaq", "rotate": True, "calibration": [model.parent / "text.txt"], **changes
    }  # fmt: skip
    quantize_model(model, output, **arguments)
    return hash_files(output)


def hash_files(output: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(output.iterdir()):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_checkpoint_is_what_the_rounder_chose(model: Path, tmp_path: Path, rounding: str, rotate: bool) -> None:
    quantize(model, tmp_path / "out", rounding=rounding, rotate=rotate)
    quantize(model, tmp_path / "nearest", rounding="rtn", rotate=rotate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nearest", "out"]
    checkpoint = validate_checkpoint(tmp_path / "out")
    assert checkpoint.plan.modules == PLAN.modules
    assert checkpoint.plan.producer["rounding"] == rounding
    assert checkpoint.plan.producer.get("rotated", False) is rotate
    assert ("lm_head.weight" in checkpoint.reader.infos) is rotate
    assert checkpoint.config["tie_word_embeddings"] is not rotate
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("rotated by a randomized Hadamard matrix" in card) is rotate
    ids = torch.from_numpy(make_tokens(windows=12, context=64, seed=3))
    with torch.inference_mode():
        full = load_model(model, torch.float32, "cpu")(input_ids=ids).logits
        found, nearest = (
            float((load_dequantized(tmp_path / name)(input_ids=ids).logits - full).square().mean())
            for name in ("out", "nearest")
        )
    assert found < 0.8 * nearest


def test_layers_are_the_library_call(model: Path, tmp_path: Path) -> None:
    """The command line writes what `round_layers` gives."""
    from vllm_ext.compress.calibration import load_tokenizer, make_windows

    arguments = ["quantize", str(model), "-o", str(tmp_path / "out"), "--rounding", "gptq", "--json"]
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_json()))
    arguments += ["--plan", str(tmp_path / "plan.json"), "--calibration", str(model.parent / "text.txt"), "--seed", "4"]
    assert cli.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    assert list((tmp_path / "work").iterdir()) == []
    checkpoint = validate_checkpoint(tmp_path / "out")
    windows = make_windows([model.parent / "text.txt"], load_tokenizer(model), seed=4)
    for _, layer in round_layers(open_source(model), PLAN, HessianRounder(), windows):
        for path, codes in layer.items():
            module = path if path in PLAN.modules else path.rpartition(".")[0]
            scales = checkpoint.reader.read(f"{path}.scales")
            assert torch.equal(scales, codes.scales)
            assert path in read_module(checkpoint, module)


class Killed(BaseException):
    """What no code of the package catches."""


@pytest.mark.parametrize(("layers", "rounding"), [(0, "gptaq"), (1, "gptq"), (2, "gptaq")])
def test_killed_in_a_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, rounding: str
) -> None:
    expected = quantize(model, tmp_path / "whole", rounding=rounding)
    calls = []
    original = HessianRounder.round_layer

    def stop(self: HessianRounder, layer: Any, *arguments: Any) -> Any:
        calls.append(layer.index)
        if len(calls) > layers:
            raise Killed
        return original(self, layer, *arguments)

    monkeypatch.setattr(HessianRounder, "round_layer", stop)
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", rounding=rounding)
    assert not (tmp_path / "out").exists()
    reached = layers
    calls.clear()
    layers = 9
    assert quantize(model, tmp_path / "out", rounding=rounding) == expected
    assert calls == list(range(reached, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_work_of_another_request_is_not_used(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source, windows = tmp_path / "work", open_source(model), make_tokens(windows=4)
    cache = make_cache(folder, source, windows, {"rounding": "gptq"})
    first = dict(round_layers(source, PLAN, HessianRounder(), windows, cache=cache))
    monkeypatch.setattr(HessianRounder, "round_layer", lambda *_: pytest.fail("every layer is there"))
    again = dict(round_layers(source, PLAN, HessianRounder(), windows, cache=cache))
    assert set(again) == {0, 1, 2}
    assert again[1] == {}
    for layer, codes in first.items():
        for path, one in codes.items():
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, again[layer][path], strict=True))
    for others in (
        make_cache(folder, source, make_tokens(windows=4, seed=9), {"rounding": "gptq"}),
        make_cache(folder, source, windows, {"rounding": "gptaq"}),
    ):
        assert others.load("layer-0") is None


def test_a_damaged_layer_is_rounded_again(model: Path, tmp_path: Path) -> None:
    cache = StageCache(tmp_path, {"a": 1})
    source, windows = open_source(model), make_tokens(windows=4)
    first = dict(round_layers(source, PLAN, HessianRounder(), windows, cache=cache))
    (path,) = tmp_path.rglob("layer-0.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    again = dict(round_layers(source, PLAN, HessianRounder(), windows, cache=cache))
    for name, codes in first[0].items():
        assert torch.equal(codes.codes, again[0][name].codes)
    assert path.stat().st_size > 1000


def test_a_plan_of_one_layer(model: Path) -> None:
    schemes, linears = split_plan(open_source(model), PLAN, 2)
    assert schemes[3, "gate_up"] == Scheme.parse("w2a16_g32")
    assert len(schemes) == 2 * EXPERTS
    assert len(linears) == 4
    assert split_plan(open_source(model), PLAN, 1) == ({}, {})


@pytest.mark.slow
def test_killed_by_the_system(model: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments of a real process, the same command again, the same files."""
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_json()))
    expected = quantize(model, tmp_path / "whole")
    command = [
        sys.executable, "-m", "vllm_ext.cli", "quantize", str(model), "-o", str(tmp_path / "out"),
        "--plan", str(tmp_path / "plan.json"), "--rounding", "gptaq", "--rotate",
        "--calibration", str(model.parent / "text.txt"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for wanted in ("layer-0", "layer-1"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(f".out.work/*/{wanted}.*")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert hash_files(tmp_path / "out") == expected


@pytest.mark.slow
def test_killed_by_the_system_in_every_stage(model: Path, tmp_path: Path) -> None:
    """SIGKILL at the first file of every stage of the whole way, the same command again, the same files."""
    text = model.parent / "long.txt"
    words = np.random.default_rng(1).random(8 * 512) ** 2 * VOCABULARY
    text.write_text(" ".join(f"w{int(word)}" for word in words))

    def build(output: str) -> list[str]:
        return [
            sys.executable, "-m", "vllm_ext.cli", "quantize", str(model), "-o", str(tmp_path / output),
            "--bits", "3.75", "--schemes", "w2a16_g32,w3a16_g32,w4a16_g32", "--rounding", "gptaq", "--rotate",
            "--repair-router", "--calibration", str(text),
        ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(build("whole"), env=environment, check=False).returncode == 0
    work, killed = tmp_path / ".out.work", []
    for stage in (
        "profile",
        "activations-*/*",
        "gradient-",
        "sensitivity-",
        "gptaq-",
        "held-out-",
        "layer-",
        "router-",
    ):
        process = subprocess.Popen(build("out"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(work.glob(f"*/{stage}*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed.append(stage)
    # The last files are there for a moment alone: of those a kill may come too late.
    assert killed[:7] == ["profile", "activations-*/*", "gradient-", "sensitivity-", "gptaq-", "held-out-", "layer-"]
    if not (tmp_path / "out").exists():
        assert subprocess.run(build("out"), env=environment, check=False).returncode == 0
    assert hash_files(tmp_path / "out") == hash_files(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "scheme"), [(2.25, "w2a16_g128"), (3.25, "w3a16_g128")])
def test_shipped_model_far_better_than_rounding_to_nearest(
    tiny_moe: str, tmp_path: Path, bits: float, scheme: str
) -> None:
    """At least half of the loss that rounding to nearest costs is won back, on text of both kinds."""
    from vllm_ext.compress.calibration import cut_windows, load_tokenizer
    from vllm_ext.compress.evaluation import measure_perplexity

    directory, models = Path(tiny_moe), {}
    for rounding in ("rtn", "gptq", "gptaq"):
        text = [directory / f"{kind}_train.txt" for kind in ("kjv", "py")]
        quantize_model(
            directory, tmp_path / rounding, bits=bits, uniform=True, schemes=[Scheme.parse(scheme)], rounding=rounding,
            rotate=rounding != "rtn", calibration=text,
        )  # fmt: skip
        models[rounding] = load_dequantized(tmp_path / rounding)
    for kind in ("kjv", "py"):
        windows = cut_windows(directory / f"{kind}_val.txt", load_tokenizer(directory), 512)[:24]
        full = np.log(measure_perplexity(load_model(directory, torch.float32, "cpu"), windows))
        rise = {name: np.log(measure_perplexity(loaded, windows)) - full for name, loaded in models.items()}
        assert rise["gptq"] < 0.5 * rise["rtn"], (kind, rise)
        assert rise["gptaq"] < 0.5 * rise["rtn"], (kind, rise)
