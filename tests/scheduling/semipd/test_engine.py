# SPDX-License-Identifier: Apache-2.0
"""Two lanes in a real engine: the tokens are stock's, and the lanes did overlap."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from bench.serve.server import VllmServer
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.scheduler import LaneMixin

pytestmark = pytest.mark.engine

VOCABULARY = 4096
#: Counters of a server that served beside lanes.
COUNTED = ("prefill_batches", "decode_batches", "decode_busy_seconds", "overlap_seconds", "first_tokens", "finished")
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 96,
    "enforce_eager": True,
    "enable_prefix_caching": True,
}


def start(model: str, is_ours: bool, **settings: Any) -> LLM:
    # Objectives that are met whatever happens: nothing is mixed, and nobody is held back.
    semipd = {"slo_ttft_ms": 60_000, "slo_tpot_ms": 60_000}
    block = {"additional_config": {"vllm_ext": {"semipd": semipd}}} if is_ours else {}
    return LLM(model=model, **{**SETTINGS, **block, **settings})


def find_scheduler(llm: LLM) -> Any:
    engine: Any = llm.llm_engine.engine_core
    return engine.engine_core.scheduler


def make_requests(count: int) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts of 5 to 300 tokens, a third of which begin alike; chunks, penalties, logprobs."""
    rng = random.Random(1)
    common = [rng.randrange(VOCABULARY) for _ in range(150)]
    prompts, parameters = [], []
    for number in range(count):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.choice((5, 20, 100, 300)))]
        prompts.append(TokensPrompt(prompt_token_ids=common[:130] + prompt[:60] if number % 3 == 0 else prompt))
        parameters.append(
            SamplingParams(
                max_tokens=rng.randrange(2, 40),
                ignore_eos=True,
                temperature=0.0,
                repetition_penalty=1.2 if number % 5 == 0 else 1.0,
                logprobs=2 if number % 7 == 0 else None,
                prompt_logprobs=1 if number % 9 == 0 else None,
            )
        )
    return prompts, parameters


def list_outputs(llm: LLM, prompts: list[Any], parameters: list[SamplingParams]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, parameters, use_tqdm=False)]


def abort_some(llm: LLM, prompts: list[Any], parameters: list[SamplingParams]) -> dict[str, list[int]]:
    """Tokens of the requests that are not aborted; others go while they wait, prefill and decode."""
    engine = llm.llm_engine
    tokens: dict[str, list[int]] = {}
    for number, (prompt, sampling) in enumerate(zip(prompts, parameters, strict=True)):
        engine.add_request(str(number), prompt, sampling)
    for turn in range(2000):
        if not engine.has_unfinished_requests():
            break
        if turn in (1, 5, 9, 20, 33):
            engine.abort_request([str(turn % len(prompts)), str((turn * 7) % len(prompts))])
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert not engine.has_unfinished_requests()
    return tokens


def check_clean(scheduler: Any) -> None:
    """Nothing in flight, nothing to tell, and every block is back."""
    assert scheduler.lanes.is_idle()
    assert not scheduler.requests
    assert scheduler.reset_prefix_cache()


