# SPDX-License-Identifier: Apache-2.0
"""What must not change a quantized engine's tokens: cuts of the prompt, prefix hits, drafts, ranks, lack of blocks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from vllm import SamplingParams, TokensPrompt

from bench.quality.kv_dropped import LEAST_LOSS
from bench.quality.kv_dropped import measure_loss as measure_past
from bench.serve.server import VllmServer
from tests.kv_cache.engines import (
    MODEL,
    SMALL,
    check_all_free,
    find_scheduler,
    generate,
    list_tokens,
    list_tokens_twice,
    make_prompts,
    measure_loss,
    read_text,
    start,
)
from tests.scheduling.engine import read_counters
from vllm_ext.config import KV_CACHE_DTYPES, KVCacheSettings
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.capacity import Geometry, compute_capacity
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.kv_cache.settings import choose_preset
from vllm_ext.kv_cache.sidecar import describe_model, write_sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 16
LAYERS = 5


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_chunks_and_prefix_hits_give_the_same_tokens(name: str, engine_in_process: None) -> None:
    """Every preset, with the consistency check on; the second round of every engine comes from the first's pages."""
    block = {"check": True} if name == "kv4" else SMALL
    expected = None
    for size in (50, 64, 2048) if name in ("skvq_k2v2", "kivi_k2v2") else (64,):
        with start(name, block, max_num_batched_tokens=size) as llm:
            first = list_tokens_twice(llm, COUNT)
        expected = expected or first
        assert first == expected


def test_the_third_prompt_with_a_prefix_hits(engine_in_process: None) -> None:
    """A prefix that ends inside the first chunk: the second prompt shows that it is shared, and keeps its window."""
    shared, tails = read_text("kjv", 1, 170)[0], read_text("py", 3, 90)
    with start("skvq_k2v2", SMALL, max_num_batched_tokens=2048) as llm:
        outputs = [generate(llm, [shared + tail], COUNT)[0] for tail in tails]
        assert [one.num_cached_tokens for one in outputs] == [0, 0, 160]
        assert llm.reset_prefix_cache()
        alone = generate(llm, [shared + tails[2]], COUNT)
        assert alone[0].num_cached_tokens == 0
        assert list_tokens(alone) == list_tokens(outputs[2:])


def test_two_bits_with_a_window_keep_perplexity_where_naive_ones_do_not(engine_in_process: None) -> None:
    """bf16, the compiled kernels, 2048 tokens of a step: the speed path end to end.

    Prompts as long as those that the model was trained on, and a short window: further back it does not look, and a
    cache that stores nothing would pass.
    """
    prompts, window = read_text("kjv", 8, 256), 32
    assert measure_past(MODEL, prompts, dataclasses.replace(PRESETS["skvq_k2v2"], window=window)) > LEAST_LOSS
    arguments = {"dtype": "bfloat16", "block_size": 128}
    with start(None, **arguments) as llm:
        plain = measure_loss(llm, prompts)
    naive = {"window": 0, "sinks": 0, "clip": 1.0}
    losses = {}
    short = {"window": window}
    for name, block in (("skvq_k2v2", short), ("kivi_k2v2", short), ("kivi_k4v4", short), ("skvq_k2v2 naive", naive)):
        with start(name.split()[0], block, **arguments) as llm:
            losses[name] = math.exp(measure_loss(llm, prompts) - plain)
    # The text tells them apart only if a bad cache shows in it.
    assert losses.pop("skvq_k2v2 naive") > 1.05, losses
    assert max(losses.values()) < 1.01, losses


@pytest.mark.parametrize("name", ["skvq_k2v2", "kivi_k2v2"])
def test_drafts_do_not_change_tokens(name: str, engine_in_process: None) -> None:
    """n-gram drafts that are mostly rejected move the window back and forth."""
    prompts = [prompt[:24] * 5 for prompt in read_text("py", 3, 60)]
    with start(name, SMALL) as llm:
        expected = list_tokens(generate(llm, prompts, 48))
    speculative = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}
    with start(name, SMALL, speculative_config=speculative) as llm:
        assert list_tokens(generate(llm, prompts, 48)) == expected
        counters = read_counters(llm)
        assert counters["spec_decode_num_draft_tokens"] > counters["spec_decode_num_accepted_tokens"] > 0


