# SPDX-License-Identifier: Apache-2.0
"""`vllm serve DIR` of a directory that `vllm-ext quantize` made: requests, chunks, prefix cache and perplexity.

One server in float32 for all tests: at that precision its perplexity can be compared digit by digit.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import DefaultHttpxClient, OpenAI

from bench.quality.perplexity import measure_perplexity as measure_served_perplexity
from bench.serve.server import VllmServer
from vllm_ext import cli
from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.evaluation import load_dequantized, measure_perplexity
from vllm_ext.compress.profile import load_model
from vllm_ext.quantization.checkpoint import list_linears, validate_checkpoint

pytestmark = pytest.mark.engine

NAME = "packed"
NUM_LAYERS, TOP_K, EXPERT_WEIGHTS = 5, 2, 5 * 16 * 3 * 256 * 128
BITS = 3.25
#: Scheme of one linear layer outside of the experts, and the bytes of its 256 x 256 weights, of every layer.
O_PROJ, O_PROJ_BYTES = "w8a16_g128_sym", 256 * 256 * (8 + 16 / 128) / 8
#: Tokens of a step; a prompt longer than this is prefilled in several.
STEP_TOKENS = 64
#: Tokens of a block of the prefix cache; only whole blocks are found again.
BLOCK_TOKENS = 32
MAX_TOKENS = 24
CONTEXT, WINDOWS = 256, 4
#: vLLM's compiled mode on a CPU needs Python.h, which Debian ships apart from Python.
IS_COMPILED = (Path(sysconfig.get_path("include")) / "Python.h").is_file()


@pytest.fixture(scope="module")
def packed(tiny_moe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    linears = folder / "linears.json"
    linears.write_text(json.dumps({f"model.layers.{layer}.self_attn.o_proj": O_PROJ for layer in range(NUM_LAYERS)}))
    # Far apart, so that the allocator has to mix.
    schemes = ["--schemes", "w2a16_g64,w4a16_g64,w6a16_g64", "--plan", str(linears)]
    assert cli.main(["quantize", tiny_moe, "-o", str(folder / "packed"), "--bits", str(BITS), *schemes]) == 0
    return folder / "packed"


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    arguments = [
        "--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8",
        "--max-num-batched-tokens", str(STEP_TOKENS), "--block-size", str(BLOCK_TOKENS),
        "--enable-logging-iteration-details", *([] if IS_COMPILED else ["--enforce-eager"]),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with VllmServer(packed, args=arguments, log_path=log, start_timeout=240) as running:
        yield running
    assert running.exit_code == 0


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Iterator[OpenAI]:
    # A proxy from the environment must not see requests to loopback.
    http_client = DefaultHttpxClient(trust_env=False, timeout=120)
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", http_client=http_client, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def prompts(tiny_moe: str) -> list[list[int]]:
    """Long prompts of token ids without a common beginning."""
    return cut_windows(Path(tiny_moe) / "py_val.txt", load_tokenizer(Path(tiny_moe)), 300)[:2].tolist()


def complete(client: OpenAI, prompt: list[int], max_tokens: int = MAX_TOKENS) -> tuple[str, list[int]]:
    """Text and token ids of a greedy completion."""
    answer = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    tokens = answer.choices[0].model_dump()["token_ids"]
    assert len(tokens) == max_tokens
    return answer.choices[0].text, tokens


def stream(client: OpenAI, prompt: list[int]) -> tuple[str, list[int]]:
    """The same from a streamed completion, put together."""
    chunks = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > MAX_TOKENS / 2
    tokens = [token for choice in choices for token in choice.model_dump().get("token_ids") or []]
    return "".join(choice.text for choice in choices), tokens


def read_counters(server: VllmServer) -> dict[str, float]:
    names = {"pairs": "vllm_ext:mxmoe_routed_pairs_total", "hits": "vllm:prefix_cache_hits_total"}
    values = {key: server.read_metric(name) for key, name in names.items()}
    assert None not in values.values(), values
    return {key: value or 0.0 for key, value in values.items()}


def test_a_mixed_model_is_served_compiled(server: VllmServer, packed: Path) -> None:
    plan = validate_checkpoint(packed).plan
    schemes = [scheme for module in plan.modules.items() for scheme in list_linears(*module).values()]
    assert len({scheme.weight_bits for scheme in schemes}) > 1
    assert {scheme.act_bits for scheme in schemes} == {16}
    assert server.read_metric("vllm_ext:mxmoe_layer_count") == NUM_LAYERS
    assert server.read_metric("vllm_ext:mxmoe_weight_count") == EXPERT_WEIGHTS
    num_bytes = server.read_metric("vllm_ext:mxmoe_weight_bytes")
    # Sections of the arena start on 64 bytes, so a little padding comes on top of the plan's bits.
    assert num_bytes is not None
    assert BITS * 0.99 < 8 * num_bytes / EXPERT_WEIGHTS < BITS * 1.005
    assert server.read_metric("vllm_ext:mxmoe_linear_weight_count") == NUM_LAYERS * 256 * 256
    # A model in float32 keeps the layout of the files; every section there is a multiple of 64 bytes.
    for name in ("weight", "resident"):
        assert server.read_metric(f"vllm_ext:mxmoe_linear_{name}_bytes") == NUM_LAYERS * O_PROJ_BYTES
    log = server.log_path.read_text()
    assert f"enforce_eager={not IS_COMPILED}" in log
    # The first where vLLM's cache has this graph already.
    assert any(line in log for line in ("load AOT compilation", "saved AOT compiled function")) == IS_COMPILED
    assert "enable_prefix_caching=True" in log
    assert "quantization=mxmoe" in log


def test_long_prompts_are_chunked_and_then_found_again(
    server: VllmServer, client: OpenAI, prompts: list[list[int]]
) -> None:
    prompt, other = prompts
    began = server.log_path.stat().st_size
    before = read_counters(server)
    first = complete(client, prompt)
    computed = read_counters(server)
    # Each token but the last generated one went through every layer, and through our operator there.
    routed = (len(prompt) + MAX_TOKENS - 1) * TOP_K * NUM_LAYERS
    assert computed["pairs"] - before["pairs"] == routed
    assert computed["hits"] == before["hits"]
    steps = list_prefills(server.log_path.read_bytes()[began:].decode(errors="replace"))
    assert sum(steps) == len(prompt)
    assert max(steps) <= STEP_TOKENS
    assert len(steps) == -(-len(prompt) // STEP_TOKENS)

    second = complete(client, prompt)
    reused = read_counters(server)
    found = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert reused["hits"] - computed["hits"] == found
    assert reused["pairs"] - computed["pairs"] == routed - found * TOP_K * NUM_LAYERS
    assert second == first
    assert stream(client, prompt) == first
    # What is compared above is an answer to this prompt, not one that every prompt gets.
    assert complete(client, other) != first


def list_prefills(log: str) -> list[int]:
    """Prompt tokens of every step that had any, from vLLM's iteration log."""
    return [int(tokens) for tokens in re.findall(r"(\d+) context tokens", log) if int(tokens) > 0]


def test_chat_answers_the_templated_prompt(client: OpenAI, packed: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "And Moses said unto the people,"}]
    reply = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=MAX_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )  # type: ignore[call-overload]
    tokenizer = AutoTokenizer.from_pretrained(packed)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain, _ = complete(client, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert reply.choices[0].message.content == plain
    assert len(plain.split()) > 3


def test_perplexity_is_that_of_the_dequantized_model(server: VllmServer, packed: Path, tiny_moe: str) -> None:
    tokenizer = load_tokenizer(packed)
    text = Path(tiny_moe) / "kjv_val.txt"
    windows = cut_windows(text, tokenizer, CONTEXT)[:WINDOWS]
    expected = measure_perplexity(load_dequantized(packed), windows)
    original = measure_perplexity(load_model(Path(tiny_moe), "float32"), windows)
    served = measure_served_perplexity(server.base_url, NAME, text.read_text(), tokenizer, CONTEXT, WINDOWS)
    assert served.tokens == WINDOWS * (CONTEXT - 1)
    assert served.perplexity == pytest.approx(expected, rel=1e-5)
    # The comparison can fail: the model without quantization is further away.
    assert abs(original / expected - 1) > 1e-3
