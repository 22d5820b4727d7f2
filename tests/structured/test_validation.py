# SPDX-License-Identifier: Apache-2.0
"""Checks in the API process: off the event loop, once for equal specifications, in time, ended when withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config

from bench.structured.attacks import list_attacks
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
        trial = work.trial
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return work, trial

    work, trial = asyncio.run(run())
    assert trial.cancelled()
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


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize("kind", [OverflowError, Panic])
def test_a_defect_after_planning_is_answered_too(
    gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def fail(*given: Any) -> Any:
        raise kind("ours")

    params = StructuredOutputsParams(json=json.dumps({"const": kind.__name__}))
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "_parse", fail)
        with pytest.raises(VLLMValidationError, match=f"{kind.__name__}: ours"):
            asyncio.run(gate.prepare(params, parts[1]))
    with monkeypatch.context() as patch:
        patch.setattr(gate._trials, "submit", fail)
        with pytest.raises(VLLMValidationError, match=f"{kind.__name__}: ours"):
            gate.check(StructuredOutputsParams(regex="[a-z]{1,301}"), parts[1])
    assert len(gate._working) <= 1, "at most the endless one"
    assert gate.check(params, parts[1]) == "xgrammar"


def test_what_is_known_does_not_wait_for_what_is_large(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large specifications that take long to plan and to read; a remembered and a new small one pass by."""
    known = StructuredOutputsParams(json={"type": "integer", "maximum": 5})
    gate.check(known, parts[1])
    original, original_read = validation.plan_spec, validation.read_spec
    monkeypatch.setattr(
        validation, "plan_spec", lambda kind, text, *given: time.sleep(len(text) / 1e4) or original(kind, text, *given)
    )
    monkeypatch.setattr(
        validation,
        "read_spec",
        lambda params: (
            (isinstance(params.json, dict) and "enum" in params.json and time.sleep(0.2)) or original_read(params)
        ),
    )
    large = [StructuredOutputsParams(json={"enum": ["x" * 12_000, str(number)]}) for number in range(3)]

    async def run() -> tuple[float, list[Any]]:
        tasks = [asyncio.create_task(gate.prepare(one, parts[1])) for one in large]
        await asyncio.sleep(0.3)
        began = time.perf_counter()
        await gate.prepare(known, parts[1])
        await gate.prepare(StructuredOutputsParams(json={"type": "integer", "maximum": 6}), parts[1])
        elapsed = time.perf_counter() - began
        return elapsed, await asyncio.gather(*tasks, return_exceptions=True)

    elapsed, answers = asyncio.run(run())
    assert elapsed < 0.5
    assert all(answer is None or isinstance(answer, VLLMValidationError) for answer in answers)


