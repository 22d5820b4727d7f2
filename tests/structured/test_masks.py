# SPDX-License-Identifier: Apache-2.0
"""Batched masks against vLLM's own, bit for bit: both grammar engines, drafts, padding, reasoning, ends."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker import gpu_model_runner

from tests.conftest import REPOSITORY
from vllm_ext.patches import structured_masks
from vllm_ext.structured import masks
from vllm_ext.structured.masks import MaskFiller, apply_mask_on_cpu

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "bench" / "models" / "tiny_moe")
SIZE, K = 4096, 4
SCHEMAS = (
    {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    {"enum": ["left", "right"]},
)


class Manager(StructuredOutputManager):
    """vLLM's manager over a backend that is made here; some requests still think."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.vllm_config = SimpleNamespace(
            num_speculative_tokens=K,
            scheduler_config=SimpleNamespace(max_num_seqs=64),
            model_config=SimpleNamespace(is_diffusion=False),
        )
        self._grammar_bitmask = None
        self._full_mask = torch.tensor(-1, dtype=torch.int32)
        self.fill_bitmask_parallel_threshold = 128

    def _get_constraint_bounds(
        self, request: Any, spec_tokens: Any, spec_tokens_committed: bool = False
    ) -> ConstraintBounds:
        return request.bounds if spec_tokens else ConstraintBounds(*[min(bound, 1) for bound in request.bounds])


def make_backends() -> dict[str, Any]:
    config = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=True, disable_additional_properties=False),
        speculative_config=SimpleNamespace(num_speculative_tokens=K),
        model_config=None,
    )
    made = {}
    for name, kind in (("xgrammar", XgrammarBackend), ("guidance", GuidanceBackend)):
        made[name] = kind(config, tokenizer=TOKENIZER, vocab_size=SIZE)
    return made


@pytest.fixture(scope="module")
def backends() -> dict[str, Any]:
    return make_backends()


def list_allowed(grammar: Any, backend: Any) -> list[int]:
    row = backend.allocate_token_bitmask(1)
    grammar.fill_bitmask(row, 0)
    return np.flatnonzero(np.unpackbits(row.numpy().view(np.uint8), bitorder="little")).tolist()


def make_request(backends: dict[str, Any], generator: np.random.Generator, engines: list[str]) -> Any:
    """A request somewhere in its answer, with drafts of which some are forbidden or padding."""
    engine = str(generator.choice(engines))
    backend = backends[engine]
    spec = json.dumps(SCHEMAS[generator.integers(len(SCHEMAS))])
    grammar = backend.compile_grammar(StructuredOutputOptions.JSON, spec)
    for _ in range(generator.integers(12)):
        if grammar.is_terminated():
            break
        token = int(generator.choice(list_allowed(grammar, backend)))
        assert grammar.accept_tokens("walk", [token])
    drafts: list[int] = []
    if not grammar.is_terminated() and generator.random() < 0.8:
        for _ in range(generator.integers(K + 1)):
            allowed = list_allowed(grammar, backend)
            drafts.append(int(generator.choice(allowed)))
            if not grammar.accept_tokens("draft", drafts[-1:]) or grammar.is_terminated():
                break
        if drafts:
            grammar.rollback(len(drafts))
        if engine == "xgrammar" and drafts and generator.random() < 0.2:
            drafts[generator.integers(len(drafts))] = int(generator.integers(SIZE))
    # A request that thinks has drafts of its thoughts first, which are not the grammar's.
    start = int(generator.integers(1, K + 1)) if generator.random() < 0.2 else 0
    bounds = ConstraintBounds(max(start - int(generator.integers(2)), 0), start)
    drafts = ([5] * bounds.grammar_start + drafts)[:K]
    drafts += [-1] * (K - len(drafts)) if generator.random() < 0.2 else []
    request = SimpleNamespace(structured_output_request=SimpleNamespace(grammar=grammar), bounds=bounds)
    return request, drafts


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("engines", [["xgrammar"], ["guidance"], ["xgrammar", "guidance"]])
def test_masks_are_vllms(engines: list[str], threads: int, backends: dict[str, Any]) -> None:
    generator = np.random.default_rng(len(engines) + threads)
    manager = Manager(backends[engines[0]])
    filler = MaskFiller(manager, num_threads=threads)
    for _ in range(12):
        requests, drafts = {}, {}
        for number in range(int(generator.integers(1, 9))):
            requests[str(number)], tokens = make_request(backends, generator, engines)
            if tokens:
                drafts[str(number)] = tokens
        ids = list(requests)
        expected = manager.grammar_bitmask(requests, ids, drafts)
        assert expected is not None
        expected = expected.copy()
        # Twice: grammars are where they were.
        for _ in range(2):
            found = filler.fill(requests, ids, drafts, {})
            assert found is not None
            np.testing.assert_array_equal(found, expected)
    assert filler.fill({}, [], {}, {}) is None


