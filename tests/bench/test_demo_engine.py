# SPDX-License-Identifier: Apache-2.0
"""The whole demonstration, with three real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: Of the first four windows, by transformers in float32; the model's card has the first forty.
PERPLEXITY = {"kjv": 24.21, "py": 23.38}


def find_processes(marker: str) -> list[str]:
    """Command lines of the live processes whose environment holds `marker`, but for this one's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def start_demo(repository: Path, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    # vLLM's processes inherit the environment, so TMPDIR marks them, and shows what the demonstration leaves.
    return subprocess.Popen(
        [sys.executable, "-m", "bench.demo", *arguments],
        cwd=repository,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def outcome(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("demo")
    # Compiling three models takes a minute and a half, a process for the worker ten seconds of imports each; compiled
    # engines and workers have tests of their own.
    serve_args = "--enforce-eager --distributed-executor-backend uni"
    process = start_demo(repository, directory, "--json", "--windows", "4", f"--serve-args={serve_args}")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-6000:]
    return {"out": out, "err": err, "directory": directory, "json": json.loads(out.splitlines()[-1])}


def test_all_servers_answer_everything(outcome: dict[str, Any]) -> None:
    result = outcome["json"]
    assert (result["context"], result["windows"]) == (512, 4)
    for arm in ("bf16", "mxmoe", "packed"):
        for name in ("completion", "streamed", "chat"):
            assert len(result[arm][name].split()) > 3, (arm, name)
        # 24 tokens were asked for; a token that ends inside a UTF-8 character shares the next one's chunk.
        assert 12 <= result[arm]["stream_chunks"] <= 26
        assert result[arm]["perplexity_tokens"] == 2 * 4 * 511
        assert result[arm]["exit_code"] == 0
        assert 1 < result[arm]["startup_seconds"] < 300
        assert result[arm]["tokens_per_second"] > 1


@pytest.mark.parametrize("arm", ["mxmoe", "packed"])
def test_perplexity_is_that_of_the_trained_model(outcome: dict[str, Any], arm: str) -> None:
    bf16, rounded = outcome["json"]["bf16"], outcome["json"][arm]
    for domain, expected in PERPLEXITY.items():
        assert bf16[f"perplexity_{domain}"] == pytest.approx(expected, rel=0.02)
        ratio = rounded[f"perplexity_{domain}"] / bf16[f"perplexity_{domain}"]
        # Rounding to about 3 and 4 bits changes the model, and not by much.
        assert ratio != 1
        assert 0.98 < ratio < 1.06


def test_experts_are_really_smaller(outcome: dict[str, Any]) -> None:
    bf16 = outcome["json"]["bf16"]
    assert bf16["expert_bytes"] == 5 * 16 * 3 * 256 * 128 * 2
    assert bf16["bits_per_weight"] == 16
    for arm, bits in (("mxmoe", 3.6875), ("packed", 3.25)):
        rounded = outcome["json"][arm]
        # Sections of the packed arena start on 64 bytes, so a little padding comes on top of the plan's bits.
        assert rounded["bits_per_weight"] == pytest.approx(bits, rel=0.005)
        assert rounded["expert_bytes"] * 8 / rounded["bits_per_weight"] == pytest.approx(bf16["expert_bytes"] / 2)


def test_one_table_and_visible_progress(outcome: dict[str, Any]) -> None:
    table = outcome["out"].rsplit("\n", 2)[0]
    for text in ("--quantization mxmoe", "bits per expert weight", "perplexity kjv_val", f"{15728640:,}"):
        assert text in table
    for step in ("prepare", "bf16: start vllm serve", "mxmoe: start vllm serve --quantization mxmoe", "packed: stop"):
        assert f"{step} (" in outcome["err"]


def test_nothing_is_left(outcome: dict[str, Any]) -> None:
    assert find_processes(str(outcome["directory"])) == []
    assert list(outcome["directory"].glob("vllm-ext-demo-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "exit_code"),
    [(signal.SIGINT, "EngineCore", 130), (signal.SIGTERM, "", 143)],
)
def test_interrupted_demo_leaves_no_process(
    repository: Path, tmp_path: Path, number: signal.Signals, moment: str, exit_code: int
) -> None:
    process = start_demo(repository, tmp_path)
    deadline = time.monotonic() + 120
    while not (log := list(tmp_path.glob("*/bf16.log"))) or moment not in log[0].read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(find_processes(str(tmp_path))) > 1
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_code, err
    assert find_processes(str(tmp_path)) == []
