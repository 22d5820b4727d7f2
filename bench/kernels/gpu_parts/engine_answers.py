# SPDX-License-Identifier: Apache-2.0
"""One arm of engine.py, in a process of its own: starts vLLM on the small MoE and writes down what it answers.

    python -m bench.kernels.gpu_parts.engine_answers --arm NAME --out FILE

Half of the prompts are scored in one batch, larger than any graph, the others one by one, in graphs of pieces; some are
continued greedily, together, in graphs of the whole model that pad the batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.records import ROOT
from vllm_ext.quantization.plan import Plan

MODEL = ROOT / "bench" / "models" / "tiny_moe"
TEXTS = ("kjv_val.txt", "py_val.txt")

NUM_LAYERS, NUM_EXPERTS = 5, 16
#: Dealt to experts and blocks in turn: every layer has them all. K is 256 for gate_up and 128 for down.
SCHEMES = ("w2a16_g64", "w3a16_g128", "w4a16_g128", "w4a8_g64", "w8a8_g128_sym", "w6a16_g32", "w16a16")
LINEARS = {"q_proj": "w4a8_g64", "k_proj": "w4a8_g64", "v_proj": "w4a8_g64", "o_proj": "w6a16_g128"}

#: Prompts of each text, tokens of a prompt. Of all prompts some are continued: an odd number, which graphs pad.
PROMPTS, PROMPT_TOKENS, CONTINUED, NEW_TOKENS = 6, 96, 5, 24

#: Batches that are captured on a GPU: the largest is that of one prompt, where vLLM would stop earlier.
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 96]

#: As the user starts it, in vLLM's CPU engines (`compiled`) and on a GPU (`graphs`); engine.py explains the others.
ARMS = ("graphs", "compiled", "eager", "reference")


@dataclass(frozen=True)
class Answers:
    """What an engine said. logprobs: of the prompts' tokens but the first, one after the other; tokens, token_logprobs:
    of the continuations; facts: what ran."""

    logprobs: list[float]
    tokens: list[list[int]]
    token_logprobs: list[list[float]]
    facts: dict[str, Any]


def make_plan() -> Plan:
    """The plan of all arms."""
    modules: dict[str, Any] = {}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        modules |= {f"{prefix}.self_attn.{name}": scheme for name, scheme in LINEARS.items()}
        for expert in range(NUM_EXPERTS):
            modules[f"{prefix}.mlp.experts.{expert}"] = {
                "gate_up": SCHEMES[(expert + layer) % len(SCHEMES)],
                "down": SCHEMES[(3 * expert + 2 * layer + 1) % len(SCHEMES)],
            }
    return Plan.parse(modules)


def describe_inputs() -> dict[str, str]:
    """Digests of all that answers depend on."""
    weights = (MODEL / "model.safetensors").read_bytes()
    texts = b"".join((MODEL / name).read_bytes() for name in TEXTS)
    sizes = f"{PROMPTS} {PROMPT_TOKENS} {CONTINUED} {NEW_TOKENS}"
    return {
        "plan": make_plan().sha256[:16],
        "model": hashlib.sha256(weights).hexdigest()[:16],
        "prompts": hashlib.sha256(texts + sizes.encode()).hexdigest()[:16],
    }


def answer(arm: str) -> Answers:
    """Start the engine of an arm in this process and ask it everything."""
    # Read when vLLM is imported; one process, so that what is changed here holds in the engine.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    from vllm_ext.quantization import linear, online, resident

    loading: dict[str, int] = {}
    for module, name in ((online, "prepare_experts"), (linear, "prepare_linear")):
        note_compiled(module, name, loading)
    if arm == "reference":
        resident.is_sound_on_all_ranks = lambda device, dtype: False  # type: ignore[assignment]
        resident.load_ops = lambda *_: None
    # vLLM's CPU engines compile C++ that includes Python's headers.
    can_compile = is_gpu or (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    enforce_eager = arm == "eager" or not can_compile
    options: dict[str, Any] = {"gpu_memory_utilization": 0.3} if is_gpu else {}
    if is_gpu and not enforce_eager:
        options["compilation_config"] = {"cudagraph_capture_sizes": CAPTURE_SIZES}
    begin = time.monotonic()
    llm = LLM(
        str(MODEL),
        quantization="mxmoe",
        hf_overrides={"quantization_config": make_plan().to_config()},
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        enforce_eager=enforce_eager,
        seed=0,
        **options,
    )
    started = time.monotonic() - begin
    prompts = read_prompts(llm.get_tokenizer())
    half = len(prompts) // 2
    scored = generate(llm, prompts[:half], 1, prompt_logprobs=0)
    for prompt in prompts[half:]:
        scored += generate(llm, [prompt], 1, prompt_logprobs=0)
    continued = generate(llm, prompts[:: len(prompts) // CONTINUED][:CONTINUED], NEW_TOKENS, logprobs=0)
    layouts: dict[str, int] = {}
    for names in llm.apply_model(list_layouts):
        for name, count in names.items():
            layouts[name] = layouts.get(name, 0) + count
    (worker,) = llm.collective_rpc(describe_worker)
    facts = {
        "arm": arm,
        **worker,
        "graphs": compilation_counter.num_cudagraph_captured,
        "enforce_eager": enforce_eager,
        "layouts": layouts,
        # Of the kernels, by the end of loading and after it, where a graph's capture or a request would wait for it.
        "compiled": loading.get("kernels", 0),
        "compiled_late": count_compiled() - loading.get("kernels", 0),
        "start_seconds": round(started, 1),
    }
    return Answers(
        logprobs=[
            place[token].logprob
            for prompt, one in zip(prompts, scored, strict=True)
            for place, token in zip(one.prompt_logprobs[1:], prompt[1:], strict=True)
        ],
        tokens=[list(one.outputs[0].token_ids) for one in continued],
        token_logprobs=[
            [place[token].logprob for place, token in zip(out.logprobs, out.token_ids, strict=True)]
            for out in (one.outputs[0] for one in continued)
        ],
        facts=facts,
    )


def note_compiled(module: ModuleType, name: str, found: dict[str, int]) -> None:
    """Have a module's function note, after every call, how many kernels are compiled by then."""
    function = getattr(module, name)

    def noting(*arguments: Any) -> None:
        function(*arguments)
        found["kernels"] = count_compiled()

    setattr(module, name, noting)


