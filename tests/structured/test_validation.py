# SPDX-License-Identifier: Apache-2.0
"""Checks in the API process: off the event loop, once for equal specifications, in time, ended when withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config

from bench.structured.hostile import list_hostile
from vllm_ext.patches import structured_backend
from vllm_ext.structured import validation
from vllm_ext.structured.options import Options
from vllm_ext.structured.validation import Gate


@pytest.fixture(scope="module")
def parts(tiny_moe: str) -> Any:
    """(configuration, tokenizer) of an engine."""
    load_general_plugins()
    vllm_config = EngineArgs(model=tiny_moe, max_model_len=256).create_engine_config()
    return vllm_config, cached_tokenizer_from_config(vllm_config.model_config)


@pytest.fixture(scope="module")
def gate(parts: Any) -> Iterator[Gate]:
    vllm_config, tokenizer = parts
    gate = Gate(Options(max_compile_ms=3000.0), vllm_config.model_config, vllm_config.structured_outputs_config)
    # Its process is up before answers are timed, as in a server.
    gate.check(StructuredOutputsParams(regex="[a-z]{1,300}"), tokenizer)
    yield gate
    gate.close()


def endless(number: int) -> StructuredOutputsParams:
    """A specification that only xgrammar takes, and that costs it minutes."""
    rules = "\n".join(f"r{i} ::= [^{chr(97 + i % 20)}]{{1,90}}" for i in range(20))
    return StructuredOutputsParams(grammar=f'root ::= {" ".join(f"r{i}" for i in range(20))} "{number}"\n{rules}')


def test_answers_come_in_time_and_the_loop_stays_free(gate: Gate, parts: Any) -> None:
    async def run() -> tuple[float, float]:
        longest, began, done = 0.0, time.perf_counter(), False

        async def tick() -> None:
            nonlocal longest
            while not done:
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                longest = max(longest, time.perf_counter() - before)

        ticker = asyncio.create_task(tick())
        with pytest.raises(VLLMValidationError, match=r"still being checked|takes longer|being checked and"):
            await gate.prepare(endless(1), parts[1])
        elapsed, done = time.perf_counter() - began, True
        await ticker
        return elapsed, longest

    elapsed, longest = asyncio.run(run())
    assert elapsed < validation.MOST_SECONDS + 0.5
    assert longest < elapsed / 2


def test_equal_specifications_are_checked_once(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    original = validation.plan_spec
    monkeypatch.setattr(validation, "plan_spec", lambda *given: planned.append(given[1]) or original(*given))

    async def run() -> list[Any]:
        params = [StructuredOutputsParams(json={"type": "integer", "minimum": 17}) for _ in range(8)]
        return await asyncio.gather(*(gate.prepare(one, parts[1]) for one in params))

    asyncio.run(run())
    assert gate.check(StructuredOutputsParams(json={"type": "integer", "minimum": 17}), parts[1]) == "xgrammar"
    assert len(planned) == 1


def test_a_withdrawn_request_ends_its_trial(gate: Gate, parts: Any) -> None:
    key = validation.read_spec(endless(2))[2]

    async def run() -> Any:
        task = asyncio.create_task(gate.prepare(endless(2), parts[1]))
        for _ in range(100):
            await asyncio.sleep(0.005)
            work = gate._working.get(key)
            if work is not None and work.trial is not None:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return work

    work = asyncio.run(run())
    assert work.trial.cancelled()
    assert work.result.result(1).refusal == "the request was withdrawn"
    assert key not in gate._verdicts


def test_a_defect_answers_one_request(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise ZeroDivisionError("ours")

    params = StructuredOutputsParams(json=json.dumps({"type": "integer", "maximum": 3}))
    with monkeypatch.context() as patch:
        patch.setattr(validation, "plan_spec", fail)
        with pytest.raises(VLLMValidationError, match="ZeroDivisionError: ours"):
            gate.check(params, parts[1])
    assert gate.check(params, parts[1]) == "xgrammar"


def test_verdicts_are_bounded(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MOST_VERDICTS", 3)
    for number in range(6):
        gate.check(StructuredOutputsParams(regex=f"a{number}"), parts[1])
    assert len(gate._verdicts) == 3


def test_without_llguidance_its_schemas_are_refused(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "_has_guidance", lambda self: False)
    with pytest.raises(VLLMValidationError, match="does not know this tokenizer"):
        gate.check(StructuredOutputsParams(json={"type": "integer", "multipleOf": 3}), parts[1])


def test_servers_check_before_they_add_a_request(tiny_moe: str) -> None:
    """vLLM's own method comes after the check, and only for what passed; engines that are not ours never see it."""
    block = {"vllm_ext": {"structured": {"forced_tokens": "off"}}}
    ours = EngineArgs(model=tiny_moe, max_model_len=256, additional_config=block).create_engine_config()
    stock = EngineArgs(model=tiny_moe, max_model_len=256).create_engine_config()
    added = []

    async def original(self: Any, request_id: str, prompt: Any, params: Any) -> None:
        added.append((self.name, request_id))

    add_request = structured_backend._wrap_add_request(original)
    tokenizer = cached_tokenizer_from_config(ours.model_config)

    def serve(name: str, vllm_config: Any, **given: Any) -> None:
        structured = StructuredOutputsParams(**given) if given else None
        server = SimpleNamespace(
            name=name, vllm_config=vllm_config, input_processor=SimpleNamespace(tokenizer=tokenizer)
        )
        asyncio.run(add_request(server, "r", "x", SamplingParams(structured_outputs=structured)))

    try:
        serve("ours", ours, json={"type": "integer"})
        serve("ours", ours)
        with pytest.raises(VLLMValidationError, match="keyword 'not' at #/not"):
            serve("ours", ours, json={"not": {}})
        serve("stock", stock, json={"not": {}})
        assert added == [("ours", "r"), ("ours", "r"), ("stock", "r")]
        # What was checked there is known when vLLM validates the parameters.
        gate = validation.open_gate(ours)
        assert len(gate._verdicts) == 2
    finally:
        validation.close_gates()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_hostile())
def test_hostile_specifications_are_answered_in_time(gate: Gate, parts: Any, name: str) -> None:
    """A verdict within the limit, whatever it is; bench/structured/hostile.py measures the same in a server."""

    async def run() -> float:
        params = StructuredOutputsParams(**list_hostile()[name])
        began = time.perf_counter()
        with contextlib.suppress(VLLMValidationError):
            await gate.prepare(params, parts[1])
        return time.perf_counter() - began

    assert asyncio.run(run()) < validation.MOST_SECONDS + 0.6
