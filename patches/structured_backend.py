# SPDX-License-Identifier: Apache-2.0
"""vLLM's structured outputs: the name of our backend, and requests of engines that use it.

vllm/config/structured_outputs.py, vllm/sampling_params.py, vllm/v1/engine/async_llm.py, vllm/v1/structured_output.
"""

from __future__ import annotations

import functools
from typing import Any

#: vllm_ext/structured/validation.py has it too; that module is imported only where it is used.
BACKEND = "vllm_ext"


def add_backend_name() -> None:
    """Add the name to those of `--structured-outputs-config.backend`, one Literal that the parser and the configuration
    share; the configuration's validator has copied its names and is built again.
    """
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import structured_outputs

    names: Any = structured_outputs.StructuredOutputsBackend
    if BACKEND in names.__args__:
        return
    names.__args__ = (*names.__args__, BACKEND)
    rebuild_dataclass(structured_outputs.StructuredOutputsConfig, force=True)


def wrap_requests() -> None:
    """Check requests and make their grammars our way, where an engine's finished configuration names our backend."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.structured_output import StructuredOutputManager

    if getattr(StructuredOutputManager.grammar_init, "_wrapped_by_vllm_ext", False):
        return
    SamplingParams._validate_structured_outputs = _wrap_validation(SamplingParams._validate_structured_outputs)
    AsyncLLM.add_request = _wrap_add_request(AsyncLLM.add_request)
    StructuredOutputManager.__init__ = _wrap_manager(StructuredOutputManager.__init__)
    StructuredOutputManager.grammar_init = _wrap_grammar_init(StructuredOutputManager.grammar_init)


def _mark(wrapper: Any) -> Any:
    wrapper._wrapped_by_vllm_ext = True
    return wrapper


def _wrap_validation(original: Any) -> Any:
    @functools.wraps(original)
    def validate(self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any) -> None:
        params, config = self.structured_outputs, structured_outputs_config
        if params is None or config is None or config.backend != BACKEND or model_config.is_diffusion or not tokenizer:
            # What vLLM refuses before it looks at a specification, it refuses here too.
            original(self, model_config, structured_outputs_config, tokenizer)
            return
        from vllm_ext.structured import validation

        gate = validation.find_gate(model_config, config)
        params._backend = f"{BACKEND}/{gate.check(params, tokenizer)}"
        params._backend_was_auto = False

    return _mark(validate)


def _wrap_add_request(original: Any) -> Any:
    @functools.wraps(original)
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.vllm_config.structured_outputs_config
        structured = getattr(params, "structured_outputs", None)
        if config.backend == BACKEND:
            from vllm_ext.structured import validation

            gate = validation.open_gate(self.vllm_config)
            tokenizer = self.input_processor.tokenizer
            gate.start(tokenizer)
            if structured is not None and tokenizer is not None:
                await gate.prepare(structured, tokenizer)
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return _mark(add_request)


def _wrap_manager(original: Any) -> Any:
    @functools.wraps(original)
    def make_manager(self: Any, vllm_config: Any) -> None:
        original(self, vllm_config)
        if (
            vllm_config.structured_outputs_config.backend == BACKEND
            and not vllm_config.model_config.skip_tokenizer_init
        ):
            from vllm_ext.structured.backend import ExtBackend

            # Made with the engine: no request waits for the vocabulary, and pre-warming begins.
            self.backend = ExtBackend(vllm_config, self.tokenizer, vllm_config.model_config.get_vocab_size())

    return _mark(make_manager)


def _wrap_grammar_init(original: Any) -> Any:
    @functools.wraps(original)
    def grammar_init(self: Any, request: Any) -> None:
        if request.structured_output_request is None or self.vllm_config.structured_outputs_config.backend != BACKEND:
            original(self, request)
            return
        self.backend.start(request, waits=not self._use_async_grammar_compilation)

    return _mark(grammar_init)
