# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext quantize` and `vllm-ext plan`: results on stdout, one clear line on errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compress.small_model import EXPERTS, LAYERS, write_model
from vllm_ext import cli
from vllm_ext.quantization.checkpoint import validate_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "small"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantize(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run(capsys, "quantize", model, "-o", str(out), "--bits", "3.5", "--json")
    assert code == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert set(report) == {"output", "bits_per_weight", "quantized_bytes", "total_bytes", "plan_sha256", "seconds"}
    assert report["output"] == str(out)
    assert 3.4 < report["bits_per_weight"] <= 3.5
    assert report["plan_sha256"] == validate_checkpoint(out).plan.sha256
    assert "quantize" in stderr


def test_plan_then_quantize(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    arguments = ("plan", model, "--bits", "3.5", "--schemes", "w3a16_g64,w4a16_g64", "-o", str(file), "--json")
    code, stdout, stderr = run(capsys, *arguments)
    assert code == 0, stderr
    assert "model.layers.1.mlp.experts" in stdout
    assert "w3a16_g64" in stdout
    report = json.loads(stdout.splitlines()[-1])
    assert len(report["plan"]) == LAYERS * EXPERTS
    assert json.loads(file.read_text())["plan"] == report["plan"]
    code, stdout, _ = run(capsys, "quantize", model, "-o", str(tmp_path / "out"), "--plan", str(file), "--json")
    assert code == 0
    assert json.loads(stdout.splitlines()[-1])["plan_sha256"] == report["plan_sha256"]
    code, _, stderr = run(capsys, *arguments)
    assert code == 1
    assert "plan.json exists already" in stderr


def test_a_plan_is_not_lost_for_want_of_a_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "missing" / "plan.json"
    code, stdout, stderr = run(capsys, "plan", model, "--bits", "3.5", "-o", str(file))
    assert code == 1
    assert "missing is not a directory: create it, or write plan.json somewhere else" in stderr
    # Said before the work.
    assert stdout == ""


def test_uniform_is_one_scheme(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run(capsys, "plan", model, "--bits", "4.3", "--uniform", "--json")
    assert code == 0, stderr
    plan = json.loads(stdout.splitlines()[-1])["plan"]
    assert {value["gate_up"] for value in plan.values()} == {"w4a16_g128"}
    assert {value["down"] for value in plan.values()} == {"w4a16_g64"}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--bits", "3", "--method", "qoq"),
        ("--bits", "3", "--rounding", "gptq"),
        ("--bits", "three"),
        ("--bits", "-3"),
        ("--bits", "nan"),
        ("--bits", "3", "--seed", "-1"),
        ("--bits", "3", "--unknown"),
        ("--plan", "plan.json", "--uniform"),
        ("--plan", "plan.json", "--schemes", "w3a16_g64"),
        ("--plan", "plan.json", "--calibration", "text.txt"),
        ("--bits", "3", "--repair-router"),
        ("--bits", "3", "--sweeps", "2"),
        ("--bits", "3", "--rounding", "gptq", "--calibration", "text.txt", "--sweeps", "-1"),
        ("--bits", "3", "--calibration", "text.txt", "--windows", "0"),
    ],
)
def test_bad_usage_exits_with_2(model: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quantize", model, "-o", str(tmp_path / "out"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_name_value_and_option(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--bits", "abc"), "bits must be a positive number, got 'abc'"),
        (("--plan", "p.json", "--calibration", "text.txt"), "--calibration is about schemes that --bits chooses"),
        (("--bits", "3", "--repair-router"), "--repair-router needs --calibration FILE"),
        (("--bits", "3", "--sweeps", "2"), "--sweeps is about codes that gptq and gptaq chose"),
        (("--bits", "3", "--calibration", "t.txt", "--windows", "-5"), "--windows must be at least 1, got -5"),
        (("--bits", "3", "--windows", "5"), "--windows is about calibration text: add --calibration FILE"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["quantize", model, "-o", "out", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "3", "--schemes", "w4a16_g100"), "scheme 'w4a16_g100': group_size=100 is not one of"),
        (("--bits", "3", "--schemes", "w4"), "unknown scheme 'w4': nearest is"),
        (("--bits", "1"), "1 bits a weight is out of reach"),
        (("--bits", "3", "--calibration", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--plan", "nowhere.json"), "plan file nowhere.json cannot be read"),
    ],
)
def test_errors_are_one_line(
    tiny_moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run(capsys, "quantize", tiny_moe, "-o", str(tmp_path / "out"), *arguments)
    assert code == 1
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if line.startswith("vllm-ext quantize: error: ")]
    assert message in line
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_family_and_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other", model_type="gpt2")
    code, _, stderr = run(capsys, "quantize", str(other), "-o", str(tmp_path / "out"), "--bits", "3")
    assert code == 1
    assert "no adapter for model_type 'gpt2'; known families: qwen3_moe" in stderr
    code, _, stderr = run(capsys, "quantize", str(other), "-o", str(tmp_path), "--bits", "3")
    assert code == 1
    assert "exists already: remove it or give another output directory" in stderr


def test_the_command_line_is_parsed_without_torch() -> None:
    code = "import sys; from vllm_ext import cli; cli.make_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
