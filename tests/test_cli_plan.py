# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext plan` with calibration text: comparison, front, profile, time; bad values by message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.compress.runnable_model import EXPERTS, VOCABULARY, add_tokenizer, write_runnable
from vllm_ext import cli
from vllm_ext.compress import command
from vllm_ext.quantization.checkpoint import validate_checkpoint

SCHEMES = ("--schemes", "w2a16_g32,w3a16_g32,w4a16_g32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = write_runnable(tmp_path_factory.mktemp("models") / "model", max_position_embeddings=512)
    add_tokenizer(directory)
    numbers = (VOCABULARY * np.random.default_rng(0).random(8 * 512) ** 2).astype(int)
    (directory / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return str(directory)


def run(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", model, "--calibration", f"{model}/text.txt", *SCHEMES, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_with_everything(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the bench extra brings")
    arguments = (
        "--bits", "3.9", "--work", str(tmp_path / "work"), "--pareto", str(tmp_path / "front"),
        "--profile", str(tmp_path / "profile"), "--device", "h200", "--batches", "1:1,64:3", "--force-mixed", "--json",
    )  # fmt: skip
    code, stdout, stderr = run(capsys, model, *arguments)
    assert code == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert report["chosen"] == "mixed"
    assert report["measure"] == "loss"
    assert report["predicted_time_us"] > 0
    assert 3.8 < report["bits_per_weight"] <= 3.9
    assert report["comparison"]["uniform"]["scheme"] == "w3a16_g32"
    assert "held-out loss of 1024 tokens" in stdout
    assert "sensitivity" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "front.csv", "front.png", "profile.json", "profile.png", "work",
    }  # fmt: skip
    layers = json.loads((tmp_path / "profile.json").read_text())["layers"]
    assert np.array(layers["model.layers.0.mlp.experts"]["coactivation"]).shape == (EXPERTS, EXPERTS)
    code, _, stderr = run(capsys, model, *arguments)
    assert code == 1
    assert "front.csv exists already" in stderr


@pytest.mark.parametrize(
    "extra", [("--sensitivity", "layer", "--per-layer"), ("--rounding", "gptq", "--rotate", "--sweeps", "1")]
)
def test_quantize_makes_the_plan_that_plan_prints(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...]
) -> None:
    code, stdout, stderr = run(capsys, model, "--bits", "3.9", "--json", *extra)
    assert code == 0, stderr
    planned = json.loads(stdout.splitlines()[-1])
    arguments = ["quantize", model, "-o", str(tmp_path / "out"), "--bits", "3.9", *SCHEMES, "--json"]
    assert cli.main([*arguments, "--calibration", f"{model}/text.txt", *extra]) == 0
    stdout = capsys.readouterr().out
    assert json.loads(stdout.splitlines()[-1])["plan_sha256"] == planned["plan_sha256"]
    assert validate_checkpoint(tmp_path / "out").plan.sha256 == planned["plan_sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "1"), "1 bits a weight is out of reach: w2a16_g32, w3a16_g32, w4a16_g32 give 2.7500 to 4.7500"),
        (("--bits", "3", "--device", "gtx"), "device 'gtx' has no tuning table and is not one of cpu"),
        (("--bits", "3", "--batches", "many"), "batch 'many' is not TOKENS:SHARE"),
        (("--bits", "3", "--exponent", "0.5"), "belongs to the allocation per layer"),
        (("--bits", "3", "--max-time-us", "1e-9"), "a time of 1e-09 is below the least within"),
    ],
)
def test_errors_are_one_line(
    model: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run(capsys, model, *arguments)
    assert code == 1
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if line.startswith("vllm-ext plan: error: ")]
    assert message in line


def test_files_that_cannot_be_made_are_refused_before_the_work(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_source", lambda *_: pytest.fail("the work began"))
    (tmp_path / "plan.json").write_text(json.dumps({"model.layers.0.self_attn.o_proj": "w4a16_g32"}))
    for option in ("--pareto", "--profile"):
        code = cli.main(["plan", model, "--plan", str(tmp_path / "plan.json"), option, str(tmp_path / "x")])
        assert code == 1
        assert f"{option} needs --bits" in capsys.readouterr().err
    assert cli.main(["plan", model, "--bits", "3", "--profile", str(tmp_path / "x")]) == 1
    assert "--profile needs --bits and --calibration" in capsys.readouterr().err


def test_what_is_thin_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run(capsys, model, "--bits", "3.9", "--windows", "3")
    assert code == 0, stderr
    assert "note: the mixed plan was not compared with a uniform one: fewer than 4 windows" in stdout
    code, stdout, stderr = run(capsys, model, "--bits", "3.9", "--no-compare")
    assert code == 0, stderr
    assert "windows of 512 tokens, not the 128 asked for" in stdout
    assert "not compared" not in stdout
    assert "of these bytes is more than" in stdout
    code, stdout, stderr = run(capsys, model, "--bits", "3.9", "--no-compare", "--per-layer", "--sensitivity", "layer")
    assert code == 0, stderr
    assert "no plan with these bits in every layer is more than" in stdout


def test_sweeps_are_about_codes_that_are_chosen_by_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", model, "--bits", "3", "--sweeps", "1"])
    assert "--sweeps is about codes that gptq and gptaq chose" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--per-layer",), ("--time-weight", "1"), ("--max-time-us", "5"), ("--force-mixed",)]
)
def test_options_that_a_given_plan_leaves_nothing_to_do(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", model, "--plan", str(tmp_path / "plan.json"), *option])
    assert f"{option[0]} is about schemes that --bits chooses" in capsys.readouterr().err
