# SPDX-License-Identifier: Apache-2.0
"""The GPU program's engine part without an engine: what it compares, and what it calls a fault."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bench.kernels.gpu_parts import engine, engine_answers
from bench.kernels.gpu_parts.common import Context
from bench.kernels.gpu_parts.engine_answers import Answers
from vllm_ext.quantization.scheme import Scheme

FACTS: dict[str, dict[str, Any]] = {
    "graphs": {"mode": "FULL_AND_PIECEWISE", "graphs": 70, "enforce_eager": False},
    "eager": {"mode": "NONE", "graphs": 0, "enforce_eager": True},
    "reference": {"mode": "NONE", "graphs": 0, "enforce_eager": False},
}


def make_answers(arm: str = "eager", shift: float = 0.0) -> Answers:
    stored = engine.read_stored()
    layout = "PLAIN_CODES" if arm == "reference" else "GPU_FRAGMENT"
    compiled = {"compiled": 0 if arm == "reference" else 30, "compiled_late": 0}
    facts = {"runner": engine.RUNNER_V2, **compiled, "layouts": {layout: 10, "PLAIN_BF16": 2}, **FACTS[arm]}
    return replace(stored, logprobs=[value + shift for value in stored.logprobs], facts=facts)


def make_context(seconds: float = 60.0) -> Context:
    return Context(torch.device("cpu"), False, time.monotonic() + seconds)


def test_the_stored_answers_belong_to_this_plan_and_these_prompts(tmp_path: Path) -> None:
    stored = engine.read_stored()
    num_prompts = engine_answers.PROMPTS * len(engine_answers.TEXTS)
    assert len(stored.logprobs) == num_prompts * (engine_answers.PROMPT_TOKENS - 1)
    assert [len(tokens) for tokens in stored.tokens] == [engine_answers.NEW_TOKENS] * engine_answers.CONTINUED
    # A language model's, and not a broken one's: half of guessing at random, and more, is lost.
    assert 2.0 < -sum(stored.logprobs) / len(stored.logprobs) < math.log(4096) / 2
    content = json.loads(engine.STORED.read_text())
    content["inputs"]["plan"] = "other"
    (tmp_path / "engine_cpu.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"was made for .*'plan': 'other'.*engine --store"):
        engine.read_stored(tmp_path / "engine_cpu.json")


def test_the_plan_has_every_kind_of_block_in_every_layer() -> None:
    modules = engine_answers.make_plan().modules
    assert len(modules) == engine_answers.NUM_LAYERS * (engine_answers.NUM_EXPERTS + len(engine_answers.LINEARS))
    for layer in range(engine_answers.NUM_LAYERS):
        pairs: list[Any] = [modules[f"model.layers.{layer}.mlp.experts.{expert}"] for expert in range(16)]
        for block in (0, 1):
            assert {str(pair[block]) for pair in pairs} == {str(Scheme.parse(name)) for name in engine_answers.SCHEMES}


def test_differences_count_up_to_the_first_other_token() -> None:
    one = Answers([-1.0, -2.0], [[5, 6, 7], [8, 9, 9]], [[-0.5, -0.5, -0.5], [-1.0, -1.0, -1.0]], {})
    other = Answers([-1.5, -2.0], [[5, 6, 7], [8, 1, 9]], [[-0.5, -0.25, -0.5], [-1.0, -3.0, -3.0]], {})
    found = {name: metric.value for name, metric in engine.compare(one, other).items()}
    # Differences 0.5, 0 of the prompts; 0, 0.25, 0 and 0 of the continuations.
    assert found == {"mean": 0.125, "largest": 0.5, "agreeing": 4 / 6, "continued": 0.0625}
    with pytest.raises(ValueError, match="answers to other prompts: 2 and 1"):
        engine.compare(one, replace(other, logprobs=[-1.0]))


def test_all_arms_are_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "start_arm", lambda arm, timeout: make_answers(arm))
    result = engine.run(make_context())
    assert [(record.arm, record.status) for record in result.records] == [
        ("cpu", "ok"), ("graphs", "ok"), ("eager", "ok"), ("reference", "ok")
    ]  # fmt: skip
    graphs = result.records[1].metrics
    assert {"to_reference", "to_eager", "to_cpu", "agreeing_to_reference", "perplexity"} < set(graphs)
    assert graphs["to_reference"].value == 0
    assert result.left_out == []


@pytest.mark.parametrize(
    ("arm", "facts", "shift", "message"),
    [
        ("graphs", {}, 0.1, r"0\.090 nats from reference; 0\.090 nats from eager; 0\.090 nats from cpu"),
        ("graphs", {}, math.nan, "no number of nats from reference"),
        ("graphs", {"graphs": 0}, 0.0, "cudagraph_mode FULL_AND_PIECEWISE, 0 graphs"),
        ("graphs", {"runner": "vllm.v1.worker.gpu_model_runner"}, 0.0, "runner vllm.v1.worker.gpu_model_runner"),
        ("graphs", {"layouts": {"PLAIN_CODES": 3}}, 0.0, r"layouts \{'PLAIN_CODES': 3\}"),
        ("graphs", {"compiled_late": 2}, 0.0, "30 kernels compiled while loading, 2 later"),
        ("eager", {"compiled": 0}, 0.0, "0 kernels compiled while loading, 0 later"),
        ("eager", {"mode": "FULL"}, 0.0, "cudagraph_mode FULL, 0 graphs"),
        ("reference", {"mode": "FULL", "graphs": 9}, 0.0, "cudagraph_mode FULL, 9 graphs"),
        ("reference", {"layouts": {"GPU_FRAGMENT": 3}}, 0.0, r"layouts \{'GPU_FRAGMENT': 3\}"),
    ],
)
def test_what_is_wrong_or_did_not_run_fails(
    arm: str, facts: dict[str, Any], shift: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str, timeout: float) -> Answers:
        answers = make_answers(name, shift if name == arm else 0.0)
        return replace(answers, facts={**answers.facts, **facts}) if name == arm else answers

    monkeypatch.setattr(engine, "start_arm", start)
    records = {record.arm: record for record in engine.run(make_context()).records}
    assert records[arm].status == "failed"
    assert re.search(message, str(records[arm].error))


def test_kernels_are_counted_where_triton_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton: a dictionary by device, of tuples that begin with the compiled kernels by what they were compiled for."""
    kernel = SimpleNamespace(device_caches={0: ({"a": 1, "b": 2}, None), 1: ({"a": 3}, None)})
    experts, linear = ModuleType("experts"), ModuleType("linear")
    # Under two names it is one kernel.
    experts.kernel = experts.same = linear.imported = kernel  # type: ignore[attr-defined]
    for name in ("activations", "combine", "sorting"):
        monkeypatch.setitem(sys.modules, f"vllm_ext.kernels.gpu.{name}", ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm_ext.kernels.gpu.experts", experts)
    monkeypatch.setitem(sys.modules, "vllm_ext.kernels.gpu.linear", linear)
    assert engine_answers.count_compiled() == 3
    found: dict[str, int] = {}
    calls: list[Any] = []
    module = ModuleType("loader")
    module.prepare = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    engine_answers.note_compiled(module, "prepare", found)
    module.prepare(1, 2)
    assert (calls, found) == ([(1, 2)], {"kernels": 3})


def test_an_engine_that_dies_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(arm: str, timeout: float) -> Answers:
        if arm == "graphs":
            raise RuntimeError("exit code 1: out of memory")
        if arm == "eager":
            raise subprocess.TimeoutExpired("engine", timeout)
        return make_answers(arm)

    monkeypatch.setattr(engine, "start_arm", start)
    records = {record.arm: record for record in engine.run(make_context()).records}
    assert records["graphs"].error == "exit code 1: out of memory"
    assert re.search(r"timed out after (59|60)", str(records["eager"].error))
    assert records["reference"].status == "ok"


@pytest.mark.parametrize("seconds", [-1.0, engine.FEWEST_SECONDS - 1])
def test_without_time_nothing_begins(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "start_arm", lambda arm, timeout: pytest.fail("began"))
    result = engine.run(make_context(seconds))
    assert result.left_out == ["graphs", "eager", "reference"]
    assert [record.arm for record in result.records] == ["cpu"]


def test_an_arm_that_fails_says_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        engine.start_arm("eager", 30)


def test_bad_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for run, arguments, message in (
        (engine_answers.main, ["--arm", "eager"], "arguments are required: --out"),
        (engine_answers.main, ["--arm", "other", "--out", "x"], "invalid choice: 'other'"),
        (engine.main, [], "arguments are required: --store"),
    ):
        with pytest.raises(SystemExit) as raised:
            run(arguments)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
