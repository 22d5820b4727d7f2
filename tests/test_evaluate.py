# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext eval`: what is summed, what is counted, bad input by message before any engine starts, and one real run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.compress.small_model import write_model
from tests.quantization.packed_models import fake_quantize_model, pack_model
from vllm_ext import cli
from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.evaluation import measure_perplexity
from vllm_ext.compress.profile import load_model
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.evaluate import BATCH_WINDOWS, check_context, evaluate_model, measure_checkpoint
from vllm_ext.quantization.plan import Plan

#: Every second expert in three bits, the others in four.
PLAN = Plan.parse(
    {
        f"model.layers.{layer}.mlp.experts.{expert}": dict.fromkeys(("gate_up", "down"), scheme)
        for layer in range(5)
        for expert, scheme in enumerate(["w3a16_g64", "w4a16_g128"] * 8)
    }
)


class FakeEngine:
    """In the place of vllm.LLM: token t has the probability 1 / (t + 2) wherever it stands."""

    made: list[FakeEngine]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.batches: list[int] = []
        self.is_down = False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shut_down))
        self.made.append(self)

    def shut_down(self) -> None:
        self.is_down = True

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
        assert (sampling.prompt_logprobs, sampling.max_tokens, use_tqdm) == (0, 1, False)
        self.batches.append(len(prompts))
        windows = [prompt["prompt_token_ids"] for prompt in prompts]
        logprobs = [
            [None, *({token: SimpleNamespace(logprob=self.score(token))} for token in window[1:])] for window in windows
        ]
        return [SimpleNamespace(prompt_logprobs=positions) for positions in logprobs]

    def score(self, token: int) -> float:
        return -math.log(token + 2)


class BrokenEngine(FakeEngine):
    def score(self, token: int) -> float:
        return math.nan


def play(monkeypatch: pytest.MonkeyPatch, kind: type[FakeEngine]) -> list[FakeEngine]:
    """Let evaluate_model start engines of this kind; returns those that it has started."""
    kind.made = []
    monkeypatch.setattr("vllm.LLM", kind)
    return kind.made


