# SPDX-License-Identifier: Apache-2.0
"""vllm/v1/worker/gpu_model_runner.py: drafts from tries where `smartspec.drafter` is trie and ngram carries them."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_model_runner() -> None:
    """Give a V1 model runner (the CPU runner included) a TrieProposer where one is asked for, and let it draft.

    It is made with the runner, so that no request waits while it compiles. The n-gram drafter itself is told neither
    request ids nor who has left, so `propose_draft_token_ids` is wrapped: around the draft lengths of
    patches/speculation.py or inside of them, which gives the same drafts.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "__init__", _add_proposer, mark="_makes_trie")
    wrap(GPUModelRunner, "propose_draft_token_ids", _ask_proposer, mark="_asks_trie")


def _add_proposer(original: Any) -> Any:
    def make_runner(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        self.trie_proposer = _make_proposer(vllm_config) if hasattr(self, "drafter") else None

    return make_runner


def _ask_proposer(original: Any) -> Any:
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.trie_proposer is None:
            return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        return self.trie_proposer.propose(
            self.input_batch,
            self.requests,
            sampled_token_ids,
            getattr(scheduler_output, "draft_lengths", None),
            scheduler_output.num_spec_tokens_to_schedule,
        )

    return propose_draft_token_ids


def _make_proposer(vllm_config: Any) -> Any:
    """A TrieProposer for engines that asked for one, None for the others."""
    from vllm_ext import config

    settings = config.read_settings(vllm_config).smartspec
    if settings is None or not settings.enabled or settings.drafter != "trie":
        return None
    from vllm_ext.scheduling.trie_proposer import TrieProposer

    return TrieProposer(vllm_config)
