# SPDX-License-Identifier: Apache-2.0
"""vllm: what a speculative configuration refuses or drops, where the pack itself added it (structured/carrier.py)."""

from __future__ import annotations

import functools
from typing import Any


def wrap_speculation() -> None:
    """Make engines with our carrier sample as engines without speculation do, wherever nothing is drafted."""
    _wrap_validation()
    _wrap_processors()
    _wrap_sampling()


def _wrap_validation() -> None:
    """Requests with min_p or logit_bias are served: they get no drafts."""
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_spec_decode
    if getattr(original, "_wrapped_by_vllm_ext", False):
        return

    @functools.wraps(original)
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        original(self, None if _is_carrier(speculative_config) else speculative_config)

    validate_spec_decode._wrapped_by_vllm_ext = True  # type: ignore[attr-defined]
    SamplingParams._validate_spec_decode = validate_spec_decode


def _wrap_processors() -> None:
    """Min-p and logit bias are applied, which vLLM leaves out beside speculation."""
    from vllm.v1.sample import logits_processor
    from vllm.v1.worker import gpu_model_runner

    original = gpu_model_runner.build_logitsprocs
    if getattr(original, "_wrapped_by_vllm_ext", False):
        return

    @functools.wraps(original)
    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
    ) -> Any:
        if is_pooling_model or not _is_carrier(vllm_config.speculative_config):
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return logits_processor.LogitsProcessors(
            make(vllm_config, device, is_pin_memory) for make in logits_processor.BUILTIN_LOGITS_PROCESSORS
        )

    build_logitsprocs._wrapped_by_vllm_ext = True  # type: ignore[attr-defined]
    gpu_model_runner.build_logitsprocs = build_logitsprocs


def _wrap_sampling() -> None:
    """A step without drafts goes to the sampler, not to the rejection sampler."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._sample
    if getattr(original, "_wrapped_by_vllm_ext", False):
        return

    @functools.wraps(original)
    def sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if (
            spec_decode_metadata is not None
            and _is_carrier(self.speculative_config)
            and not any(spec_decode_metadata.num_draft_tokens)
        ):
            spec_decode_metadata = None
        return original(self, logits, spec_decode_metadata)

    sample._wrapped_by_vllm_ext = True  # type: ignore[attr-defined]
    GPUModelRunner._sample = sample


def _is_carrier(speculative_config: Any) -> bool:
    from vllm_ext.structured.carrier import CARRIER

    return speculative_config is not None and speculative_config.model == CARRIER
