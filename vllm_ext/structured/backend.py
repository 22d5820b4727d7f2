# SPDX-License-Identifier: Apache-2.0
"""The engine's side: both grammar engines in one vLLM backend, compiled once per specification, with a low priority.

A request names its engine in `_backend` ("vllm_ext/guidance"): validation.py chose it, and tried what is costly. The
plan is made again here from the specification, which travels anyway. vLLM makes one backend for an engine's life, that
of its first structured request (vllm/v1/structured_output/__init__.py:144, 0.32).
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xgrammar as xgr
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar, StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

from vllm_ext import observability
from vllm_ext.config import STRUCTURED_BACKEND
from vllm_ext.structured import cost, engines
from vllm_ext.structured.budgets import make_budgeted
from vllm_ext.structured.options import Options, read_options
from vllm_ext.structured.routing import Plan, RefusedError, plan_spec
from vllm_ext.structured.store import SpecStore
from vllm_ext.structured.validation import fits_vocabulary

logger = logging.getLogger("vllm.vllm_ext")

#: Compiled grammars of llguidance kept, by specification; xgrammar has a cache of its own, limited in bytes.
MOST_MATCHERS = 256
#: States that these may have together; a state takes up to 220 bytes (measured).
MOST_MATCHER_STATES = 1_000_000
#: Characters of a specification that is planned where its request arrives.
SMALL_TEXT = 8192
#: Compiling threads give way to the engine (nice).
NICENESS = 5


def is_ours(vllm_config: Any) -> bool:
    """Whether an engine's structured requests are the pack's: its finished configuration names our backend."""
    return bool(vllm_config.structured_outputs_config.backend == STRUCTURED_BACKEND)


@dataclass
class ExtBackend(XgrammarBackend):
    """vLLM's xgrammar backend, which gives specifications that another engine serves to llguidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options: Options = read_options(self.vllm_config)
        self._rank = self.vllm_config.parallel_config.data_parallel_rank
        self._has_guidance = GuidanceBackend.is_tokenizer_supported(self.tokenizer) and fits_vocabulary(
            self.tokenizer, self.vocab_size
        )
        self._ll_tokenizer: Any = None
        self._lock = threading.Lock()
        self._matchers: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        #: By specification, what has been compiled: its engine's cache has it, so no thread is needed.
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        # Two lanes: a grammar that takes a second must not keep small ones waiting.
        self._lanes = {
            is_plain: ThreadPoolExecutor(1, f"vllm-ext-compile-{is_plain}", initializer=_give_way)
            for is_plain in (True, False)
        }
        self._store = SpecStore(self.options, engines.read_vocabulary(self.compiler))
        self._lanes[False].submit(self._prewarm)

    def start(self, request: Any, waits: bool = False) -> None:
        """Give a structured request its grammar, or the Future of it. waits: compile before returning.

        A request that is aborted while its grammar waits for a thread takes it out of the queue.
        """
        structured = request.structured_output_request
        params = request.sampling_params
        option, text = structured.structured_output_key
        name = (option.name.lower(), text, params.structured_outputs._backend.partition("/")[2])
        stops = params.all_stop_token_ids
        key = hashlib.sha256("\0".join(name).encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            plan = self._plans.get(key)
        if plan is not None:
            structured.grammar = self.make_grammar(plan, stops)
            return
        is_small = False
        if len(text) <= SMALL_TEXT:
            # Planned here to choose the lane: a short text can be costly, and must not hold up those that are not.
            try:
                is_small = self._find_plan(*name).is_plain
            except RefusedError:
                is_small = True
        result = self._lanes[is_small].submit(self._compile, key, name, stops)
        # vLLM drops an aborted request with all it holds; nothing else tells its backend.
        weakref.finalize(structured, result.cancel).atexit = False
        if waits:
            result.exception()
        structured.grammar = result

    def _compile(self, key: bytes, name: tuple[str, str, str], stops: set[int] | None) -> StructuredOutputGrammar:
        plan = self._find_plan(*name)
        grammar = self._make_counted(plan, stops)
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > MOST_MATCHERS:
                self._plans.popitem(last=False)
        return grammar

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
        except engines.GrammarError:
            if plan.fallback is None:
                raise
            return self.make_grammar(plan.fallback, stop_token_ids)

    def make_grammar(self, plan: Plan, stop_token_ids: set[int] | None = None) -> StructuredOutputGrammar:
        """A new grammar of a plan, compiled now unless it is known. Raises GrammarError."""
        grammar: StructuredOutputGrammar
        if plan.engine == "guidance":
            matcher = self._find_matcher(plan)
            grammar = GuidanceGrammar(ll_matcher=matcher, ll_tokenizer=self._ll_tokenizer, vocab_size=self.vocab_size)
        else:
            compiled = self._store.load(plan) or engines.compile_xgrammar(self.compiler, plan, self.options.whitespace)
            stops = list(stop_token_ids) if stop_token_ids else None
            matcher = xgr.GrammarMatcher(
                compiled, override_stop_tokens=stops, max_rollback_tokens=self.num_speculative_tokens
            )
            grammar = XgrammarGrammar(matcher=matcher, vocab_size=self.vocab_size, ctx=compiled)
        observability.add(f"vllm_ext:structured_{plan.engine}_requests_total", 1, self._rank)
        return grammar if plan.states <= cost.PLAIN_STATES else make_budgeted(grammar, self._rank)

    def _make_counted(self, plan: Plan, stops: set[int] | None) -> StructuredOutputGrammar:
        began = time.monotonic()
        grammar = self.make_grammar(plan, stops)
        seconds = time.monotonic() - began
        observability.add("vllm_ext:structured_compile_seconds_total", seconds, self._rank)
        observability.add("vllm_ext:structured_compiles_total", 1, self._rank)
        self._store.save(plan, getattr(grammar, "ctx", None), seconds)
        return grammar

    def _find_matcher(self, plan: Plan) -> Any:
        """A matcher in its first state: a copy of the one that was compiled."""
        key = _digest(plan)
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = GuidanceBackend._build_ll_tokenizer(self.tokenizer, self.vocab_size)
            matcher, _ = self._matchers.get(key, (None, 0))
            if matcher is not None:
                self._matchers.move_to_end(key)
        if matcher is None:
            matcher = engines.compile_guidance(self._ll_tokenizer, plan, self.options.whitespace)
            with self._lock:
                self._matchers[key] = matcher, plan.states
                # The newest stays, whatever its size: its request is about to use it.
                while len(self._matchers) > 1 and self._is_full():
                    self._matchers.popitem(last=False)
        return matcher.deep_copy()

    def _is_full(self) -> bool:
        states = sum(size for _, size in self._matchers.values())
        return len(self._matchers) > MOST_MATCHERS or states > MOST_MATCHER_STATES

    def _prewarm(self) -> None:
        """Compile what is listed for this engine, one after the other; a bad entry is logged, not raised."""
        for kind, text in self._store.list_specs():
            try:
                self._make_counted(plan_spec(kind, text, self._has_guidance), None)
            except (RefusedError, engines.GrammarError) as error:
                logger.warning("vllm-ext: a specification to pre-warm is left out: %s", error)

    def destroy(self) -> None:
        """End the compiling threads; what they do now ends first."""
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        super().destroy()


def _digest(plan: Plan) -> bytes:
    return hashlib.sha256(f"{plan.engine}\0{plan.kind}\0{plan.text}".encode()).digest()


def _give_way() -> None:
    """Lower this thread's priority; on Linux the thread's own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
