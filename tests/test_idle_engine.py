# SPDX-License-Identifier: Apache-2.0
"""Idle means idle: stock models give the same tokens and logprobs, bit for bit, with the pack installed and absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.models.make_model import make_model
from tests.clean_venv import make_clean_venv

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def start_probe(python: Path | str, repository: Path, models: list[str], directory: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_EXT", "PYTHON"))}
    with (directory / "stderr.log").open("w") as log:
        return subprocess.Popen(
            [str(python), str(repository / "tests" / "idle_probe.py"), *models],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=directory, env=environment,
        )  # fmt: skip


def read_probe(process: subprocess.Popen[str], directory: Path) -> dict[str, Any]:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, (directory / "stderr.log").read_text()[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def test_stock_models_do_not_notice_the_pack(tiny_moe: str, repository: Path, tmp_path: Path) -> None:
    dense, gptq = tmp_path / "dense", tmp_path / "gptq"
    make_model("tiny-llama", dense)
    make_model("tiny-llama-gptq", gptq)
    models = [str(dense), tiny_moe, str(gptq)]
    with_pack, without_pack = tmp_path / "with", tmp_path / "without"
    with_pack.mkdir()
    without_pack.mkdir()
    stock_python = make_clean_venv(tmp_path / "stock", wheel=None)

    # Side by side: each engine is mostly start-up, and both arms see the same machine.
    arms = [start_probe(sys.executable, repository, models, with_pack),
            start_probe(stock_python, repository, models, without_pack)]  # fmt: skip
    installed, absent = (read_probe(arm, folder) for arm, folder in zip(arms, (with_pack, without_pack), strict=True))

    assert installed["installed"] is True
    assert absent["installed"] is False
    assert [run["quantization"] for run in absent["models"].values()][:2] == ["None", "None"]
    assert "gptq" in absent["models"]["gptq"]["quantization"]
    for name, stock in absent["models"].items():
        packed = installed["models"][name]
        assert packed["quantization"] == stock["quantization"]
        assert packed["tokens"] == stock["tokens"], name
        assert packed["logprobs"] == stock["logprobs"], name
        assert packed["prompt_logprobs"] == stock["prompt_logprobs"], name
        # The plugin did load in the worker, and stayed at the door.
        assert stock["worker"]["pack"] == []
        assert "vllm_ext.plugin" in packed["worker"]["pack"]
        assert not [
            part for part in packed["worker"]["pack"] if "kernels.mixed" in part or part.endswith((".moe", ".online"))
        ]
        assert packed["worker"]["active"] is None
        assert packed["worker"]["cuda"] is False
