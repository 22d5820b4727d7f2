# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext calibrate-kv` on the shipped model: what is written helps, is accepted, and is the same every time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.compress.runnable_model import add_tokenizer, write_runnable
from vllm_ext import cli
from vllm_ext.compress.calibration import CalibrationError
from vllm_ext.kernels.kv_decode import attend as attend_pages
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.calibrate import Task, calibrate_model, check_context, find_preset, load_task
from vllm_ext.kv_cache.calibrate_attention import (
    Angles,
    attend,
    find_angles,
    find_layers,
    mark_full_precision,
    read_back,
    read_key,
    record_layers,
    run_model,
    score,
)
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.kv_cache.sidecar import describe_model, read_sidecar

CONTEXT, WINDOWS = 224, 4


@pytest.fixture(scope="module")
def task(tiny_moe: str) -> Task:
    """The shipped model with four windows, and its first layer alone to calibrate."""
    text = Path(tiny_moe) / "kjv_train.txt"
    loaded = load_task(Path(tiny_moe), [text], seed=0, context=CONTEXT, num_windows=WINDOWS, dtype="float32")
    assert len(loaded.layers) == 5
    return dataclasses.replace(loaded, layers=loaded.layers[1:2])


def plant_key_outliers(model: Any) -> None:
    """Make two channels of K 15 times as large and Q as much smaller: the same function, harder to code."""
    for layer in model.model.layers:
        half = layer.self_attn.head_dim // 2
        with torch.no_grad():
            for channel in (3, 3 + half, 17, 17 + half):
                layer.self_attn.k_norm.weight[channel] *= 15
                layer.self_attn.q_norm.weight[channel] /= 15


def test_calibration_helps_against_planted_outliers_and_is_the_same_every_time(
    tiny_moe: str, task: Task, tmp_path: Path
) -> None:
    before = run_model(task.model, task.held_out, None, logits=True)
    loaded = load_task(
        Path(tiny_moe), [Path(tiny_moe) / "kjv_train.txt"],
        seed=0, context=CONTEXT, num_windows=WINDOWS, dtype="float32",
    )  # fmt: skip
    planted = dataclasses.replace(loaded, layers=loaded.layers[1:2])
    plant_key_outliers(planted.model)
    after = run_model(planted.model, planted.held_out, None, logits=True)
    assert before is not None
    assert after is not None
    assert (before - after).abs().max() < 1e-2

    preset = PRESETS["skvq_k2v2"]
    reports = [calibrate_model(planted, preset, tmp_path / name, seed=3) for name in ("one", "two")]
    (layer,) = reports[0].layers
    assert layer.calibrated < 0.6 * layer.plain
    assert layer.kept["key"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_sidecar(tmp_path / "one", preset, 2, 64, planted.description)
    assert list(found) == ["model.layers.1.self_attn.attn"]
    # Without outliers there is less to gain.
    plain = calibrate_model(task, preset, tmp_path / "plain", seed=3).layers[0]
    assert plain.calibrated / plain.plain > layer.calibrated / layer.plain


@pytest.mark.parametrize("name", ["skvq_k2v15", "kivi_k2v2", "kvquant_k3v3"])
def test_attention_is_that_of_the_pages(task: Task, name: str) -> None:
    """What errors are measured with, against the store and decode ops on pages: window, sinks, groups, RoPE."""
    preset = PRESETS[name].fit(task.head_dim)
    layer = task.layers[0]
    recorded = record_layers(task.model, task.held_out, [layer.name])[layer.name]
    query, key, value = (x[0].float() for x in recorded)
    angles = find_angles(task.model, len(key)) if preset.pre_rope else None
    exact = score(query, key, layer.scaling)
    read = score(query, read_key(key, preset, CodecTensors(), angles), layer.scaling)
    read_value = read_back(value, preset.value, CodecTensors(), preset.clips)
    ours = attend(exact, read, value, read_value, mark_full_precision(len(key), preset))

    blocks, block_size = -(-len(key) // 128), 128
    layout = preset.plan_cells(task.head_dim, block_size)
    cache = torch.zeros(blocks, key.shape[1], block_size, layout.cell_bytes, dtype=torch.uint8)
    table, starts, lens = torch.arange(blocks)[None], torch.tensor([0, len(key)]), torch.tensor([len(key)])
    stored = key if angles is None else angles.turn(key[None], inverse=True)[0]
    store_kv(stored, value, cache, torch.arange(len(key)), layout, CodecTensors(), CodecTensors(), preset.clips)
    recent, recent_table = key.new_zeros(1, key.shape[1], 1, 2 * task.head_dim), torch.zeros(1, 1)
    if preset.key.per_channel:
        store_completed_groups(
            torch.cat([stored, value], -1), cache, table, starts, lens, recent, recent_table, layout, CodecTensors(),
            preset.clips,
        )  # fmt: skip
    pages = attend_pages(
        query, key, value, cache, table, starts, lens, recent, recent_table, layout, CodecTensors(), CodecTensors(),
        layer.scaling, preset.window, preset.sinks, None if angles is None else angles.cos_sin,
    )  # fmt: skip
    assert (ours - pages).abs().max() < 2e-3 * pages.abs().max()
    # And the test is about quantized keys: exact attention is further away.
    plain = attend(exact, exact, value, value, torch.tensor(True))
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()


def test_the_command_prints_and_writes(tiny_moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kv.safetensors"
    arguments = [
        "calibrate-kv", tiny_moe, "--preset", "kv4", "--calibration", f"{tiny_moe}/py_train.txt", "-o", str(output),
        "--windows", "2", "--context", "64", "--seed", "4", "--json",
    ]  # fmt: skip
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out.splitlines()[-1])
    assert report["plan"] is None
    assert report["calibration"]["calibrated_error"] < report["calibration"]["plain_error"]
    assert report["calibration"]["tokens"] == 64
    assert "kv4: attention output" in captured.out
    assert "model.layers.4.self_attn" in captured.out
    assert "calibrate kv4" in captured.err
    kept = {f"{layer['name']}.attn" for layer in report["calibration"]["layers"] if any(layer["kept"].values())}
    described = describe_model(AutoConfig.from_pretrained(tiny_moe).get_text_config())
    found = read_sidecar(output, PRESETS["kv4"], 2, 64, described)
    # Layers that nothing helped are named, too.
    assert set(found) == {f"{layer['name']}.attn" for layer in report["calibration"]["layers"]}
    with_tensors = {name for name, sides in found.items() if any(x is not None for side in sides for x in side)}
    assert with_tensors == kept
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert cli.main(arguments) == 1
    assert "exists already: remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--preset", "skvq_k2v3"), "'skvq_k2v3' is not a KV-cache preset; did you mean skvq_k2v"),
        (("--preset", "zzz"), "'zzz' is not a KV-cache preset; presets are skvq_k2v2, "),
        (("--preset", "kvplan"), "search the layers' bits with --bits B"),
        (("--preset", "kvplan", "--bits", "3"), "-o is a calibration file, and kvplan has none: drop it"),
        (("--preset", "kv4", "--pareto", "front"), "--pareto is about bits by layer: add --bits B"),
        (("--preset", "kv4", "--calibration", "EMPTY"), "is empty: give a file with text"),
        (("--preset", "kv4", "--calibration", "MISSING"), "does not exist"),
        (("--preset", "kv4", "--windows", "1"), "1 windows cannot be divided into calibration and held-out text"),
        (("--preset", "kv4", "--context", "100000"), "text file"),
    ],
)
def test_errors_are_one_line(
    tiny_moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "MISSING": str(tmp_path / "missing.txt")}
    arguments = [places.get(one, one) for one in extra]
    if "--calibration" not in arguments:
        arguments += ["--calibration", f"{tiny_moe}/kjv_val.txt"]
    code = cli.main(["calibrate-kv", tiny_moe, "-o", str(tmp_path / "out"), *arguments])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("vllm-ext calibrate-kv: error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_no_output_and_bad_numbers(tiny_moe: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate-kv", tiny_moe, "--preset", "kv4", "--calibration", "random"]
    assert cli.main(arguments) == 1
    assert "needs -o OUT.safetensors" in capsys.readouterr().err
    for wrong in (("--windows", "0"), ("--context", "-3"), ("--seed", "-1"), ("--bits", "none")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, *wrong])
        assert stopped.value.code == 2
        assert wrong[0] in capsys.readouterr().err