def stream(base_url: str, number: int) -> str:
    """Text of a greedy answer; every third client leaves after two pieces."""
    words = " ".join(["And the LORD spake unto Moses saying"] * (1 + number * 7 % 60))
    body = {"model": "m", "prompt": f"{number} {words}", "max_tokens": 40, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    pieces: list[str] = []
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
        for line in response:
            text = line.decode().removeprefix("data: ").strip()
            if text and text != "[DONE]":
                pieces.append(json.loads(text)["choices"][0]["text"])
            if number % 3 == 1 and len(pieces) == 2:
                break
    return "".join(pieces)


def test_tokens_are_those_of_stock(tiny_moe: str, engine_in_process: None) -> None:
    prompts, parameters = make_requests(24)
    yes_or_no = SamplingParams(
        max_tokens=8, temperature=0, structured_outputs=StructuredOutputsParams(choice=["And God said", "Behold"])
    )
    stock = start(tiny_moe, False)
    expected = list_outputs(stock, prompts, parameters)
    chosen = list_outputs(stock, ["In the beginning"] * 3, [yes_or_no] * 3)
    # Short ones: vLLM 0.32's CPU runner dies of a seeded request whose prompt is chunked.
    seeded = [SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.9, seed=seed) for seed in range(4)]
    drawn = list_outputs(stock, ["In the beginning"] * 4, seeded)
    kept = abort_some(stock, prompts, parameters)
    del stock

    ours = start(tiny_moe, True)
    scheduler = find_scheduler(ours)
    assert isinstance(scheduler, LaneMixin)
    assert list_outputs(ours, prompts, parameters) == expected
    counts = scheduler.lanes.counts
    # A fall-back to one lane would give the same tokens.
    assert min(counts.batches) > 5
    assert counts.overlapping > 5
    assert scheduler.pacer.counts.overlap > 0
    assert scheduler.pacer.counts.first_tokens == len(prompts)
    check_clean(scheduler)
    assert list_outputs(ours, ["In the beginning"] * 3, [yes_or_no] * 3) == chosen
    assert list_outputs(ours, ["In the beginning"] * 4, seeded) == drawn
    survived = abort_some(ours, prompts, parameters)
    both = survived.keys() & kept.keys()
    assert len(both) > len(prompts) // 2
    assert {rid: survived[rid] for rid in both} == {rid: kept[rid] for rid in both}
    # The engine goes on until the lanes know who was aborted.
    for _ in range(50):
        ours.llm_engine.engine_core.get_output()
    check_clean(scheduler)


def test_preemption_in_a_small_cache(tiny_moe: str, engine_in_process: None) -> None:
    rng = random.Random(3)
    prompts = [
        TokensPrompt(prompt_token_ids=[rng.randrange(VOCABULARY) for _ in range(rng.randrange(20, 90))])
        for _ in range(16)
    ]
    parameters = [SamplingParams(max_tokens=rng.randrange(70, 120), temperature=0, ignore_eos=True) for _ in prompts]
    small = {"num_gpu_blocks_override": 14, "block_size": 32, "max_model_len": 256}
    expected = list_outputs(start(tiny_moe, False, **small), prompts, parameters)
    ours = start(tiny_moe, True, **small)
    scheduler = find_scheduler(ours)
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def count_preemption(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = count_preemption
    assert list_outputs(ours, prompts, parameters) == expected
    assert len(preempted) >= 7
    assert scheduler.lanes.counts.batches[Lane.PREFILL] > len(prompts) // 2
    check_clean(scheduler)


def make_server(model: str, tmp_path: Path, *options: str) -> VllmServer:
    """A server of short chunks with these options besides, not started; its model is called m."""
    return VllmServer(
        model,
        args=[
            *("--max-model-len", "1024", "--max-num-batched-tokens", "128", "--enforce-eager"),
            *("--served-model-name", "m", *options),
        ],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        log_path=tmp_path / "server.log",
    )


@pytest.mark.slow
def test_vllm_serve_with_clients_that_leave(tiny_moe: str, tmp_path: Path) -> None:
    """The engine in a process of its own: streams, some of which are closed early, and counters at /metrics."""
    setting = "--additional-config.vllm_ext.semipd"
    server = make_server(tiny_moe, tmp_path, f"{setting}.slo_ttft_ms", "300", f"{setting}.slo_tpot_ms", "50")
    server.start()
    try:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda number: stream(server.base_url, number), range(24)))
        again = [stream(server.base_url, number) for number in (0, 1, 2)]
        for whole, first in zip(again, answers, strict=False):
            assert whole.startswith(first)
        assert all(answers)
        deadline = time.monotonic() + 30
        while server.read_metric("vllm:num_requests_running") and time.monotonic() < deadline:
            time.sleep(0.2)
        counted = {name: server.read_metric(f"vllm_ext:semipd_{name}_total") or 0.0 for name in COUNTED}
        assert min(counted.values()) > 0, counted
        assert counted["overlap_seconds"] <= counted["decode_busy_seconds"]
    finally:
        assert server.stop() == 0
