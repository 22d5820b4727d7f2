# SPDX-License-Identifier: Apache-2.0
"""Workloads from end to end: files, options for the client, seeds; and that vLLM's own readers accept them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality.perplexity import load_tokenizer
from bench.workloads import WORKLOADS, Workload, prepare_workload
from bench.workloads.__main__ import main
from bench.workloads.prepare import TRACE_WORKLOADS, list_options
from bench.workloads.requests import read_lines

#: Small enough for the tiny model's context.
OPTIONS: dict[str, dict[str, Any]] = {
    "rag": {"max_model_len": 2048},
    "long_context": {"max_model_len": 1024},
}
OFFLINE = [name for name in WORKLOADS if name not in ("sharegpt", "longbench", "json_schema", "trace")]


@pytest.fixture(scope="module")
def tokenizer(tiny_moe: str) -> Any:
    return load_tokenizer(tiny_moe)


def prepare(name: str, folder: Path, tokenizer: Any, **changes: Any) -> Workload:
    arguments = {"num_requests": 12, "seed": 3, "options": OPTIONS.get(name, {}), **changes}
    return prepare_workload(name, folder, "unused", tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_seed_decides_the_file(name: str, tmp_path: Path, tokenizer: Any) -> None:
    first = prepare(name, tmp_path / "a", tokenizer)
    again = prepare(name, tmp_path / "b", tokenizer)
    other = prepare(name, tmp_path / "c", tokenizer, seed=4)
    assert first.path.read_bytes() == again.path.read_bytes() != other.path.read_bytes()
    assert len(read_lines(first.path)) == 12


@pytest.mark.parametrize("name", [name for name in OFFLINE if name not in TRACE_WORKLOADS])
def test_prompts_and_outputs_fit_the_context(name: str, tmp_path: Path, tokenizer: Any) -> None:
    limit = 1024 if name != "tool_calls" else 2048
    options = {"max_model_len": limit} | ({"num_tools": 2} if name == "tool_calls" else {})
    path = prepare(name, tmp_path, tokenizer, num_requests=40, options=options).path
    for entry in read_lines(path):
        prompt = len(tokenizer.encode(entry["prompt"], add_special_tokens=False))
        assert prompt >= 1
        assert entry["output_tokens"] >= 1
        assert prompt + entry["output_tokens"] <= limit


def test_client_options_of_text(tmp_path: Path, tokenizer: Any) -> None:
    options = {"request_rate": 4, "burstiness": 0.25, "max_concurrency": 2}
    workload = prepare("chat", tmp_path, tokenizer, options=options)
    text = " ".join(workload.client_args)
    assert text.startswith(f"--dataset-name custom --dataset-path {workload.path} --num-prompts 12 --seed 3")
    for part in ("--custom-output-len -1", "--disable-shuffle", "--skip-chat-template", "--ignore-eos"):
        assert part in text
    assert "--burstiness 0.25 --max-concurrency 2 --request-rate 4" in text
    assert workload.environment == {}


def test_client_options_of_traces(tmp_path: Path, tokenizer: Any) -> None:
    workload = prepare("bursty", tmp_path, tokenizer)
    assert workload.client_args[:2] == ["--dataset-name", "timed_trace"]
    # Without it every client process would draw other tokens, and the arms of a pair would differ.
    assert workload.environment == {"PYTHONHASHSEED": "0"}


def test_tool_calls_are_constrained_by_their_schema(tmp_path: Path, tokenizer: Any) -> None:
    workload = prepare("tool_calls", tmp_path, tokenizer)
    body = json.loads(workload.client_args[workload.client_args.index("--extra-body") + 1])
    schema = body["structured_outputs"]["json"]
    assert len(schema["anyOf"]) == 6
    # A constrained answer ends by itself.
    assert "--ignore-eos" not in workload.client_args
    prompt = read_lines(workload.path)[0]["prompt"]
    assert all(tool["properties"]["name"]["const"] in prompt for tool in schema["anyOf"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("chats", {}, "no workload 'chats'; there are: chat, rag"),
        ("chat", {"num_requests": 0}, "num_requests must be at least 1, got 0"),
        ("chat", {"options": {"rate": 3}}, "'chat' has no option 'rate'; it has: burstiness, max_concurrency"),
        ("bursty", {"options": {"request_rate": 3}}, "'bursty' has no option 'request_rate'"),
        ("sharegpt", {"options": {}}, "'sharegpt' needs the option 'path'"),
        ("trace", {"options": {"path": "x"}}, "'trace' needs the option 'max_model_len'"),
    ],
)
def test_bad_requests_are_named(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(name, tmp_path, tokenizer, **changes)


def test_options_are_those_of_the_generator() -> None:
    assert list_options("sharegpt")["path"] is True
    assert list_options("chat")["scale"] is False
    assert set(list_options("phases")) == {"phases", "max_model_len", "scale", "rate_scale"}


def test_command_line(tmp_path: Path, tiny_moe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokenizer", tiny_moe, "--num-requests", "3", "--out", str(tmp_path)]
    assert main(["bursty", *options, "--set", "rate=8", "--set", "mixture=code"]) == 0
    assert capsys.readouterr().out.startswith("PYTHONHASHSEED=0 vllm bench serve --dataset-name timed_trace")
    assert len(read_lines(tmp_path / "bursty-0.jsonl")) == 3
    for bad, message in (("rate", "expected OPTION=VALUE"), ("speed=2", "has no option 'speed'")):
        with pytest.raises(SystemExit) as stopped:
            main(["bursty", *options, "--set", bad])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["phases", "chat", "tool_calls"])
def test_vllm_reads_the_files_as_they_were_meant(name: str, tmp_path: Path, tokenizer: Any) -> None:
    # With the parser of `vllm bench serve`, so that an option it does not know fails here.
    from vllm.benchmarks.datasets import get_samples
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    workload = prepare(name, tmp_path, tokenizer)
    options = parser.parse_args(["--backend", "vllm", *workload.client_args])
    requests = get_samples(options, tokenizer)
    entries = read_lines(workload.path)
    assert len(requests) == workload.num_requests
    if name in TRACE_WORKLOADS:
        assert [request.timestamp for request in requests] == [entry["timestamp"] for entry in entries]
        assert [request.prompt_len for request in requests] == [entry["input_length"] for entry in entries]
        assert [request.expected_output_len for request in requests] == [entry["output_length"] for entry in entries]
    else:
        assert [request.prompt for request in requests] == [entry["prompt"] for entry in entries]
        assert [request.expected_output_len for request in requests] == [entry["output_tokens"] for entry in entries]
