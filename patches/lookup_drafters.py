# SPDX-License-Identifier: Apache-2.0
"""vllm/v1/worker/gpu_model_runner.py: n-gram drafts with a length for each request, or drafts from tries where
`smartspec.drafter` is trie, in the place of vLLM's n-gram drafter."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_model_runner() -> None:
    """Give a V1 model runner (the CPU runner included) a proposer where smartspec drafts by n-grams, and let it draft.

    It is made with the runner, so that no request waits while it compiles. vLLM's n-gram drafter is told neither
    request ids nor who has left, so `propose_draft_token_ids` is wrapped: around the draft lengths of
    patches/speculation.py or inside of them, which gives the same drafts.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "__init__", _add_proposer, mark="_makes_lookup")
    wrap(GPUModelRunner, "propose_draft_token_ids", _ask_proposer, mark="_asks_lookup")


def _add_proposer(original: Any) -> Any:
    def make_runner(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        self.lookup_proposer = _make_proposer(vllm_config) if hasattr(self, "drafter") else None

    return make_runner


def _ask_proposer(original: Any) -> Any:
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        lengths = getattr(scheduler_output, "draft_lengths", None)
        # Without lengths smartspec plans no drafts, or is not in charge (bench/speculation/switched.py): vLLM's search.
        if self.lookup_proposer is None or (lengths is None and not self.lookup_proposer.keeps_texts):
            return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        return self.lookup_proposer.propose(
            self.input_batch,
            self.requests,
            sampled_token_ids,
            lengths,
            scheduler_output.num_spec_tokens_to_schedule,
        )

    return propose_draft_token_ids


def _make_proposer(vllm_config: Any) -> Any:
    """What drafts in the place of vLLM's n-gram drafter: None where another one drafts, and without smartspec."""
    from vllm_ext import config
    from vllm_ext.scheduling import ngram_proposer, trie_proposer

    settings = config.read_settings(vllm_config).smartspec
    if settings is None or not settings.enabled or vllm_config.speculative_config.method != trie_proposer.CARRIER:
        return None
    if settings.drafter == "trie":
        return trie_proposer.TrieProposer(vllm_config)
    return ngram_proposer.NgramProposer(vllm_config)
