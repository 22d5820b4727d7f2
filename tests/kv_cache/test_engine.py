# SPDX-License-Identifier: Apache-2.0
"""`kv_cache_dtype="skvq_k2v2"` in the real engine: one start, float32, with the consistency check on in every step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm import SamplingParams, TokensPrompt
from vllm.v1.request import RequestStatus

from tests.kv_cache.engines import SMALL, find_scheduler, generate, list_tokens, read_text, start
from vllm_ext import observability
from vllm_ext.config import KVCacheSettings
from vllm_ext.kv_cache import backend
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.settings import choose_preset

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

LAYERS = 5
CACHE_BYTES = 1 << 30


def test_a_quantized_cache_serves(tiny_moe: str, engine_in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KVCacheSettings(**SMALL)
    with start("skvq_k2v2", SMALL, max_num_batched_tokens=64) as llm:
        config = llm.llm_engine.vllm_config
        # vLLM's own figures are those of the arithmetic that docs and users rely on.
        preset = choose_preset("skvq_k2v2", settings, 64)
        expected = compute_capacity(preset, Geometry(LAYERS, 2, 64, 32, 4), CACHE_BYTES, 512)
        scheduler = find_scheduler(llm)
        assert scheduler.kv_cache_config.num_blocks == CACHE_BYTES // expected.page_bytes
        assert config.cache_config.kv_cache_size_tokens == expected.tokens
        assert not scheduler.kv_cache_config.needs_kv_cache_zeroing

        # Answers; and a second time from the pages of the first, window and sinks included.
        prompts = [*read_text("kjv", 1, 200), *read_text("py", 1, 70), [5, 6, 7]]
        first = list_tokens(generate(llm, prompts, 12))
        again = generate(llm, prompts, 12)
        assert [one.num_cached_tokens for one in again] == [192, 64, 0]
        assert list_tokens(again) == first

        # A request that is aborted in the middle of its prompt leaves nothing, `start` sees to it.
        engine = llm.llm_engine
        engine.add_request(
            "aborted",
            TokensPrompt(prompt_token_ids=read_text("py", 2, 200)[1]),
            SamplingParams(max_tokens=5, temperature=0),
        )
        engine.step()
        assert 0 < scheduler.requests[next(iter(scheduler.requests))].num_computed_tokens < 200
        engine.abort_request(["aborted"])
        while engine.has_unfinished_requests():
            engine.step()

        counts = observability.read_records(os.environ[observability.DIRECTORY_ENV])
        assert counts[0, "vllm_ext:kv_cache_layer_count"] >= LAYERS
        bits = 8 * counts[0, "vllm_ext:kv_cache_token_bytes"] / counts[0, "vllm_ext:kv_cache_token_elements"]
        assert bits == pytest.approx(expected.bits)
        tokens = sum(len(one) for one in prompts) + 2 * 12 * 3 - 6 + (273 - 256) + 64
        for name in ("stored", "attended"):
            assert counts[0, f"vllm_ext:kv_cache_{name}_tokens_total"] >= LAYERS * tokens

        # The check that ran in all those steps does see a page that is not its own.
        attend = backend.attend

        def damage(query: object, key: object, value: object, cache: object, *rest: object) -> object:
            cache.random_(0, 256)  # type: ignore[attr-defined]
            return attend(query, key, value, cache, *rest)

        monkeypatch.setattr(backend, "attend", damage)
        with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.attn has another token's page for posi"):
            generate(llm, [[9] * 40], 3)
        # A server ends here; this process goes on, so its requests are ended by hand.
        for request in list(scheduler.requests):
            scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)


def test_names_and_settings_are_vllms_own(tiny_moe: str, tmp_path: Path) -> None:
    """The command line of `vllm serve` takes names and settings."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    block = "--additional-config.vllm_ext.kv_cache"
    flags = ["--kv-cache-dtype", "skvq_k2v15", f"{block}.window", "64", f"{block}.clip", "0.9"]
    flags += [f"{block}.layer_bits", '{"0-1": "k4v4"}']
    parsed = EngineArgs.from_cli_args(parser.parse_args(["--model", tiny_moe, *flags]))
    assert parsed.kv_cache_dtype == "skvq_k2v15"
    settings = {"window": 64, "clip": 0.9, "layer_bits": {"0-1": "k4v4"}}
    assert parsed.additional_config == {"vllm_ext": {"kv_cache": settings}}
