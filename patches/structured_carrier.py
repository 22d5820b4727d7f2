# SPDX-License-Identifier: Apache-2.0
"""vllm: what a speculative configuration refuses or drops, where the pack itself added it (structured/carrier.py)."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_speculation() -> None:
    """Both changes of record `structured_carrier`: what our own speculation refuses or drops (V1), and drafts of the
    scheduler in the V2 model runner."""
    from vllm_ext.patches import structured_v2

    wrap_carrier()
    structured_v2.wrap_prepare_inputs()


def wrap_carrier() -> None:
    """Make engines with our carrier sample as engines without speculation do, wherever nothing is drafted."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker import gpu_model_runner

    wrap(SamplingParams, "_validate_spec_decode", _pass_carrier)
    wrap(gpu_model_runner, "build_logitsprocs", _keep_processors)
    wrap(gpu_model_runner.GPUModelRunner, "_sample", _sample_without_drafts)


def _pass_carrier(original: Any) -> Any:
    """Requests with min_p or logit_bias are served: they get no drafts."""

    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        original(self, None if _is_carrier(speculative_config) else speculative_config)

    return validate_spec_decode


def _keep_processors(original: Any) -> Any:
    """Min-p and logit bias are applied, which vLLM leaves out beside speculation."""
    from vllm.v1.sample import logits_processor

    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
    ) -> Any:
        if is_pooling_model or not _is_carrier(vllm_config.speculative_config):
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return logits_processor.LogitsProcessors(
            make(vllm_config, device, is_pin_memory) for make in logits_processor.BUILTIN_LOGITS_PROCESSORS
        )

    return build_logitsprocs


def _sample_without_drafts(original: Any) -> Any:
    """A step without drafts goes to the sampler, not to the rejection sampler."""

    def sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if (
            spec_decode_metadata is not None
            and _is_carrier(self.speculative_config)
            and not any(spec_decode_metadata.num_draft_tokens)
        ):
            spec_decode_metadata = None
        return original(self, logits, spec_decode_metadata)

    return sample


def _is_carrier(speculative_config: Any) -> bool:
    from vllm_ext.structured.carrier import CARRIER

    return speculative_config is not None and speculative_config.model == CARRIER