def count_compiled() -> int:
    """Kernels of ours that Triton has compiled or loaded in this process."""
    names = ("activations", "combine", "experts", "linear", "sorting")
    modules = (sys.modules.get(f"vllm_ext.kernels.gpu.{name}") for name in names)
    values = {id(value): value for module in modules if module is not None for value in vars(module).values()}
    caches = (getattr(value, "device_caches", {}) for value in values.values())
    return sum(len(kernels) for cache in caches for kernels, *_ in cache.values())


def describe_worker(worker: Any) -> dict[str, str]:
    """Which runner a worker has, and which CUDA graphs; sent to vLLM's worker."""
    mode = worker.vllm_config.compilation_config.cudagraph_mode
    return {"runner": type(worker.model_runner).__module__, "mode": mode.name}


def list_layouts(model: torch.nn.Module) -> dict[str, int]:
    """{layout: blocks} of the quantized layers of a loaded model; sent to vLLM's worker."""
    from vllm_ext.kernels.arena import Field, Layout

    found: dict[str, int] = {}
    for name, table in model.named_buffers():
        if name.endswith(("expert_table", "linear_table")):
            for layout in table[..., Field.LAYOUT].flatten().tolist():
                found[Layout(layout).name] = found.get(Layout(layout).name, 0) + 1
    return found


def read_prompts(tokenizer: Any) -> list[list[int]]:
    """Windows of the held-out texts, evenly spread."""
    prompts = []
    for name in TEXTS:
        ids = tokenizer((MODEL / name).read_text(encoding="utf-8")).input_ids
        step = len(ids) // PROMPTS
        prompts += [ids[step * number : step * number + PROMPT_TOKENS] for number in range(PROMPTS)]
    return prompts


def generate(llm: Any, prompts: Sequence[list[int]], count: int, **sampling: Any) -> list[Any]:
    """vLLM's outputs, `count` tokens for each prompt, greedily. sampling: further fields of SamplingParams."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **sampling)
    found: list[Any] = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.gpu_parts.engine_answers")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    options.out.write_text(json.dumps(asdict(answer(options.arm))) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