def test_one_limit_holds_for_reading_and_planning(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = validation.read_spec
    monkeypatch.setattr(validation, "read_spec", lambda params: time.sleep(1.5) or original(params))
    began = time.perf_counter()
    with pytest.raises(VLLMValidationError, match="try again"):
        asyncio.run(prepare_alone(gate, StructuredOutputsParams(json={"const": "y" * 12_000}), parts[1]))
    assert time.perf_counter() - began < validation.MOST_SECONDS + 0.5


async def prepare_alone(gate: Gate, params: Any, tokenizer: Any) -> None:
    await gate.prepare(params, tokenizer)


def test_a_request_withdrawn_while_it_is_planned_is_not_tried(
    gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = validation.plan_spec
    monkeypatch.setattr(validation, "plan_spec", lambda *given: time.sleep(0.3) or original(*given))
    tried: list[Any] = []
    monkeypatch.setattr(gate._trials, "submit", lambda plan: tried.append(plan))
    key = validation.read_spec(endless(3))[2]

    async def run() -> Any:
        task = asyncio.create_task(gate.prepare(endless(3), parts[1]))
        await asyncio.sleep(0.1)
        work = gate._working[key]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return work

    assert asyncio.run(run()).result.result(5).refusal == "the request was withdrawn"
    assert not tried


def test_a_withdrawn_check_answers_nobody_else(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = validation.plan_spec
    monkeypatch.setattr(validation, "plan_spec", lambda *given: time.sleep(0.2) or original(*given))
    params = StructuredOutputsParams(regex="[a-z]{1,302}")

    async def run() -> None:
        first = asyncio.create_task(gate.prepare(params, parts[1]))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        # The first one's check is still being planned.
        with contextlib.suppress(VLLMValidationError):
            await gate.prepare(params, parts[1])

    asyncio.run(run())
    assert gate.check(params, parts[1]) == "xgrammar"


def test_a_trial_that_nobody_waits_for_any_more_is_ended(
    gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last request leaves between the look at who waits and the trial."""
    trial: Future[dict[str, Any]] = Future()
    params = StructuredOutputsParams(regex="[a-z]{1,303}")
    key = validation.read_spec(params)[2]

    def submit(plan: Any) -> Future[dict[str, Any]]:
        gate._working[key].waiting = 0
        return trial

    monkeypatch.setattr(gate._trials, "submit", submit)
    with pytest.raises(VLLMValidationError, match="withdrawn"):
        gate.check(params, parts[1])
    assert trial.cancelled()


def test_llguidances_refusals_have_a_pointer(gate: Gate, parts: Any) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    with pytest.raises(VLLMValidationError, match=r"#/properties/a/pattern: .*look-around"):
        gate.check(StructuredOutputsParams(json=schema), parts[1])


def test_a_check_that_was_tried_is_not_kept(gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []

    class Work(validation._Work):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            begun.append(weakref.ref(self))

    monkeypatch.setattr(validation, "_Work", Work)
    tried: list[Any] = []
    submit = gate._trials.submit
    monkeypatch.setattr(gate._trials, "submit", lambda plan: (tried.append(plan), submit(plan))[1])
    gc.collect()
    gc.disable()
    try:
        # A thread that waits for more may still hold the last one.
        for letter in "xy":
            gate.check(StructuredOutputsParams(regex=f"[a-{letter}]{{1,300}}"), parts[1])
        assert len(begun) == len(tried) == 2
        assert begun[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("outcome", ["memory", "slow", "defect"])
def test_what_may_be_the_machines_fault_is_tried_again(
    gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    def submit(plan: Any) -> Future[dict[str, Any]]:
        result: Future[dict[str, Any]] = Future()
        result.set_result({"outcome": outcome, "message": "TypeError: x", "ms": 1.0})
        return result

    content = {"type": "const_string", "value": outcome}
    tag = {"type": "structural_tag", "format": {"type": "repeat", "min": 1, "max": 300, "content": content}}
    params = StructuredOutputsParams(structural_tag=json.dumps(tag))
    with monkeypatch.context() as patch:
        patch.setattr(gate._trials, "submit", submit)
        with pytest.raises(VLLMValidationError):
            gate.check(params, parts[1])
    until = gate._verdicts[validation.read_spec(params)[2]].until
    assert 0 < until - time.monotonic() <= validation.SLOW_SECONDS


def test_llguidance_without_a_tokenizer_for_trials_is_asked_here(
    gate: Gate, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_tokenizer", SimpleNamespace())
    monkeypatch.setattr(Gate, "_has_guidance", lambda self: True)
    parsed = []
    monkeypatch.setattr(Gate, "_parse", lambda self, plan: parsed.append(plan.engine))
    params = StructuredOutputsParams(json={"allOf": [{"enum": [f"word {i}" for i in range(4000)]}, {"minLength": 1}]})
    assert gate.check(params, parts[1]) == "guidance"
    assert parsed == ["guidance"]


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
@pytest.mark.parametrize("name", list_attacks())
def test_hostile_specifications_are_answered_in_time(gate: Gate, parts: Any, name: str) -> None:
    """A verdict within the limit, whatever it is; bench/structured/hostile.py measures the same in a server."""

    async def run() -> float:
        params = StructuredOutputsParams(**list_attacks()[name])
        began = time.perf_counter()
        with contextlib.suppress(VLLMValidationError):
            await gate.prepare(params, parts[1])
        return time.perf_counter() - began

    assert asyncio.run(run()) < validation.MOST_SECONDS + 0.6
