# SPDX-License-Identifier: Apache-2.0
"""The engine's side: both grammar engines in one vLLM backend, compiled once per specification, with a low priority.

A request names its engine in `_backend` ("vllm_ext/guidance"): validation.py chose it, and tried what is costly. The
plan is made again here from the specification, which travels anyway. vLLM makes one backend for an engine's life, that
of its first structured request (vllm/v1/structured_output/__init__.py:144, 0.32).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import xgrammar as xgr
from vllm import envs
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar, StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

from vllm_ext import observability
from vllm_ext.structured import engines
from vllm_ext.structured.budgets import StepTimes, make_budgeted
from vllm_ext.structured.errors import GrammarError, RefusedError
from vllm_ext.structured.forced_length import forces_little
from vllm_ext.structured.options import Options, read_options
from vllm_ext.structured.routing import Plan, plan_spec
from vllm_ext.structured.specs import SMALL_TEXT
from vllm_ext.structured.store import SpecStore
from vllm_ext.structured.threads import start_thread
from vllm_ext.structured.validation import serves_guidance

logger = logging.getLogger("vllm.vllm_ext")

#: Compiled grammars kept of each engine, by specification.
MOST_MATCHERS = 256
#: Bytes that these may have together, and what a state of theirs takes at most (measured).
MOST_MATCHER_BYTES, STATE_BYTES = 220 << 20, 220
#: Bytes of xgrammar's compiled grammars that are kept, beside those of its own cache. That one's limit,
#: VLLM_XGRAMMAR_CACHE_MB, is also one of each cache here: who sets it low has little memory.
MOST_COMPILED_BYTES = 64 << 20


@dataclass
class ExtBackend(XgrammarBackend):
    """vLLM's xgrammar backend, which gives specifications that another engine serves to llguidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options: Options = read_options(self.vllm_config)
        self._rank = self.vllm_config.parallel_config.data_parallel_rank
        self._has_guidance = serves_guidance(self.tokenizer, self.vocab_size)
        self._lock = threading.Lock()
        cache_bytes = envs.VLLM_XGRAMMAR_CACHE_MB << 20
        self._most_states = min(MOST_MATCHER_BYTES, cache_bytes) // STATE_BYTES
        self._most_compiled_bytes = min(MOST_COMPILED_BYTES, cache_bytes)
        self._matchers: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._compiled: OrderedDict[bytes, Any] = OrderedDict()
        #: By specification, what has been compiled: its engine's cache has it, so no thread is needed.
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        #: What timed grammars of one step take together; SlowMasks begins steps.
        self.steps = StepTimes()
        #: By plan, whether xgrammar may be asked what is forced.
        self._little: OrderedDict[bytes, bool] = OrderedDict()
        # Two lanes: a grammar that takes a second must not keep small ones waiting.
        self._lanes = {is_plain: start_thread(f"compile-{is_plain}") for is_plain in (True, False)}
        self._store = SpecStore(self.options, engines.read_vocabulary(self.compiler))
        # Behind nobody: a list to pre-warm may take minutes, and requests come meanwhile.
        self._prewarming = start_thread("prewarm")
        self._ll_tokenizer: Future[Any] = self._lanes[True].submit(self._build_tokenizer)
        self._prewarming.submit(self._prewarm)

    def start(self, request: Any, waits: bool = False) -> None:
        """Give a structured request its grammar, or the Future of it. waits: compile before returning.

        A request that is aborted while its grammar waits for a thread takes it out of the queue.
        """
        structured = request.structured_output_request
        params = request.sampling_params
        option, text = structured.structured_output_key
        name = (option.name.lower(), text, params.structured_outputs._backend.partition("/")[2])
        stops = params.all_stop_token_ids
        key = _name_key(*name)
        with self._lock:
            plan = self._plans.get(key)
        if plan is not None and self._is_compiled(plan):
            structured.grammar = self.make_grammar(plan, stops)
            return
        is_plain = plan is not None and plan.is_plain
        if plan is None and len(text) <= SMALL_TEXT:
            # Planned here to choose the lane: a short text can be costly, and must not hold up those that are not.
            try:
                plan = self._find_plan(*name)
                is_plain = plan.is_plain
            except RefusedError:
                is_plain = True
        result = self._lanes[is_plain].submit(self._compile, key, name, plan, stops)
        # vLLM drops an aborted request with all it holds; nothing else tells its backend.
        weakref.finalize(structured, result.cancel).atexit = False
        if waits:
            result.exception()
        structured.grammar = result

    def _compile(
        self, key: bytes, name: tuple[str, str, str], plan: Plan | None, stops: set[int] | None
    ) -> StructuredOutputGrammar:
        """plan: that of the name, where it is known. Raises RefusedError and GrammarError."""
        plan = plan or self._find_plan(*name)
        grammar = self._make_counted(*name[:2], plan, stops)
        self._remember(key, plan)
        return grammar

    def _remember(self, key: bytes, plan: Plan) -> None:
        with self._lock:
            self._plans[key] = plan
            # With their texts, which may be large.
            _drop_oldest(self._plans, _measure_plan, self._most_compiled_bytes)

    def _find_plan(self, kind: str, text: str, engine: str) -> Plan:
        """The plan that validation chose: the one of this engine. Raises RefusedError."""
        plan: Plan | None = plan_spec(kind, text, self._has_guidance)  # type: ignore[arg-type]
        while plan is not None and engine and plan.engine != engine:
            plan = plan.fallback
        if plan is None:
            raise RefusedError(f"the specification is not one that {engine} serves")
        return plan

    def compile_grammar(
        self, request_type: StructuredOutputOptions, grammar_spec: str, stop_token_ids: set[int] | None = None
    ) -> StructuredOutputGrammar:
        """vLLM's interface, for callers that have no request. Raises RefusedError, and GrammarError from an engine."""
        plan = plan_spec(request_type.name.lower(), grammar_spec, self._has_guidance)
        try:
            return self.make_grammar(plan, stop_token_ids)
        except GrammarError:
            if plan.fallback is None:
                raise
            return self.make_grammar(plan.fallback, stop_token_ids)

    def make_grammar(self, plan: Plan, stop_token_ids: set[int] | None = None) -> StructuredOutputGrammar:
        """A new grammar of a plan, compiled now unless it is known. Raises GrammarError."""
        grammar: StructuredOutputGrammar
        family = None
        if plan.engine == "guidance":
            # Its copies share a lexer, and the lock of it.
            family = self._find_matcher(plan)
            tokenizer = self._ll_tokenizer.result()
            grammar = GuidanceGrammar(ll_matcher=family.deep_copy(), ll_tokenizer=tokenizer, vocab_size=self.vocab_size)
        else:
            compiled = self._find_compiled(plan)
            stops = list(stop_token_ids) if stop_token_ids else None
            matcher = xgr.GrammarMatcher(
                compiled, override_stop_tokens=stops, max_rollback_tokens=self.num_speculative_tokens
            )
            grammar = XgrammarGrammar(matcher=matcher, vocab_size=self.vocab_size, ctx=compiled)
            # Read by grammar_states.py: only such grammars are looked at.
            grammar.forces_little = self._forces_little(plan, compiled)
        observability.add(f"vllm_ext:structured_{plan.engine}_requests_total", 1, self._rank)
        return make_budgeted(grammar, self.steps, self._rank, family) if plan.is_budgeted else grammar

    def _forces_little(self, plan: Plan, compiled: Any) -> bool:
        """Whether the scheduler may ask what the grammar forces, found out once."""
        key = _digest(plan)
        with self._lock:
            known = self._little.get(key)
        if known is None:
            known = forces_little(str(compiled.grammar))
            with self._lock:
                self._little[key] = known
                _drop_oldest(self._little)
        return known

    def _make_counted(self, kind: str, text: str, plan: Plan, stops: set[int] | None) -> StructuredOutputGrammar:
        began = time.monotonic()
        grammar = self.make_grammar(plan, stops)
        seconds = time.monotonic() - began
        observability.add("vllm_ext:structured_compile_seconds_total", seconds, self._rank)
        observability.add("vllm_ext:structured_compiles_total", 1, self._rank)
        self._store.save(kind, text, plan, getattr(grammar, "ctx", None), seconds)
        return grammar

    def _find_matcher(self, plan: Plan) -> Any:
        """A matcher in its first state, to be copied."""
        key = _digest(plan)
        with self._lock:
            matcher, _ = self._matchers.get(key, (None, 0))
            if matcher is not None:
                self._matchers.move_to_end(key)
        if matcher is None:
            matcher = engines.compile_guidance(self._ll_tokenizer.result(), plan, self.options.whitespace)
            with self._lock:
                self._matchers[key] = matcher, plan.states
                _drop_oldest(self._matchers, lambda kept: kept[1], self._most_states)
        return matcher

    def _build_tokenizer(self) -> Any:
        """llguidance's tokenizer, of which a large vocabulary takes seconds; None where it knows no such tokenizer."""
        return GuidanceBackend._build_ll_tokenizer(self.tokenizer, self.vocab_size) if self._has_guidance else None

    def _is_compiled(self, plan: Plan) -> bool:
        """Whether a grammar of a plan is made without compiling: the engines' own caches drop what is large."""
        key = _digest(plan)
        with self._lock:
            return key in (self._matchers if plan.engine == "guidance" else self._compiled)

    def _find_compiled(self, plan: Plan) -> Any:
        """xgrammar's compiled grammar of a plan."""
        key = _digest(plan)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
                return compiled
        compiled = self._store.load(plan) or engines.compile_xgrammar(self.compiler, plan, self.options.whitespace)
        with self._lock:
            self._compiled[key] = compiled
            _drop_oldest(self._compiled, lambda kept: kept.memory_size_bytes, self._most_compiled_bytes)
        return compiled

    def _prewarm(self) -> None:
        """Compile what is listed for this engine, one after the other; a bad entry is logged, not raised."""
        for kind, text in self._store.list_specs():
            try:
                plan = plan_spec(kind, text, self._has_guidance)
                self._make_counted(kind, text, plan, None)
                # As a request will name it (`start`).
                self._remember(_name_key(kind, text, plan.engine), plan)
            except (RefusedError, GrammarError) as error:
                logger.warning("vllm-ext: a specification to pre-warm is left out: %s", error)

    def destroy(self) -> None:
        """End the compiling threads; what they do now ends first."""
        for lane in (*self._lanes.values(), self._prewarming):
            lane.shutdown(wait=False, cancel_futures=True)
        super().destroy()


def _drop_oldest(
    kept: OrderedDict[bytes, Any], measure: Callable[[Any], int] = lambda value: 0, most: float = 0
) -> None:
    """Down to MOST_MATCHERS, and to `most` of what `measure` finds in all of them.

    The newest stays, whatever its size: its request is about to use it.
    """
    total = sum(map(measure, kept.values()))
    while len(kept) > 1 and (len(kept) > MOST_MATCHERS or total > most):
        total -= measure(kept.popitem(last=False)[1])


def _measure_plan(plan: Plan | None) -> int:
    """Characters of a plan and its fallbacks."""
    return 0 if plan is None else len(plan.text) + _measure_plan(plan.fallback)


def _name_key(kind: str, text: str, engine: str) -> bytes:
    return hashlib.sha256(f"{kind}\0{text}\0{engine}".encode("utf-8", "surrogatepass")).digest()


def _digest(plan: Plan) -> bytes:
    return hashlib.sha256(f"{plan.engine}\0{plan.kind}\0{plan.text}".encode()).digest()
