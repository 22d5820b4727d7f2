# SPDX-License-Identifier: Apache-2.0
"""The backend in vLLM's own manager, without a model: engines by request, order, aborts, pre-warming, limits."""

from __future__ import annotations

import copy
import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar as xgr
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from bench.structured.tool_calls import write_tag
from vllm_ext.structured import budgets, validation
from vllm_ext.structured.budgets import BudgetedGuidance, BudgetedXgrammar
from vllm_ext.structured.routing import plan_spec
from vllm_ext.structured.store import SpecStore, read_specs

EASY = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
DATED = {"type": "object", "properties": {"when": {"type": "string", "format": "date-time"}}}
HARD = {"allOf": [{"type": "string"}, {"enum": ["yes", "no"]}]}


class Server:
    """An engine's configuration, manager and checks."""

    def __init__(self, vllm_config: Any) -> None:
        self.config = vllm_config
        self.tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.manager = StructuredOutputManager(vllm_config)

    def check(self, **given: Any) -> SamplingParams:
        """Parameters as a request's, validated."""
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
        params._validate_structured_outputs(
            self.config.model_config, self.config.structured_outputs_config, self.tokenizer
        )
        return params

    def start(self, params: SamplingParams) -> Any:
        """A request with these parameters, its grammar begun."""
        structured = StructuredOutputRequest.from_sampling_params(params)
        request: Any = SimpleNamespace(sampling_params=params, structured_output_request=structured, request_id="r")
        self.manager.grammar_init(request)
        return request

    def compile(self, **given: Any) -> Any:
        """The grammar of a request, or the exception in its place."""
        structured = self.start(self.check(**given)).structured_output_request
        for _ in range(3000):
            if structured.is_grammar_ready:
                return structured.grammar
            time.sleep(0.01)
        raise AssertionError("the grammar is not ready after 30 s")


def configure(model: str, **block: Any) -> Any:
    load_general_plugins()
    settings = {"structured": {"forced_tokens": "off", **block}}
    return EngineArgs(model=model, max_model_len=256, additional_config={"vllm_ext": settings}).create_engine_config()


@pytest.fixture(scope="module")
def server(tiny_moe: str) -> Iterator[Server]:
    server = Server(configure(tiny_moe))
    yield server
    server.manager.clear_backend()
    validation.close_gates()


def test_every_request_has_its_engine_in_any_order(server: Server) -> None:
    for schema, kind in ((EASY, XgrammarGrammar), (HARD, GuidanceGrammar)) * 2:
        assert isinstance(server.compile(json=schema), kind)
    for given, kind in (
        ({"regex": "a^b|c$"}, None),
        ({"choice": ["red", 'gr"een']}, XgrammarGrammar),
        ({"grammar": 'root ::= "a"'}, BudgetedXgrammar),
        ({"grammar": 'start: "a"'}, BudgetedXgrammar),
        ({"regex": "[a-z]b"}, BudgetedXgrammar),
        ({"json_object": True}, XgrammarGrammar),
        ({"json": {"enum": [f"word {i}" for i in range(1000)]}}, BudgetedGuidance),
        ({"structural_tag": write_tag("hermes", "auto", EASY)}, BudgetedXgrammar),
        ({"structural_tag": write_tag("hermes", "auto", DATED)}, BudgetedGuidance),
    ):
        if kind is None:
            with pytest.raises(VLLMValidationError):
                server.check(**given)
        else:
            assert isinstance(server.compile(**given), kind)


