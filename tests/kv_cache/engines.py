# SPDX-License-Identifier: Apache-2.0
"""What the engine tests of the KV-cache quantizers share: prompts, engines, and what must be true at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "bench" / "models" / "tiny_moe"

#: Small, so that prompts of a few hundred tokens have a long quantized past, and blocks run out when a test wants it.
SMALL: dict[str, Any] = {"window": 32, "sinks": 4, "check": True}


@contextmanager
def start(
    name: str | None, block: dict[str, Any] | None = None, others: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[LLM]:
    """An engine of the shipped model in this process, float32, with blocks of 32; it leaves no request's blocks behind.

    name: of the KV-cache dtype; None for the model's. block: the `kv_cache` settings. others: of other features.
    """
    settings = {**({} if name is None else {"kv_cache": block or {}}), **(others or {})}
    ours: dict[str, Any] = {"additional_config": {"vllm_ext": settings}} if settings else {}
    if name is not None:
        ours["kv_cache_dtype"] = name
    given = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
        "disable_log_stats": False, **ours, **arguments,
    }  # fmt: skip
    llm = LLM(model=str(MODEL), **given)
    try:
        yield llm
        if find_scheduler(llm) is not None:
            check_all_free(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def find_scheduler(llm: LLM) -> Any:
    """The scheduler of an engine in this process; None where it runs in another."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return getattr(core, "scheduler", None)


def check_all_free(llm: LLM) -> None:
    """All blocks but the null block are free, and no manager remembers a request."""
    manager = find_scheduler(llm).kv_cache_manager
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    for each in manager.coordinator.single_type_managers:
        assert not each.req_to_blocks
        assert not each.num_cached_block
        assert not getattr(each, "_first_kept", None)
        assert not getattr(each, "_first_held", None)
        assert not getattr(each, "_shared_prefix", None)


def read_text(domain: str, count: int, length: int) -> list[list[int]]:
    """Token ids of held-out text, `count` prompts of `length` tokens, which begin alike where `count` is above one."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)((MODEL / f"{domain}_val.txt").read_text()[:60000])["input_ids"]
    return [ids[start : start + length] for start in range(0, count * length, length)]


def generate(llm: LLM, prompts: Sequence[Sequence[int]], count: int, **sampling: Any) -> list[Any]:
    """Outputs of greedy requests of `count` tokens each."""
    parameters = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **sampling)
    return llm.generate([TokensPrompt(prompt_token_ids=list(one)) for one in prompts], parameters, use_tqdm=False)


def list_tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """Token ids of every output."""
    return [list(one.outputs[0].token_ids) for one in outputs]


def measure_loss(llm: LLM, prompts: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of every token after the first."""
    outputs = generate(llm, prompts, 1, prompt_logprobs=0)
    found = [
        position[token].logprob
        for output, ids in zip(outputs, prompts, strict=True)
        for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]
    return -float(torch.tensor(found).double().mean())


def make_prompts() -> list[list[int]]:
    """Of several lengths, with a common beginning among the first two."""
    bible, code = read_text("kjv", 1, 300)[0], read_text("py", 1, 160)[0]
    return [bible, bible[:170] + code[:50], code, code[:40]]


#: Tokens of `make_prompts` that the second round of an engine with blocks of 32 finds computed.
CACHED = [288, 192, 128, 32]


def list_tokens_twice(llm: LLM, count: int) -> list[list[int]]:
    """Tokens of `make_prompts`; a second round, from the pages of the first, must give them again."""
    prompts = make_prompts()
    first = list_tokens(generate(llm, prompts, count))
    again = generate(llm, prompts, count)
    assert [one.num_cached_tokens for one in again] == CACHED
    assert list_tokens(again) == first
    return first