def test_every_token_but_each_windows_first_counts(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = play(monkeypatch, FakeEngine)
    text, count = Path(tiny_moe) / "py_val.txt", BATCH_WINDOWS + 3
    result = evaluate_model(tiny_moe, text, context=9, windows=count)
    (engine,) = engines
    assert engine.options == {"model": tiny_moe, "max_model_len": 10, "enforce_eager": False}
    assert engine.batches == [BATCH_WINDOWS, 3]
    assert engine.is_down
    ids = load_tokenizer(Path(tiny_moe)).encode(text.read_text(), add_special_tokens=False)
    scored = [token for window in range(count) for token in ids[9 * window + 1 : 9 * window + 9]]
    assert result.tokens == len(scored) == 8 * count
    assert result.perplexity == pytest.approx(math.exp(sum(math.log(t + 2) for t in scored) / len(scored)))
    assert (result.bits_per_weight, result.quantized_bytes) == (None, 0)
    assert result.total_bytes == sum(t.nbytes for t in load_file(f"{tiny_moe}/model.safetensors").values())


def test_all_windows_of_a_text(tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = play(monkeypatch, FakeEngine)
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    windows = cut_windows(tmp_path / "text.txt", load_tokenizer(Path(tiny_moe)), 16)
    assert evaluate_model(tiny_moe, tmp_path / "text.txt", context=16).tokens == 15 * len(windows)
    assert sum(engines[0].batches) == len(windows) > 5


def test_a_model_that_gives_nan_has_no_perplexity(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = play(monkeypatch, BrokenEngine)
    with pytest.raises(ValueError, match="add up to nan: the model's weights are damaged"):
        evaluate_model(tiny_moe, Path(tiny_moe) / "py_val.txt", context=9, windows=1)
    assert engines[0].is_down


def test_bytes_of_a_packed_checkpoint_are_those_of_its_report(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    report = quantize_model(model, tmp_path / "packed", bits=3.25)
    bits, quantized_bytes, total_bytes = measure_checkpoint(tmp_path / "packed")
    assert bits == report.planned.bits_per_weight
    assert (quantized_bytes, total_bytes) == (report.planned.quantized_bytes, report.total_bytes)
    assert 0 < quantized_bytes < total_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "text file nowhere.txt does not exist"),
        (("--text", "empty.txt"), "text file empty.txt is empty: give a file with text"),
        (("--text", "short.txt"), "text file short.txt has 1 tokens, less than one window of 512: give a longer text"),
        (("--text", "bytes.txt"), "text file bytes.txt is not UTF-8 text"),
        (("--text", "text.txt", "--context", "2048"), "context 2048 is too large: the model has 2048 positions"),
        (("--text", "text.txt", "--context", "1"), "context must be at least 2 tokens"),
        (("--text", "text.txt", "--windows", "0"), "windows must be at least 1, got 0"),
    ],
)
def test_bad_texts_and_sizes(
    tiny_moe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("a")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xff")
    Path("text.txt").write_text("word " * 3000)
    engines = play(monkeypatch, FakeEngine)
    assert fail(capsys, tiny_moe, *arguments).startswith(f"vllm-ext eval: error: {message}")
    assert engines == []


def fail(capsys: pytest.CaptureFixture[str], model: str | Path, *arguments: str) -> str:
    """The one line of stderr of a command that fails."""
    assert cli.main(["eval", str(model), *arguments, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_bad_model_directories(
    tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = play(monkeypatch, FakeEngine)
    text = ("--text", f"{tiny_moe}/py_val.txt")
    (tmp_path / "empty").mkdir()
    assert "nowhere is not a directory: give a local model" in fail(capsys, tmp_path / "nowhere", *text)
    assert "empty has no config.json" in fail(capsys, tmp_path / "empty", *text)
    model = write_model(tmp_path / "model")
    assert "model has no usable tokenizer" in fail(capsys, model, *text)
    packed = pack_model(tiny_moe, tmp_path / "packed", PLAN)
    weights = packed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "it is truncated; copy it again" in fail(capsys, packed, *text)
    weights.unlink()
    assert "packed has no *.safetensors file" in fail(capsys, packed, *text)
    shutil.copy(f"{tiny_moe}/model.safetensors", weights)
    assert ".qweight is missing" in fail(capsys, packed, *text)
    assert engines == []


def test_context_is_left_to_vllm_where_the_configuration_does_not_say_it() -> None:
    check_context({"max_position_embeddings": 2048}, 2047)
    check_context({}, 10**6)
    scaled: dict[str, Any] = {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    check_context(scaled, 8000)
    with pytest.raises(ValueError, match="give a context of at most 2047"):
        check_context({**scaled, "rope_parameters": {"rope_type": "default"}}, 2048)


#: Of the command in the two tests below. Without the compiler, half a minute less; test_serve_engine.py has it.
OPTIONS = ["--context", "256", "--windows", "4", "--enforce-eager", "--json"]


@pytest.mark.engine
def test_the_command_measures_what_is_served(
    tiny_moe: str, tmp_path: Path, engine_in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    text = Path(tiny_moe) / "py_val.txt"
    packed = pack_model(tiny_moe, tmp_path / "packed", PLAN)
    assert cli.main(["eval", str(packed), "--text", str(text), *OPTIONS]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(result) == {"perplexity", "tokens", "bits_per_weight", "quantized_bytes", "total_bytes"}
    assert result["tokens"] == 4 * 255
    # Three bits with 24 for 64 weights, four with 24 for 128.
    assert result["bits_per_weight"] == (3 + 24 / 64 + 4 + 24 / 128) / 2
    assert result["quantized_bytes"] == result["bits_per_weight"] * 5 * 16 * 3 * 256 * 128 / 8
    assert result["total_bytes"] == sum(t.nbytes for t in load_file(packed / "model.safetensors").values())
    rounded = load_model(fake_quantize_model(tiny_moe, tmp_path / "rounded", PLAN), torch.float32)
    expected = measure_perplexity(rounded, cut_windows(text, load_tokenizer(packed), 256)[:4])
    # The model is served in bf16, so this is coarser than the float32 comparison of test_serve_engine.py.
    assert result["perplexity"] == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
@pytest.mark.engine
def test_stdout_holds_the_result_alone(tiny_moe: str) -> None:
    command = [sys.executable, "-m", "vllm_ext.cli", "eval", tiny_moe, "--text", f"{tiny_moe}/py_val.txt", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM's log goes to stderr, its engine's too.
    assert "EngineCore" in done.stderr
    assert "INFO" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == 4 * 255