def test_masks_of_both_engines_have_one_shape(server: Server) -> None:
    easy, hard = server.compile(json=EASY), server.compile(json=HARD)
    masks = server.manager.backend.allocate_token_bitmask(2)
    easy.fill_bitmask(masks, 0)
    hard.fill_bitmask(masks, 1)
    first = [{token for token in range(len(server.tokenizer)) if row[token // 32] >> token % 32 & 1} for row in masks]
    texts = [{server.tokenizer.decode([token])[:1] for token in row} for row in first]
    assert texts[0] == {"{"}
    assert texts[1] == {'"'}


def test_parameters_can_be_used_again(server: Server) -> None:
    params = server.check(json=HARD)
    again = copy.deepcopy(params)
    again._validate_structured_outputs(
        server.config.model_config, server.config.structured_outputs_config, server.tokenizer
    )
    assert again.structured_outputs._backend == params.structured_outputs._backend == "vllm_ext/guidance"
    assert again.structured_outputs.json == HARD


def test_the_users_arguments_keep_their_backend(tiny_moe: str) -> None:
    load_general_plugins()
    arguments = EngineArgs(
        model=tiny_moe, max_model_len=256, additional_config={"vllm_ext": {"structured": {"forced_tokens": "off"}}}
    )
    ours = arguments.create_engine_config().structured_outputs_config
    assert (ours.backend, arguments.structured_outputs_config.backend) == ("vllm_ext", "auto")
    stock = EngineArgs(model=tiny_moe, max_model_len=256).create_engine_config().structured_outputs_config
    assert stock.backend == "auto"


def test_engines_that_are_not_ours_pass_through(server: Server, tiny_moe: str) -> None:
    stock = Server(EngineArgs(model=tiny_moe, max_model_len=256).create_engine_config())
    assert stock.manager.backend is None
    assert stock.check(json=HARD).structured_outputs._backend == "guidance"
    assert isinstance(stock.compile(json=EASY), XgrammarGrammar)
    assert type(stock.manager.backend).__name__ == "XgrammarBackend"
    stock.manager.clear_backend()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"not": {}}}, "keyword 'not' at #/not"),
        ({"json": {"a": [[[[{}]]]] * 10, "b": "x" * 600_000}}, "bytes"),
        ({"json": json.loads('{"a":' * 80 + "1" + "}" * 80)}, "more than 64 levels"),
        ({"regex": "a{1,999999999}"}, "too large"),
        ({"choice": []}, "empty"),
        ({"grammar": " "}, "empty"),
        ({"json": " "}, "empty"),
        ({"json_object": False}, "must be true"),
        ({"regex": "(?=a)b"}, "does not take the regex"),
        ({"json": "{"}, "not JSON"),
    ],
)
def test_refusals_are_errors_of_the_request(server: Server, given: Any, message: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(VLLMValidationError, match=message):
            server.check(**given)


def test_an_aborted_request_leaves_the_queue(server: Server) -> None:
    """vLLM drops an aborted request, and with it the only strong reference to what it waits for."""
    release = threading.Event()
    lane = server.manager.backend._lanes[True]
    blocked = lane.submit(release.wait, 30)
    request = server.start(server.check(json={"type": "integer", "minimum": 41}))
    future = request.structured_output_request._grammar
    del request
    gc.collect()
    assert future.cancelled()
    release.set()
    assert blocked.result(30)


def test_masks_over_their_budget_end_the_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_spec("json", json.dumps({"enum": [f"word {i}" for i in range(1000)]}))
    grammar: Any = server.manager.backend.make_grammar(plan)
    masks = server.manager.backend.allocate_token_bitmask(1)
    grammar.fill_bitmask(masks, 0)
    token = next(token for token in range(len(server.tokenizer)) if server.tokenizer.decode([token]) == '"')
    assert grammar.accept_tokens("r", [token])
    grammar.debt_ms = 0.0  # the first mask may take any time on a busy machine
    grammar.charge(budgets.CREDIT_MS)
    assert not grammar.is_exhausted
    for _ in range(5):
        grammar.debt_ms, before = budgets.CREDIT_MS, budgets.CREDIT_MS
        grammar.fill_bitmask(masks, 0)  # a quick mask pays back
    assert grammar.debt_ms < before
    grammar.charge(2 * budgets.CREDIT_MS)
    assert not grammar.accept_tokens("r", [token])


def test_moves_of_a_short_grammar_are_charged(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tree of readings grows with the text, while its masks stay quick."""
    monkeypatch.setattr(budgets, "CREDIT_MS", 60.0)
    grammar: Any = server.compile(grammar="root ::= s\ns ::= s s | [a-z ]")
    token = next(token for token in range(len(server.tokenizer)) if server.tokenizer.decode([token]) == "a")
    masks = server.manager.backend.allocate_token_bitmask(1)
    for _ in range(600):
        grammar.fill_bitmask(masks, 0)
        if not grammar.accept_tokens("r", [token]):
            break
    assert grammar.is_exhausted
    grammar = server.compile(regex="[a-z]b")
    for move in (lambda: grammar.validate_tokens([token]), lambda: grammar.rollback(0)):
        before = grammar.steps.total_ms
        move()
        assert grammar.steps.total_ms > before


def test_a_grammar_without_an_end_is_not_asked_what_it_forces(server: Server) -> None:
    """xgrammar would never answer, inside of schedule()."""
    assert server.compile(json=EASY).forces_little
    assert not server.compile(grammar='root ::= "a" root').forces_little


def test_what_a_cache_dropped_is_compiled_in_a_lane(server: Server) -> None:
    params = server.check(json={"type": "integer", "minimum": 43})
    server.compile(json={"type": "integer", "minimum": 43})
    known = server.start(params)
    assert isinstance(known.structured_output_request._grammar, XgrammarGrammar)
    server.manager.backend._compiled.clear()
    dropped = server.start(params)
    assert isinstance(dropped.structured_output_request._grammar.result(30), XgrammarGrammar)


def test_a_small_cache_of_vllms_is_a_small_one_here(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_XGRAMMAR_CACHE_MB bounds what either engine's grammars are kept for."""
    monkeypatch.setenv("VLLM_XGRAMMAR_CACHE_MB", "1")
    server = Server(configure(tiny_moe))
    try:
        for number in range(4):
            grammar = server.compile(json={"enum": [f"a word of some length {number} {i}" for i in range(1000)]})
            assert isinstance(grammar, BudgetedGuidance)
        assert len(server.manager.backend._matchers) == 1, "each of them is larger, and the newest stays"
    finally:
        server.manager.clear_backend()
        validation.close_gates()


def test_pre_warming_is_behind_no_request(server: Server) -> None:
    release = threading.Event()
    server.manager.backend._prewarming.submit(release.wait, 30)
    try:
        assert isinstance(server.compile(json={"enum": [f"term {i}" for i in range(1000)]}), BudgetedGuidance)
    finally:
        release.set()


def test_requests_share_the_time_of_a_step(server: Server) -> None:
    steps = server.manager.backend.steps
    first, second = (server.compile(regex="[a-z]c") for _ in range(2))
    assert first.steps is second.steps is steps
    steps.begin()
    steps.begin()
    assert steps.mask_ms == budgets.MASK_MS
    for grammar in (first, second):
        grammar.charge(2 * budgets.STEP_MS)
    steps.begin()
    assert steps.mask_ms == pytest.approx(budgets.MASK_MS / 4)


def test_grammars_of_one_lexer_are_a_family(server: Server) -> None:
    """Copies of an llguidance grammar lock each other out (scheduling/slow_masks.py); xgrammar's do not."""
    first, second = (server.compile(json={"enum": [f"member {i}" for i in range(1000)]}) for _ in range(2))
    assert isinstance(first, BudgetedGuidance)
    assert first.family is second.family
    other = server.compile(json={"enum": [f"relative {i}" for i in range(1000)]})
    assert other.family is not first.family
    plain, again = (server.compile(regex="[a-z]c") for _ in range(2))
    assert plain.family is not again.family


def test_the_store_brings_back_what_was_compiled(server: Server, tmp_path: Path) -> None:
    info = server.manager.backend._store._info
    options = SimpleNamespace(prewarm=None, store_dir=tmp_path / "store", whitespace="any")
    store = SpecStore(options, info)  # type: ignore[arg-type]
    plan = plan_spec("json", json.dumps(EASY))
    compiled = xgr.GrammarCompiler(info).compile_json_schema(plan.text)
    assert store.load(plan) is None
    store.save("json", json.dumps(EASY), plan, compiled, seconds=10.0)
    store.save("regex", "[a-z]+", plan_spec("regex", "[a-z]+"), None, seconds=0.1)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700

    again = SpecStore(options, info)  # type: ignore[arg-type]
    assert {kind for kind, _ in again.list_specs()} == {"json", "regex"}
    assert again.load(plan).memory_size_bytes > 0
    # What loads slower than it compiles is not kept, and what is damaged is dropped.
    other = plan_spec("json", json.dumps({"type": "integer"}))
    again.save("json", json.dumps({"type": "integer"}), other, compiled, seconds=1e-9)
    assert again.load(other) is None
    (kept,) = (tmp_path / "store").glob("*.compiled.json")
    kept.write_text("{}")
    assert again.load(plan).memory_size_bytes > 0, "it stays in memory"
    assert SpecStore(options, info).load(plan) is None  # type: ignore[arg-type]
    assert not kept.exists()


def test_a_restart_serves_what_was_stored_without_compiling(tiny_moe: str, tmp_path: Path) -> None:
    """Also where a plan's text is another one than the request's: dates, lengths, open objects."""
    schemas = [
        {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"]},
        {"type": "string", "maxLength": 5},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True},
    ]
    names: list[set[str]] = []
    for number in range(2):
        server = Server(configure(tiny_moe, store_dir=str(tmp_path / "store")))
        if number == 0:
            for schema in schemas:
                server.compile(json=schema)
        else:
            server.compile(json={"type": "null"})  # the backend is made by the first request
            server.manager.backend._prewarming.submit(int).result(60)
            for schema in schemas:
                request = server.start(server.check(json=schema))
                grammar = request.structured_output_request._grammar
                assert isinstance(grammar, XgrammarGrammar | GuidanceGrammar), schema
        names.append({path.name for path in (tmp_path / "store").glob("*.spec.json")})
        server.manager.clear_backend()
        validation.close_gates()
    assert len(names[0]) == len(schemas)
    assert len(names[1] - names[0]) == 1, "only the one that was new"


def test_prewarm_files(tmp_path: Path, messages: list[str]) -> None:
    file = tmp_path / "specs.jsonl"
    file.write_text('{"json": {"type": "integer"}}\n\n{"regex": "a+"}\nnonsense\n{"other": 1}\n')
    assert list(read_specs(file)) == [("json", '{"type": "integer"}'), ("regex", "a+")]
    assert len(messages) == 2
    file.write_text('[{"choice": ["a", "b"]}]')
    assert list(read_specs(file)) == [("choice", '["a", "b"]')]


def test_the_name_alone_switches_everything_on(tiny_moe: str) -> None:
    load_general_plugins()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--model", tiny_moe, "--max-model-len", "256", "--structured-outputs-config.backend", "vllm_ext"]
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(given))
    built = arguments.create_engine_config()
    assert built.structured_outputs_config.backend == "vllm_ext"
    assert built.additional_config == {"vllm_ext": {"structured": {}}}
    assert not arguments.additional_config
    validation.close_gates()


def test_settings_are_checked_at_the_start(tiny_moe: str, tmp_path: Path) -> None:
    for block, message in (
        ({"max_compile_ms": 0}, "max_compile_ms must be above 0"),
        ({"whitespace": -1}, "whitespace must be any, compact or a count"),
        ({"prewarm": str(tmp_path / "gone")}, "prewarm: no file"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(tiny_moe, **block)
