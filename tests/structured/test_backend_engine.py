# SPDX-License-Identifier: Apache-2.0
"""Both grammar engines in one real engine, whatever the order in which their schemas come."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_ext import observability
from vllm_ext.structured import budgets, validation

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

#: xgrammar honours the first two; of the others it would ignore allOf, the multiple and 29 February.
EASY: tuple[Any, ...] = (
    {
        "type": "object",
        "properties": {"kind": {"enum": ["alpha", "beta"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["kind", "n"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
)
HARD: tuple[Any, ...] = (
    {"allOf": [{"type": "string"}, {"enum": ["yes", "no"]}]},
    {
        "type": "object",
        "properties": {
            "d": {"type": "string", "format": "date"},
            "m": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 99},
        },
        "required": ["d", "m"],
        "additionalProperties": False,
    },
)


def ask(**given: Any) -> SamplingParams:
    return SamplingParams(max_tokens=80, temperature=1, seed=3, structured_outputs=StructuredOutputsParams(**given))


def test_requests_go_to_the_engine_that_honours_them(
    tiny_moe: str, engine_in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prewarm = tmp_path / "specs.jsonl"
    prewarm.write_text(json.dumps({"json": EASY[1]}) + "\n" + json.dumps({"json": {"not": {}}}) + "\n")
    block = {
        "forced_tokens": "off",
        "whitespace": "compact",
        "prewarm": str(prewarm),
        "store_dir": str(tmp_path / "store"),
    }
    llm = LLM(
        model=tiny_moe, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        additional_config={"vllm_ext": {"structured": block}},
    )  # fmt: skip
    try:
        schemas = [*EASY, *HARD, *reversed(EASY), *reversed(HARD)]
        outputs = llm.generate(["Write JSON: "] * len(schemas), [ask(json=one) for one in schemas], use_tqdm=False)
        for schema, output in zip(schemas, outputs, strict=True):
            text = output.outputs[0].text
            assert output.outputs[0].finish_reason == "stop", text
            jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
                json.loads(text)
            )
            assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
        # The same parameters again, as callers reuse them; and the other kinds of specification.
        again = ask(json=HARD[0])
        for _ in range(2):
            assert json.loads(llm.generate(["x"], again, use_tqdm=False)[0].outputs[0].text) in ("yes", "no")
        kinds = [ask(regex="[a-c]{3}"), ask(choice=["red", 'gr"een']), ask(grammar='root ::= "a" | "b"')]
        texts = [each.outputs[0].text for each in llm.generate(["x"] * 3, kinds, use_tqdm=False)]
        assert set(texts[0]) <= set("abc")
        assert texts[1] in ("red", 'gr"een')
        assert texts[2] in ("a", "b")

        with pytest.raises(VLLMValidationError, match=r"keyword 'not' at #/not"):
            llm.generate(["x"], ask(json={"not": {"type": "string"}}), use_tqdm=False)

        counts = observability.read_records(os.environ[observability.DIRECTORY_ENV])
        assert counts[0, "vllm_ext:structured_guidance_requests_total"] >= 6
        assert counts[0, "vllm_ext:structured_xgrammar_requests_total"] >= 7
        assert counts[0, "vllm_ext:structured_refused_total"] == 1
        assert any((tmp_path / "store").glob("*.spec.json"))

        # Slow masks, in the steps and beside them: the same tokens.
        plain = SamplingParams(max_tokens=60, temperature=1, seed=4, ignore_eos=True)
        slow = [ask(grammar='root ::= s\ns ::= s s | [a-z ] | "7"') for _ in range(2)]
        made = []
        # On a busy machine these masks take longer than a request may.
        monkeypatch.setattr(budgets, "CREDIT_MS", 1e9)
        for limit in (1e9, -1.0):
            monkeypatch.setattr(budgets, "SLOW_MS", limit)
            monkeypatch.setattr(budgets, "SLOW_SHARE", 0.0)
            outputs = llm.generate(["x", "y", "z", "w"], [plain, slow[0], plain, slow[1]], use_tqdm=False)
            assert [each.outputs[0].finish_reason for each in outputs] == ["length"] * 4
            made.append([each.outputs[0].token_ids for each in outputs])
        assert made[0] == made[1]
        counts = observability.read_records(os.environ[observability.DIRECTORY_ENV])
        assert counts[0, "vllm_ext:structured_masks_aside_total"] >= 2
    finally:
        llm.llm_engine.engine_core.shutdown()
        validation.close_gates()
        del llm
        gc.collect()