def test_certain_drafts_have_one_bit(backends: dict[str, Any]) -> None:
    backend = backends["xgrammar"]
    manager = Manager(backend)
    grammar = backend.compile_grammar(StructuredOutputOptions.REGEX, "Q[a-c]")
    quoted = TOKENIZER.encode("Q", add_special_tokens=False)[0]
    only = SimpleNamespace(structured_output_request=SimpleNamespace(grammar=grammar), bounds=ConstraintBounds(0, 0))
    thinking = SimpleNamespace(
        structured_output_request=SimpleNamespace(
            grammar=backend.compile_grammar(StructuredOutputOptions.REGEX, "Q[a-c]")
        ),
        bounds=ConstraintBounds(1, 1),
    )
    for token in (quoted, 31, 95, SIZE - 1):
        filler = MaskFiller(manager)
        found = filler.fill({"a": only, "b": thinking}, ["a", "b"], {"a": [token], "b": [token]}, {"a": 1, "b": 1})
        assert found is not None
        bits = np.unpackbits(found.view(np.uint8), bitorder="little").reshape(4, -1)
        assert np.flatnonzero(bits[0]).tolist() == [token]
        # A draft of a request that thinks is not its grammar's.
        assert bits[2].all()


def test_a_grammar_of_another_kind_fills_its_own_mask(backends: dict[str, Any]) -> None:
    """A subclass that does something of its own in fill_bitmask is asked, and in this thread."""
    backend = backends["xgrammar"]
    asked: list[tuple[int, int]] = []

    def fill_bitmask(self: Any, bitmask: torch.Tensor, index: int) -> None:
        asked.append((index, threading.get_ident()))
        self.matcher.fill_next_token_bitmask(bitmask, index)

    def compile_grammar() -> Any:
        grammar = backend.compile_grammar(StructuredOutputOptions.REGEX, "[a-c]")
        grammar.__class__ = type("OwnGrammar", (type(grammar),), {"fill_bitmask": fill_bitmask})
        return SimpleNamespace(
            structured_output_request=SimpleNamespace(grammar=grammar), bounds=ConstraintBounds(0, 0)
        )

    requests = {str(number): compile_grammar() for number in range(3)}
    found = MaskFiller(Manager(backend), num_threads=2).fill(requests, list(requests), {}, {})
    assert found is not None
    assert asked == [(number, threading.get_ident()) for number in range(3)]
    assert (found == found[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_masked_as_by_vllm(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    for case in range(20):
        count = int(generator.integers(1, 6))
        batch = [str(number) for number in generator.permutation(count)]
        drafts = {rid: [1] * int(generator.integers(1, 4)) for rid in batch if generator.random() < 0.5}
        # Of the structured requests, in any order; one may have left the batch.
        structured = [
            rid for rid in map(str, generator.permutation(count)) if generator.random() < 0.7 or case % 4 == 0
        ]
        if case % 3 == 0:
            structured.insert(0, "gone")
        if case % 5 == 0:
            structured = list(batch)
        rows = sum(1 + len(drafts.get(rid, ())) for rid in batch)
        words = generator.integers(-(2**31), 2**31, (sum(1 + len(drafts.get(r, ())) for r in structured), 4))
        # Rows of both kinds: most tokens forbidden, and hardly any or none.
        for row in np.flatnonzero(generator.random(len(words)) < 0.5):
            words[row] = -1
            words[row, :2] &= ~(1 << generator.integers(0, 31, 2)) if generator.random() < 0.7 else -1
        output = SimpleNamespace(structured_output_request_ids=structured, grammar_bitmask=words.astype(np.int32))
        scheduled = SimpleNamespace(scheduled_spec_decode_tokens=drafts)
        logits = torch.randn(rows, 128, generator=torch.Generator().manual_seed(case)).to(dtype)
        expected, found = logits.clone(), logits.clone()
        apply_grammar_bitmask(scheduled, output, SimpleNamespace(req_ids=batch), expected)
        apply_mask_on_cpu(scheduled, output, SimpleNamespace(req_ids=batch), found)
        assert torch.equal(found, expected)


def test_only_logits_on_the_cpu_are_masked_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu_model_runner, "apply_grammar_bitmask", lambda *arguments: asked.append("vllm"))
    monkeypatch.setattr(masks, "apply_mask_on_cpu", lambda *arguments: asked.append("ours"))
    structured_masks.wrap_apply_grammar_bitmask()
    structured_masks.wrap_apply_grammar_bitmask()
    for device in ("cpu", "meta"):
        gpu_model_runner.apply_grammar_bitmask(None, None, None, torch.empty(2, device=device))  # type: ignore[arg-type]
    assert asked == ["ours", "vllm"]
