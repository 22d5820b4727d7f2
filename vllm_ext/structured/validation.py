# SPDX-License-Identifier: Apache-2.0
"""Checks of structured requests in the API process: off its event loop, once per specification, and bounded.

    request -> remembered verdict, or: measured, planned (routing.py), then parsed here if plain, else tried in a
    process that can be killed (trials.py) -> served by an engine, or refused with what is wrong

vLLM validates every request anew on the event loop, and compiles without a limit where the request is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_ext import observability
from vllm_ext.structured import engines
from vllm_ext.structured.errors import GrammarError, RefusedError, shorten
from vllm_ext.structured.options import Options, read_options
from vllm_ext.structured.refusals import find_refused
from vllm_ext.structured.routing import Plan, plan_spec
from vllm_ext.structured.specs import SMALL_TEXT, is_small, read_spec
from vllm_ext.structured.trials import TrialPool

logger = logging.getLogger("vllm.vllm_ext")

#: Verdicts remembered, by specification.
MOST_VERDICTS = 1024
#: A specification that was slow is tried again after so long: the machine may have been busy.
SLOW_SECONDS = 60.0
#: A request is answered after so long; the check goes on, and a repeated request finds its verdict.
MOST_SECONDS = 0.8


@dataclass(frozen=True)
class Verdict:
    """What is known of a specification: the engine that serves it, or why none does; until when (monotonic)."""

    engine: str | None
    refusal: str = ""
    until: float = float("inf")


@dataclass
class _Work:
    """A check under way, and how many requests wait for it."""

    kind: Any
    text: str
    result: Future[Verdict]
    lane: ThreadPoolExecutor
    trial: Future[dict[str, Any]] | None = None
    waiting: int = 0


_WITHDRAWN = Verdict(None, "the request was withdrawn", 0.0)


class Gate:
    """The checks of one engine. Thread-safe."""

    def __init__(self, options: Options, model_config: Any, structured_config: Any) -> None:
        """model_config, structured_config: vLLM's, of the finished configuration."""
        self._options, self._model_config, self._structured_config = options, model_config, structured_config
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._working: dict[bytes, _Work] = {}
        self._lock = threading.Lock()
        # Large specifications are read and planned beside small ones, which must not wait for them.
        self._lanes = {
            is_small: ThreadPoolExecutor(1, thread_name_prefix=f"vllm-ext-validation-{is_small}")
            for is_small in (True, False)
        }
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="vllm-ext-reading")
        self._tokenizer: Any = None
        self._trials = TrialPool(self._make_setup, options.max_compile_ms, options.max_compile_mib)

    def start(self, tokenizer: Any) -> None:
        """Start the process that tries grammars, in the background, before a request needs it."""
        if self._tokenizer is None and tokenizer is not None:
            self._tokenizer = tokenizer
            self._lanes[False].submit(self._trials.start)

    async def prepare(self, params: Any, tokenizer: Any) -> None:
        """Settle the verdict on a request's specification without holding the event loop.

        params: StructuredOutputsParams. Raises VLLMValidationError (HTTP 400). Cancelling ends the trial, if no other
        request waits for it.
        """
        self._tokenizer = self._tokenizer or tokenizer
        loop = asyncio.get_running_loop()
        ends = loop.time() + MOST_SECONDS
        if is_small(params):
            kind, text, key = read_spec(params)
        else:
            reading = loop.run_in_executor(self._reader, read_spec, params)
            try:
                kind, text, key = await asyncio.wait_for(reading, MOST_SECONDS)
            except TimeoutError:
                raise VLLMValidationError("other large specifications are being read: try again") from None
        verdict = self._recall(key)
        if verdict is None:
            work = self._begin(key, kind, text)
            waiting = asyncio.shield(asyncio.wrap_future(work.result))
            try:
                verdict = await asyncio.wait_for(waiting, max(0.0, ends - loop.time()))
            except TimeoutError:
                # It counts as waiting further on: it was told that a later request finds the verdict.
                verdict = Verdict(None, f"the {kind} specification is costly and still being checked: try again")
            except asyncio.CancelledError:
                self._leave(work)
                raise
        _raise_refusal(verdict)

    def check(self, params: Any, tokenizer: Any) -> str:
        """The engine of a request, settled here if `prepare` was not called before. Raises VLLMValidationError."""
        self._tokenizer = self._tokenizer or tokenizer
        kind, text, key = read_spec(params)
        verdict = self._recall(key) or self._begin(key, kind, text).result.result()
        _raise_refusal(verdict)
        assert verdict.engine is not None
        return verdict.engine

    def close(self) -> None:
        """End threads and processes."""
        self._trials.close()
        for threads in (*self._lanes.values(), self._reader):
            threads.shutdown(wait=False, cancel_futures=True)

    def _recall(self, key: bytes) -> Verdict | None:
        with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is None or verdict.until < time.monotonic():
                return None
            self._verdicts.move_to_end(key)
            return verdict

    def _begin(self, key: bytes, kind: Any, text: str) -> _Work:
        """The check of a specification: one, however many requests bring it."""
        with self._lock:
            work = self._working.get(key)
            if work is None or work.waiting == 0:
                # A check that all its requests left answers none that comes now.
                work = _Work(kind, text, Future(), self._lanes[len(text) <= SMALL_TEXT])
                work.lane.submit(self._decide, key, work)
                self._working[key] = work
            work.waiting += 1
            return work

    def _leave(self, work: _Work) -> None:
        with self._lock:
            work.waiting -= 1
        self._end_unwanted(work)

    def _end_unwanted(self, work: _Work) -> None:
        """End the trial of a check that no request waits for."""
        with self._lock:
            trial = work.trial if work.waiting == 0 else None
        if trial is not None:
            trial.cancel()

    def _decide(self, key: bytes, work: _Work) -> None:
        """Plan, and parse what is plain; what is not goes on in `_try_next` when its trial ends."""
        with self._answering(key, work):
            try:
                plan = plan_spec(work.kind, work.text, self._has_guidance())
            except RefusedError as error:
                self._settle(key, work, Verdict(None, str(error)))
                return
            self._try_next(key, work, list(_chain(plan)), "")

    @contextlib.contextmanager
    def _answering(self, key: bytes, work: _Work) -> Iterator[None]:
        """Whatever goes wrong inside answers this specification's requests, and is not remembered."""
        try:
            yield
        except BaseException as error:  # a defect of ours, or a panic of an engine, which is no Exception
            logger.exception("vllm-ext: a structured specification could not be checked")
            if not work.result.done():
                self._settle(key, work, Verdict(None, shorten(f"{type(error).__name__}: {error}"), 0.0))

    def _go_on(self, key: bytes, work: _Work, plans: list[Plan], refusal: str) -> None:
        with self._answering(key, work):
            self._try_next(key, work, plans, refusal)

    def _try_next(self, key: bytes, work: _Work, plans: list[Plan], refusal: str) -> None:
        while plans and plans[0].is_plain:
            plan = plans.pop(0)
            try:
                self._parse(plan)
            except GrammarError as error:
                refusal = self._explain(work, plan, "refused", str(error))
                continue
            self._settle(key, work, Verdict(plan.engine))
            return
        if not plans:
            self._settle(key, work, Verdict(None, refusal))
            return
        plan = plans.pop(0)
        if plan.engine == "guidance" and not hasattr(self._tokenizer, "backend_tokenizer"):
            # The process that tries grammars cannot be given such a tokenizer (Mistral's): its estimate has to do.
            self._go_on(key, work, [replace(plan, states=0), *plans], refusal)
            return
        with self._lock:
            is_withdrawn = work.waiting == 0
        if is_withdrawn:
            self._settle(key, work, _WITHDRAWN)
            return
        running = work.trial = self._trials.submit(plan)
        observability.add("vllm_ext:structured_trials_total", 1)

        def go_on(trial: Future[dict[str, Any]]) -> None:
            with self._answering(key, work):
                self._read_outcome(key, work, plan, plans, trial)

        running.add_done_callback(go_on)
        # Its last request may have left before the trial was there to end.
        self._end_unwanted(work)

    def _read_outcome(
        self, key: bytes, work: _Work, plan: Plan, plans: list[Plan], trial: Future[dict[str, Any]]
    ) -> None:
        if trial.cancelled():
            self._settle(key, work, _WITHDRAWN)
            return
        outcome = trial.result()
        if outcome["outcome"] == "ok":
            self._settle(key, work, Verdict(plan.engine))
            return
        said = self._explain(work, plan, outcome["outcome"], outcome["message"])
        if plans:
            work.lane.submit(self._go_on, key, work, plans, said)
            return
        # What met a limit, or a defect, may have met it because of the machine.
        until = float("inf") if outcome["outcome"] == "refused" else time.monotonic() + SLOW_SECONDS
        self._settle(key, work, Verdict(None, said, 0.0 if outcome["outcome"] == "busy" else until))

    def _explain(self, work: _Work, plan: Plan, outcome: str, message: str) -> str:
        where = ""
        if outcome == "refused" and plan.engine == "guidance":
            where = find_refused(work.kind, work.text)
        return self._trials.explain(plan, outcome, f"{where}: {message}" if where else message)

    def _settle(self, key: bytes, work: _Work, verdict: Verdict) -> None:
        with self._lock:
            # Its callback holds the work: such rings stay, with their texts, until vLLM's rare full collection.
            work.trial = None
            if self._working.get(key) is work:
                del self._working[key]
            if verdict.until > 0:
                self._verdicts[key] = verdict
                while len(self._verdicts) > MOST_VERDICTS:
                    self._verdicts.popitem(last=False)
        if verdict.engine is None:
            observability.add("vllm_ext:structured_refused_total", 1)
        work.result.set_result(verdict)

    def _parse(self, plan: Plan) -> None:
        if plan.engine == "guidance":
            engines.check_guidance(plan, self._options.whitespace, getattr(self._tokenizer, "llg_tokenizer", None))
        else:
            engines.parse_xgrammar(plan, self._options.whitespace)

    def _has_guidance(self) -> bool:
        return serves_guidance(self._tokenizer, self._model_config.get_vocab_size())

    def _make_setup(self) -> dict[str, Any]:
        """Both engines' vocabularies as text, for the process that tries grammars."""
        from types import SimpleNamespace

        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

        names = SimpleNamespace(
            structured_outputs_config=self._structured_config, model_config=self._model_config, speculative_config=None
        )
        vocab_size = self._model_config.get_vocab_size()
        backend = XgrammarBackend(names, self._tokenizer, vocab_size)
        guidance = None
        if self._has_guidance() and hasattr(self._tokenizer, "backend_tokenizer"):
            guidance = {
                "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
                "n_vocab": max(vocab_size, len(self._tokenizer)),
                "eos_token": self._tokenizer.eos_token_id,
            }
        return {
            "xgrammar": engines.read_vocabulary(backend.compiler).serialize_json(),
            "guidance": guidance,
            "whitespace": self._options.whitespace,
        }


