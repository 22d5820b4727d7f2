# SPDX-License-Identifier: Apache-2.0
"""One arm of gpu_semipd.py, in a process of its own: starts vLLM's asynchronous engine and measures one scenario.

    python -m bench.serve.gpu_semipd_engine --scenario answers|load --arm NAME --out FILE [--tiny]

`answers`: greedy answers of the small MoE to requests that come one after the other while others run. `load`: a dense
model of real shape without real weights; how a long prompt disturbs streams, then Poisson arrivals at several rates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.records import ROOT

MODEL = ROOT / "bench" / "models" / "tiny_moe"
VOCABULARY = 4096
SCENARIOS = ("answers", "load")
#: The arm whose prompts all go through the prefill lane, and the one that may mix batches; the others are stock with so
#: many tokens to a batch.
LANES, AUTO = "semipd", "semipd_auto"
#: Objectives of the lanes and of the curve, in milliseconds.
TTFT_MS, TPOT_MS = 500.0, 20.0


@dataclass(frozen=True)
class Sizes:
    """What is asked of an engine. Tokens, streams, requests a second; `seconds` of arrivals at each rate."""

    model: dict[str, int]
    batch: int
    long_tokens: int
    num_long: int
    streams: int
    stream_tokens: int
    chat: tuple[int, int]
    mixed_long: tuple[int, int]
    long_share: float
    rates: tuple[float, ...]
    seconds: float


#: Llama-3-8B's shape, and long prompts that take a device of today some tenths of a second.
FULL = Sizes(
    model={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 20480,
    },
    batch=8192,
    long_tokens=16384,
    num_long=3,
    streams=16,
    stream_tokens=3000,
    chat=(300, 100),
    mixed_long=(6000, 24),
    long_share=0.25,
    rates=(6.0, 12.0, 18.0),
    seconds=8.0,
)
TINY = Sizes(
    model={
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
    },
    batch=1024,
    long_tokens=1024,
    num_long=2,
    streams=3,
    stream_tokens=1500,
    chat=(30, 10),
    mixed_long=(300, 4),
    long_share=0.25,
    rates=(4.0,),
    seconds=2.0,
)


@dataclass
class Stream:
    """A request's tokens and when they came, seconds of one clock."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Engine:
    """vLLM's AsyncLLM: requests of token ids in, greedy tokens out."""

    def __init__(self, arm: str, model: str, **options: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if arm in (LANES, AUTO):
            mode = "always" if arm == LANES else "auto"
            block = {"slo_ttft_ms": TTFT_MS, "slo_tpot_ms": TPOT_MS, "mode": mode}
            options["additional_config"] = {"vllm_ext": {"semipd": block}}
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=model, enable_prefix_caching=False, disable_log_stats=True, seed=0, **options)
        )
        self._count = 0

    async def ask(self, prompt: Sequence[int], tokens: int, into: Stream | None = None, logprobs: bool = False) -> Any:
        """Greedy tokens; the stream, filled while they come."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        stream = Stream() if into is None else into
        self._count += 1
        sampling = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if logprobs else None,
            output_kind=RequestOutputKind.DELTA,
        )
        stream.sent = time.perf_counter()
        asked = self._engine.generate(TokensPrompt(prompt_token_ids=list(prompt)), sampling, f"r{self._count}")
        async for said in asked:
            new = said.outputs[0]
            stream.times += [time.perf_counter()] * len(new.token_ids)
            stream.tokens += new.token_ids
            if logprobs:
                pairs = zip(new.logprobs, new.token_ids, strict=True)
                stream.logprobs += [place[token].logprob for place, token in pairs]
        return stream

    def read_counters(self) -> dict[str, float]:
        """The pack's metrics of the engine, without `vllm_ext:semipd_`; none of a stock engine."""
        from vllm_ext import observability

        directory = os.environ.get(observability.DIRECTORY_ENV)
        found = observability.read_records(directory) if directory else {}
        prefix = "vllm_ext:semipd_"
        return {name.removeprefix(prefix): value for (_, name), value in found.items() if name.startswith(prefix)}

    def stop(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()


def draw_prompt(generator: np.random.Generator, tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids, none of the special ones."""
    ids: list[int] = generator.integers(3, vocabulary, size=tokens).tolist()
    return ids


async def answer(engine: Engine) -> list[Stream]:
    """24 requests of 5 to 300 prompt tokens, one every 20 ms: long ones among those that decode."""
    generator = np.random.default_rng(1)
    tasks = []
    for _ in range(24):
        prompt = draw_prompt(generator, int(generator.choice((5, 20, 100, 300))))
        tasks.append(asyncio.create_task(engine.ask(prompt, int(generator.integers(8, 40)), logprobs=True)))
        await asyncio.sleep(0.02)
    return list(await asyncio.gather(*tasks))


async def disturb(engine: Engine, sizes: Sizes) -> dict[str, Any]:
    """What long prompts do to streams, and streams to long prompts; times in seconds."""
    generator = np.random.default_rng(2)

    def draw(tokens: int) -> list[int]:
        return draw_prompt(generator, tokens)

    await engine.ask(draw(sizes.long_tokens), 1)  # whatever compiles, compiles now
    alone = [await engine.ask(draw(sizes.long_tokens), 1) for _ in range(sizes.num_long)]
    streams = [Stream() for _ in range(sizes.streams)]
    tasks = [asyncio.create_task(engine.ask(draw(32), sizes.stream_tokens, one)) for one in streams]
    while min(len(one.times) for one in streams) < 20:
        await asyncio.sleep(0.002)
    calm = [gap for one in streams for gap in one.gaps]
    beside = []
    for _ in range(sizes.num_long):
        beside.append(await engine.ask(draw(sizes.long_tokens), 1))
        await asyncio.sleep(0.05)
    still_running = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    during: list[float] = []
    passed = 0
    for long in beside:
        for one in streams:
            for before, after in zip(one.times, one.times[1:], strict=False):
                # Also the gap that a prompt ends, and the one that it begins in.
                if after > long.sent and before < long.times[0]:
                    during.append(after - before)
                passed += long.sent < after < long.times[0]
    return {
        "alone": [one.times[0] - one.sent for one in alone],
        "beside": [one.times[0] - one.sent for one in beside],
        "calm_gaps": calm,
        "during_gaps": during,
        "tokens_during": passed / len(streams) / len(beside),
        "still_running": still_running,
    }


async def serve_rate(engine: Engine, sizes: Sizes, rate: float) -> dict[str, Any]:
    """Poisson arrivals of chat and long prompts; times to first token and per later token of every request."""
    generator = np.random.default_rng([3, int(rate * 1000)])
    count = max(4, round(rate * sizes.seconds))
    # The n arrivals of a Poisson process within a time are as n uniform draws: every arm sees as many.
    times = np.sort(generator.uniform(0, sizes.seconds, size=count))
    long = set(generator.permutation(count)[: round(count * sizes.long_share)].tolist())
    began = time.perf_counter()
    tasks = []
    for number, at in enumerate(times):
        prompt, tokens = sizes.mixed_long if number in long else sizes.chat
        length = int(prompt * generator.uniform(0.75, 1.25))
        await asyncio.sleep(max(0.0, began + float(at) - time.perf_counter()))
        tasks.append(asyncio.create_task(engine.ask(draw_prompt(generator, length), tokens)))
    streams: list[Stream] = list(await asyncio.gather(*tasks))
    took = time.perf_counter() - began
    return {
        "rate": rate,
        "seconds": took,
        "tokens": sum(len(one.tokens) for one in streams),
        "ttft": [one.times[0] - one.sent for one in streams],
        "tpot": [sum(one.gaps) / len(one.gaps) for one in streams],
        "gaps": [gap for one in streams for gap in one.gaps],
    }


async def measure_answers(arm: str, is_tiny: bool) -> dict[str, Any]:
    """The scenario `answers`."""
    engine = Engine(
        arm,
        str(MODEL),
        # Equal to the last bit only where nothing depends on who else is in a batch.
        dtype="float32" if is_tiny else "bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=96,
        enforce_eager=is_tiny,
        skip_tokenizer_init=True,
        **({} if is_tiny else {"gpu_memory_utilization": 0.3}),
    )
    try:
        streams = await answer(engine)
        counters = engine.read_counters()
    finally:
        engine.stop()
    return {
        "tokens": [one.tokens for one in streams],
        "token_logprobs": [one.logprobs for one in streams],
        "counters": counters,
    }


async def measure_load(arm: str, is_tiny: bool) -> dict[str, Any]:
    """The scenario `load`."""
    from transformers import LlamaConfig

    sizes = TINY if is_tiny else FULL
    batch = sizes.batch if arm in (LANES, AUTO) else int(arm.removeprefix("stock_"))
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**sizes.model, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        config.save_pretrained(folder)
        engine = Engine(
            arm,
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=sizes.model["max_position_embeddings"],
            max_num_seqs=128,
            max_num_batched_tokens=batch,
            enforce_eager=is_tiny,
        )
        try:
            found: dict[str, Any] = {"disturbed": await disturb(engine, sizes), "rates": []}
            found["overlap"] = engine.read_counters().get("overlap_seconds_total", 0.0)
            for rate in sizes.rates:
                found["rates"].append(await serve_rate(engine, sizes, rate))
            found["counters"] = engine.read_counters()
        finally:
            engine.stop()
    return {**found, "sizes": asdict(sizes), "batch": batch}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve.gpu_semipd_engine")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--arm", required=True, help="semipd, semipd_auto, or stock_ and the tokens of a batch")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    options = parser.parse_args(argv)
    is_ours = options.arm in (LANES, AUTO)
    if not is_ours and not options.arm.removeprefix("stock_").isdigit():
        parser.error(f"--arm {options.arm}: semipd, semipd_auto, or stock_ and a number, for example stock_2048")
    # Read when vLLM is imported.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_PLUGINS"] = "vllm_ext" if is_ours else ""
    if not options.tiny:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    measure = measure_answers if options.scenario == "answers" else measure_load
    found = asyncio.run(measure(options.arm, options.tiny))
    options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
