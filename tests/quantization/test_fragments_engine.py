# SPDX-License-Identifier: Apache-2.0
"""A real engine whose layers are loaded for the Triton kernels, warmed up, and computed by them in its interpreter.

Without a GPU this is as near as one comes: only the choice of the layout, the registration of the ops for CPUs, and the
kernels' inline PTX are other ones. Graphs are not captured; what a capture forbids, reading a table, is counted.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bench.kernels.gpu_parts import engine, engine_answers
from bench.records import ROOT
from tests.child import run_child

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

#: Slow: an engine, and kernels in the interpreter.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

#: Prompts, every so many of the part's, and how long they and their continuations are.
STEP, PROMPT_TOKENS, NEW_TOKENS, MAX_TOKENS = 6, 8, 3, 16

#: vLLM's compiled CPU engines need Python's headers. Compiled, tables go through torch.compile to the ops.
IS_EAGER = not (Path(sysconfig.get_path("include")) / "Python.h").is_file()

CODE = """
import json
import os
import sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, ROOT)
import torch
from vllm import LLM
from bench.kernels.gpu_parts import engine_answers
from vllm_ext.kernels.arena import Layout
from vllm_ext.kernels.mixed_linear import triton as linear_triton
from vllm_ext.kernels.mixed_moe import op, triton as moe_triton
from vllm_ext.quantization import cuda_graphs, linear, online

for module in (linear, online):
    module.choose_layout = lambda dtype, device: Layout.GPU_FRAGMENT
cuda_graphs._find_max_tokens = lambda arena, layout, dtype: MAX_TOKENS

calls, warmed, read = {"moe": 0, "linear": 0}, [], []

def compute(name, launcher, arguments):
    calls[name] += 1
    out = launcher(*arguments)
    assert out is not None
    return out

op.cpu.mixed_moe = lambda *arguments, observer: compute("moe", moe_triton.mixed_moe, arguments)
library = torch.library.Library("vllm_ext", "IMPL")
run_linear = lambda *arguments: compute("linear", linear_triton.mixed_linear, arguments)
library.impl("mixed_linear", run_linear, "CPU", allow_override=True)

def note(name, module):
    warm_up = module.warm_up
    def noting(*arguments):
        sizes = warm_up(*arguments)
        warmed.append((name, sizes))
    module.warm_up = noting
    derive = module._facts._derive
    def reading(*arguments):
        read.append(name)
        return derive(*arguments)
    module._facts._derive = reading

note("moe", moe_triton)
note("linear", linear_triton)

plan = {"quantization_config": engine_answers.make_plan().to_config()}
llm = LLM(
    str(engine_answers.MODEL), quantization="mxmoe", hf_overrides=plan,
    dtype="bfloat16", max_model_len=16, max_num_seqs=2, max_num_batched_tokens=MAX_TOKENS, enforce_eager=IS_EAGER,
    enable_prefix_caching=False, seed=0,
)
prompts = [ids[:PROMPT_TOKENS] for ids in engine_answers.read_prompts(llm.get_tokenizer())[::STEP]]
outputs = engine_answers.generate(llm, prompts, NEW_TOKENS, prompt_logprobs=0)
logprobs = [
    [place[token].logprob for place, token in zip(one.prompt_logprobs[1:], ids[1:], strict=True)]
    for ids, one in zip(prompts, outputs, strict=True)
]
(layouts,) = llm.apply_model(engine_answers.list_layouts)
print(json.dumps([logprobs, layouts, calls, warmed, read]))
"""


def test_an_engine_computes_with_the_triton_kernels() -> None:
    names = ("MAX_TOKENS", "PROMPT_TOKENS", "NEW_TOKENS", "STEP", "IS_EAGER")
    values = {"ROOT": str(ROOT), **{name: globals()[name] for name in names}}
    code = "\n".join([*(f"{name} = {value!r}" for name, value in values.items()), CODE])
    child = run_child(code, TRITON_INTERPRET="1", VLLM_CPU_KVCACHE_SPACE="1")
    assert child.value is not None, child.stderr[-4000:]
    found, layouts, calls, warmed, read = child.value
    assert set(layouts) == {"GPU_FRAGMENT", "PLAIN_BF16"}

    # Layers that are equal to an earlier one are read, and nothing runs for them.
    num_linears = 2 * engine_answers.NUM_LAYERS
    assert [sizes for name, sizes in warmed if name == "moe"] == [
        [1, MAX_TOKENS],
        *[[]] * (engine_answers.NUM_LAYERS - 1),
    ]
    assert sum(sizes == [] for name, sizes in warmed if name == "linear") == num_linears - 2
    # Every table once, while loading: as a request or a capture meets it, it is known.
    assert sorted(read) == ["linear"] * num_linears + ["moe"] * engine_answers.NUM_LAYERS
    # The profile run, the prompts, and every further token.
    assert calls["moe"] >= NEW_TOKENS * engine_answers.NUM_LAYERS
    assert calls["linear"] >= NEW_TOKENS * num_linears

    # The stored prompts begin with these.
    stored = engine.read_stored().logprobs
    length = engine_answers.PROMPT_TOKENS - 1
    starts = range(0, len(stored), STEP * length)
    expected = [stored[start : start + PROMPT_TOKENS - 1] for start in starts]
    differences = [abs(a - b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)]
    assert len(differences) == len(starts) * (PROMPT_TOKENS - 1)
    assert sum(differences) / len(differences) < engine.LIMIT
