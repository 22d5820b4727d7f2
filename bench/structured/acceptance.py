# SPDX-License-Identifier: Apache-2.0
"""What a grammar accepts: texts fed byte by byte to the engines, as vLLM alone and as the pack choose and compile them.

The vocabulary is the 256 bytes and an end: which strings a grammar accepts does not depend on the vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llguidance
import xgrammar as xgr
from vllm import SamplingParams
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from vllm_ext.structured import engines
from vllm_ext.structured.errors import GrammarError, RefusedError
from vllm_ext.structured.routing import Plan, plan_spec

END = 256
MODEL = Path(__file__).parent.parent / "models" / "tiny_moe"


@functools.cache
def make_compiler() -> Any:
    """xgrammar's compiler for the vocabulary of bytes."""
    vocabulary = [bytes([number]) for number in range(END)] + [b"</s>"]
    info = xgr.TokenizerInfo(vocabulary, vocab_type=xgr.VocabType.RAW, stop_token_ids=[END])
    return xgr.GrammarCompiler(info, max_threads=1, cache_enabled=False)


@functools.cache
def make_tokenizer() -> Any:
    """llguidance's tokenizer of bytes."""
    return llguidance.LLTokenizer("byte")


def accepts_xgrammar(compiled: Any, text: str) -> bool:
    """Whether a compiled grammar of xgrammar accepts a text as a whole."""
    matcher = xgr.GrammarMatcher(compiled)
    return bool(matcher.accept_string(text) and matcher.accept_token(END))


def accepts_guidance(matcher: Any, text: str) -> bool:
    """Whether a new matcher of llguidance accepts a text as a whole."""
    copy = matcher.deep_copy()
    return bool(copy.consume_tokens(list(text.encode())) and copy.is_accepting())


def find_plan(kind: Any, text: str, whitespace: str | int = "any") -> tuple[Plan, Any]:
    """The pack's plan of a specification, and its grammar. Raises RefusedError where the pack refuses it."""
    plan: Plan | None = plan_spec(kind, text)
    refusal = ""
    while plan is not None:
        try:
            if plan.engine == "guidance":
                return plan, engines.compile_guidance(make_tokenizer(), plan, whitespace)
            return plan, engines.compile_xgrammar(make_compiler(), plan, whitespace)
        except GrammarError as error:
            refusal = str(error)
        plan = plan.fallback
    raise RefusedError(refusal)


def judge_pack(kind: str, spec: str, texts: Sequence[str]) -> tuple[str, list[bool]] | None:
    """(engine, whether it accepts each text) of the pack; None where it refuses the specification."""
    try:
        plan, grammar = find_plan(kind, spec)
    except RefusedError:
        return None
    accepts = accepts_guidance if plan.engine == "guidance" else accepts_xgrammar
    return plan.engine, [accepts(grammar, text) for text in texts]


def judge_stock(kind: str, spec: str, texts: Sequence[str], is_first: bool) -> tuple[str, list[bool]] | None:
    """The same of vLLM alone with its default backend `auto`, by its own validation; None where that refuses.

    is_first: the schema comes with the engine's first structured request, whose backend then is the engine's; otherwise
    an ordinary request was first, and xgrammar is. The outlines backend is not judged where its package is missing.
    """
    backend = validate_stock(kind, spec)
    if backend is None:
        return None
    if not is_first:
        backend = "xgrammar"
    try:
        if backend == "xgrammar":
            compiler = make_compiler()
            if kind == "structural_tag":
                compiled = compiler.compile_structural_tag(spec)
            else:
                compiled = compiler.compile_json_schema(spec, any_whitespace=True)
            return backend, [accepts_xgrammar(compiled, text) for text in texts]
        if backend == "guidance":
            grammar = serialize_guidance_grammar(StructuredOutputOptions[kind.upper()], spec)
            matcher = llguidance.LLMatcher(make_tokenizer(), grammar, log_level=0)
            return None if matcher.is_error() else (backend, [accepts_guidance(matcher, text) for text in texts])
        return backend, [_accepts_outlines(spec, text) for text in texts]
    except (RuntimeError, ImportError):
        return None


def validate_stock(kind: str, spec: str) -> str | None:
    """The backend that vLLM's own validation chooses for a specification; None where it refuses it."""
    given: Any = {kind: json.loads(spec) if kind == "json" else spec}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
    model = SimpleNamespace(is_diffusion=False)
    try:
        params._validate_structured_outputs(model, StructuredOutputsConfig(backend="auto"), _load_tokenizer())
    except (VLLMValidationError, ValueError, ImportError):
        return None
    assert params.structured_outputs is not None
    return params.structured_outputs._backend


def _accepts_outlines(schema: str, text: str) -> bool:
    import re

    build_regex_from_schema = importlib.import_module("outlines_core.json_schema").build_regex_from_schema

    return re.fullmatch(build_regex_from_schema(schema), text) is not None


@functools.cache
def _load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)