@pytest.mark.parametrize("kind", ["skvq_k2v2", "skvq_k2v2 calibrated", "kivi_k2v2", "kvplan"])
def test_two_ranks_give_the_tokens_of_one(
    kind: str, tmp_path: Path, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has one of the two heads, its calibration and its pages, whatever the sizes of those."""
    prompts, name, block = make_prompts(), kind.split()[0], dict(SMALL)
    if kind == "kvplan":
        block["layer_bits"] = {"0": "k4v4", "1": "kivi_k2v2", "2": "k2v15", "3": "k8v8", "default": "skvq_k2v2"}
    if "calibrated" in kind:
        block |= {"group_size": 32, "calibration": str(tmp_path / "calibrated.safetensors")}
        write_random_calibration(tmp_path / "calibrated.safetensors")
    with start(name, block, max_num_batched_tokens=64) as llm:
        expected = list_tokens(generate(llm, prompts, COUNT))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # Two workers on one NUMA node have to be told their cores.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with start(name, block, max_num_batched_tokens=64, tensor_parallel_size=2) as llm:
        tokens = list_tokens(generate(llm, prompts, COUNT))
    assert tokens == expected


def write_random_calibration(path: Path) -> None:
    """Orders, scales and shifts of all layers, other ones for either head: a rank that took the other's would show."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> CodecTensors:
        return CodecTensors(
            order=torch.rand(2, 64, generator=generator).argsort(-1),
            smooth=torch.rand(2, 64, generator=generator) + 0.5,
            shift=torch.randn(2, 64, generator=generator),
        )

    sides = {f"model.layers.{number}.self_attn.attn": (draw(), draw()) for number in range(LAYERS)}
    described = describe_model(AutoConfig.from_pretrained(MODEL).get_text_config())
    write_sidecar(path, sides, PRESETS["skvq_k2v2"].fit(64, 32), 2, 64, described)


@pytest.mark.parametrize("name", ["skvq_k2v2", "kivi_k2v2"])
def test_preempted_requests_give_the_tokens_of_undisturbed_ones(name: str, engine_in_process: None) -> None:
    """Blocks for fewer requests than run: some are thrown out, and computed again from what prefix hits are left."""
    # Short prompts, so that many are let in, and long answers, for which there is no room.
    generator = random.Random(1)
    text = read_text("kjv", 1, 200)[0]
    prompts = [[*text[: generator.randrange(10, 50)], generator.randrange(5, 4000)] for _ in range(12)]
    with start(name, SMALL, max_num_batched_tokens=128) as llm:
        expected = list_tokens(generate(llm, prompts, 100))
        assert read_counters(llm)["num_preemptions"] == 0
    with start(name, SMALL, max_num_batched_tokens=128, num_gpu_blocks_override=150) as llm:
        tokens = list_tokens(generate(llm, prompts, 100))
        assert read_counters(llm)["num_preemptions"] > 0
    # Rounding of float32 differs with the batch, and may part two tokens that the model finds equally good: as many
    # as in stock's cache under the same storm, and one more.
    same = count_same(tokens, expected)
    assert same >= count_same(*stock_storm(prompts)) - 1, same


def count_same(first: list[list[int]], second: list[list[int]]) -> int:
    return sum(one == other for one, other in zip(first, second, strict=True))


def stock_storm(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of stock's full-precision cache, with room for all requests and without."""
    found = []
    for blocks, is_scarce in ((None, False), (30, True)):
        with start(None, max_num_batched_tokens=128, num_gpu_blocks_override=blocks) as llm:
            found.append(list_tokens(generate(llm, prompts, 100)))
            assert (read_counters(llm)["num_preemptions"] > 0) == is_scarce
    return found[0], found[1]


def test_no_block_is_lost_over_thousands_of_requests(engine_in_process: None) -> None:
    """Random lengths, common prefixes, aborts at any time, scarce blocks: in the end all blocks are free."""
    generator = random.Random(0)
    text = read_text("kjv", 1, 400)[0]
    total, running, started, finished, aborted = 3000, {}, 0, 0, 0
    numbers = itertools.count()
    arguments: dict[str, Any] = {"max_num_seqs": 32, "num_gpu_blocks_override": 120, "max_num_batched_tokens": 256}
    with start("skvq_k2v2", {"window": 32, "sinks": 4}, dtype="bfloat16", **arguments) as llm:
        engine, scheduler = llm.llm_engine, find_scheduler(llm)
        while started < total or running:
            while started < total and len(running) < 32:
                name = str(next(numbers))
                length = generator.choice([3, 20, 70, 130, generator.randrange(1, 300)])
                tokens = text[:length] + [generator.randrange(5, 4000) for _ in range(generator.randrange(1, 30))]
                parameters = SamplingParams(max_tokens=generator.choice([1, 2, 5]), temperature=0, ignore_eos=True)
                running[name] = engine.add_request(name, TokensPrompt(prompt_token_ids=tokens), parameters)
                started += 1
            for output in engine.step():
                if output.finished and running.pop(output.request_id, None) is not None:
                    finished += 1
            if running and generator.random() < 0.4:
                name = generator.choice(list(running))
                engine.abort_request([name])
                del running[name]
                aborted += 1
            holders = Counter(
                block.block_id
                for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
                for blocks in manager.req_to_blocks.values()
                for block in blocks
                if not block.is_null
            )
            # A block counts its holders exactly: one too many is lost for ever, one too few is given away twice.
            blocks = scheduler.kv_cache_manager.block_pool.blocks
            assert {one.block_id: one.ref_cnt for one in blocks if one.ref_cnt and not one.is_null} == holders
            assert len(holders) <= 119
        assert finished + aborted == total
        assert aborted > 200
        while engine.has_unfinished_requests():
            engine.step()
        check_all_free(llm)
        counters = read_counters(llm)
        assert counters["prefix_cache_hits"] > 0


def test_vllm_serve_answers_and_counts(tmp_path: Path) -> None:
    """The command of the README: processes of their own, compiled kernels, /metrics."""
    arguments = [
        "--kv-cache-dtype", "skvq_k2v2", "--additional-config.vllm_ext.kv_cache.window", "64",
        "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager",
    ]  # fmt: skip
    prompt, server_gib = read_text("kjv", 1, 400)[0], float(os.environ["VLLM_CPU_KVCACHE_SPACE"])
    with VllmServer(MODEL, args=arguments, log_path=tmp_path / "server.log", start_timeout=240) as server:
        body = {"model": str(MODEL), "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answers = []
        for _ in range(2):
            request = urllib.request.Request(
                f"{server.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                answers.append(json.load(response)["choices"][0]["text"])
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        log = (tmp_path / "server.log").read_text()
    # In bf16 a prefix hit rounds a little differently, so the texts may part.
    assert all(answers)
    counts = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm_ext:kv_cache")}
    assert counts["vllm_ext:kv_cache_layer_count"] == LAYERS
    # The preset's pages, and a pool that is sized for the window that was asked for.
    preset = choose_preset("skvq_k2v2", KVCacheSettings(window=64), 64)
    cells = preset.plan_cells(64, 128)
    assert counts["vllm_ext:kv_cache_token_bytes"] == LAYERS * 2 * cells.cell_bytes
    assert counts["vllm_ext:kv_cache_token_elements"] == LAYERS * 2 * 2 * 64
    capacities = [
        compute_capacity(one, Geometry(LAYERS, 2, 64), int(server_gib * 2**30), 1024).tokens
        for one in (preset, choose_preset("skvq_k2v2", None, 64))
    ]
    assert capacities[0] != capacities[1]
    assert f"KV cache size: {capacities[0]:,} tokens" in log
    # The second request comes from the first's pages, but for what follows the last whole block.
    assert 5 * (400 + 16 + 7) <= counts["vllm_ext:kv_cache_attended_tokens_total"] < 5 * 2 * 400
    assert server.exit_code == 0