def test_models_that_a_preset_does_not_fit(tmp_path: Path) -> None:
    directory = write_runnable(tmp_path / "model", head_dim=10, max_position_embeddings=512)
    add_tokenizer(directory)
    odd = load_task(directory, ["random"], seed=0, context=200, num_windows=2)
    assert odd.head_dim == 10
    with pytest.raises(ValueError, match="skvq_k2v2 does not fit this model's heads"):
        calibrate_model(odd, PRESETS["skvq_k2v2"], tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"windows of 200 tokens are all within the 300 that .* --context"):
        check_context(odd, dataclasses.replace(PRESETS["kv4"], window=300))
    with pytest.raises(CalibrationError, match="is not a model directory"):
        load_task(tmp_path, ["random"], seed=0, context=64, num_windows=2)
    for layer in odd.model.model.layers:
        layer.self_attn.sliding_window = 8
    with pytest.raises(CalibrationError, match="no full-attention layer was found in qwen3_moe"):
        find_layers(odd.model)


def test_latent_attention_is_refused_by_name() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8, head_dim=8, vocab_size=50, first_k_dense_replace=1, n_routed_experts=2, num_experts_per_tok=1,
        )
    ).eval()  # fmt: skip
    with pytest.raises(
        CalibrationError, match=r"deepseek_v2 has keys of 16 and values of 8 channels \(latent attention\)"
    ):
        find_layers(model)


def test_turning_is_undone() -> None:
    angle = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) * 6
    angles = Angles(torch.cat([angle.cos(), angle.sin()], -1))
    x = torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(angles.turn(angles.turn(x), inverse=True), x, atol=1e-5)


def test_names_with_bits_are_presets_too() -> None:
    assert find_preset("k4v2").name == "k4v2"


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(tiny_moe: str, tmp_path: Path, name: str) -> None:
    """On all layers, with more text: the mean held-out error falls, and the file is accepted."""
    sources = [Path(tiny_moe) / f"{text}_train.txt" for text in ("kjv", "py")]
    loaded = load_task(Path(tiny_moe), sources, seed=0, context=384, num_windows=12, dtype="float32")
    plant_key_outliers(loaded.model)
    report = calibrate_model(loaded, PRESETS[name], tmp_path / "out")
    assert report.mean("calibrated") < report.mean("plain")
    assert read_sidecar(tmp_path / "out", PRESETS[name], 2, 64, loaded.description)
