# SPDX-License-Identifier: Apache-2.0
"""vLLM's structured outputs: the name of our backend, and requests of engines that use it.

vllm/config/structured_outputs.py, vllm/sampling_params.py, vllm/v1/engine/async_llm.py, vllm/v1/structured_output.
"""

from __future__ import annotations

from typing import Any

from vllm_ext.config import STRUCTURED_BACKEND
from vllm_ext.patches.wrapping import wrap


def add_backend_name() -> None:
    """Add the name to those of `--structured-outputs-config.backend`, one Literal that the parser and the configuration
    share; the configuration's validator has copied its names and is built again.
    """
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import structured_outputs

    names: Any = structured_outputs.StructuredOutputsBackend
    if STRUCTURED_BACKEND in names.__args__:
        return
    names.__args__ = (*names.__args__, STRUCTURED_BACKEND)
    rebuild_dataclass(structured_outputs.StructuredOutputsConfig, force=True)


def wrap_requests() -> None:
    """Check requests and make their grammars our way, where an engine's finished configuration names our backend."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.structured_output import StructuredOutputManager

    wrap(SamplingParams, "_validate_structured_outputs", _wrap_validation)
    wrap(AsyncLLM, "add_request", _wrap_add_request)
    wrap(StructuredOutputManager, "__init__", _wrap_manager)
    wrap(StructuredOutputManager, "grammar_init", _wrap_grammar_init)


def _wrap_validation(original: Any) -> Any:
    def validate(self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any) -> None:
        params, config = self.structured_outputs, structured_outputs_config
        if (
            params is None
            or config is None
            or config.backend != STRUCTURED_BACKEND
            or model_config.is_diffusion
            or not tokenizer
        ):
            # What vLLM refuses before it looks at a specification, it refuses here too.
            original(self, model_config, structured_outputs_config, tokenizer)
            return
        from vllm_ext.structured import validation

        gate = validation.find_gate(model_config, config)
        params._backend = f"{STRUCTURED_BACKEND}/{gate.check(params, tokenizer)}"
        params._backend_was_auto = False

    return validate


def _wrap_add_request(original: Any) -> Any:
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.vllm_config.structured_outputs_config
        structured = getattr(params, "structured_outputs", None)
        if config.backend == STRUCTURED_BACKEND:
            from vllm_ext.structured import validation

            gate = validation.open_gate(self.vllm_config)
            tokenizer = self.input_processor.tokenizer
            gate.start(tokenizer)
            if structured is not None and tokenizer is not None:
                await gate.prepare(structured, tokenizer)
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _wrap_manager(original: Any) -> Any:
    def make_manager(self: Any, vllm_config: Any) -> None:
        original(self, vllm_config)
        if (
            vllm_config.structured_outputs_config.backend == STRUCTURED_BACKEND
            and not vllm_config.model_config.skip_tokenizer_init
        ):
            from vllm_ext.structured.backend import ExtBackend

            # Made with the engine: no request waits for the vocabulary, and pre-warming begins.
            self.backend = ExtBackend(vllm_config, self.tokenizer, vllm_config.model_config.get_vocab_size())

    return make_manager


def _wrap_grammar_init(original: Any) -> Any:
    def grammar_init(self: Any, request: Any) -> None:
        if (
            request.structured_output_request is None
            or self.vllm_config.structured_outputs_config.backend != STRUCTURED_BACKEND
        ):
            original(self, request)
            return
        self.backend.start(request, waits=not self._use_async_grammar_compilation)

    return grammar_init