def serves_guidance(tokenizer: Any, vocab_size: int) -> bool:
    """Whether llguidance knows a tokenizer, and masks of both engines have one width.

    llguidance's have a bit for every token of the tokenizer, xgrammar's for every one of the model's `vocab_size`.
    """
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend

    is_known = GuidanceBackend.is_tokenizer_supported(tokenizer)
    return is_known and (max(vocab_size, len(tokenizer)) + 31) // 32 == (vocab_size + 31) // 32


def _chain(plan: Plan | None) -> Iterator[Plan]:
    while plan is not None:
        yield plan
        plan = plan.fallback


def _raise_refusal(verdict: Verdict) -> None:
    if verdict.engine is None:
        raise VLLMValidationError(verdict.refusal)


# --- the gate of each engine of this process ------------------------------------------------------------------------

_gates: dict[int, tuple[Any, Gate]] = {}


def open_gate(vllm_config: Any) -> Gate:
    """The gate of an engine, made once. Raises config.ConfigError for its settings."""
    structured_config = vllm_config.structured_outputs_config
    found = _gates.get(id(structured_config))
    return found[1] if found else _add_gate(read_options(vllm_config), vllm_config.model_config, structured_config)


def find_gate(model_config: Any, structured_config: Any) -> Gate:
    """The gate opened for this configuration; one with default limits where another process opened it."""
    found = _gates.get(id(structured_config))
    return found[1] if found else _add_gate(Options(), model_config, structured_config)


def _add_gate(options: Options, model_config: Any, structured_config: Any) -> Gate:
    gate = Gate(options, model_config, structured_config)
    # Found by the configuration that every check is given. It is held, so that its identity is not another's later.
    _gates[id(structured_config)] = (structured_config, gate)
    return gate


def close_gates() -> None:
    """End the checks of engines that this process configured before."""
    while _gates:
        _, gate = _gates.popitem()[1]
        gate.close()
