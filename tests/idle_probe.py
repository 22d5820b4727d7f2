# SPDX-License-Identifier: Apache-2.0
"""Run stock models in real engines and print tokens and logprobs, for comparison with and without the pack.

    python idle_probe.py MODEL [MODEL ...]      one JSON object on the last line of stdout

Imports nothing of the pack or its tests: it also runs where the pack is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

PROMPTS = ["In the beginning", "def read(self, path):", "And it came to pass", "import"]


def list_loaded_parts(_worker: object) -> dict[str, object]:
    """What a worker process has loaded; runs there through vLLM's collective_rpc."""
    import torch

    return {
        "pack": sorted(name for name in sys.modules if name.startswith("vllm_ext")),
        "active": os.environ.get("VLLM_EXT_ACTIVE"),
        "cuda": torch.cuda.is_initialized(),
    }


def write_logprobs(steps: list) -> list:
    """Per step {token: logprob}; repr, so that every bit of the double is compared. The first prompt step is None."""
    return [step and {token: repr(entry.logprob) for token, entry in sorted(step.items())} for step in steps]


def run_model(model: str, in_process: bool) -> dict[str, object]:
    """Greedy tokens with the logprobs of the five likeliest, and prompt logprobs, of one engine.

    in_process: EngineCore and worker in this process; otherwise in processes of their own, as a server has them.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    from vllm import LLM, SamplingParams

    executor = {"distributed_executor_backend": "uni"} if in_process else {}
    engine = LLM(model=model, max_model_len=256, max_num_seqs=8, enforce_eager=True, seed=0, **executor)
    sampling = SamplingParams(max_tokens=24, temperature=0, logprobs=5, prompt_logprobs=1)
    # One at a time: which requests share a batch depends on when they arrive, and a GEMM's last bits on its batch.
    outputs = [engine.generate(prompt, sampling, use_tqdm=False)[0] for prompt in PROMPTS]
    result = {
        "quantization": str(engine.llm_engine.model_config.quantization),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [write_logprobs(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [write_logprobs(output.prompt_logprobs) for output in outputs],
        "worker": engine.collective_rpc(list_loaded_parts)[0],
    }
    engine.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets collective_rpc carry list_loaded_parts
    # One model in the processes of a server; the others here, since every process imports vLLM for seconds.
    results = {
        os.path.basename(model): run_model(model, in_process=position > 0)
        for position, model in enumerate(sys.argv[1:])
    }
    installed = importlib.util.find_spec("vllm_ext") is not None
    print(json.dumps({"installed": installed, "models": results}))
