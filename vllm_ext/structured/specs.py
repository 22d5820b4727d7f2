# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, read from its parameters: measured before it is copied or written as text."""

from __future__ import annotations

import hashlib
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.structured_output.request import get_structured_output_key

from vllm_ext.structured.cost import MAX_SPEC_BYTES, MOST_LEVELS

#: Characters of a specification that is read where its request arrives, and planned beside others of its kind.
SMALL_TEXT = 8192


def read_spec(params: Any) -> tuple[str, str, bytes]:
    """(kind, text, digest) of StructuredOutputsParams, once it is known to be small. Raises VLLMValidationError."""
    for value in (params.json, params.choice):
        if not isinstance(value, str | None):
            _measure(value)
    if params.json_object is False:
        raise VLLMValidationError("structured_outputs.json_object must be true where it is given")
    if isinstance(params.choice, list) and not params.choice:
        raise VLLMValidationError("structured_outputs.choice is an empty list")
    for name in ("json", "grammar", "structural_tag"):
        if isinstance(getattr(params, name), str) and not getattr(params, name).strip():
            raise VLLMValidationError(f"structured_outputs.{name} is an empty string")
    option, text = get_structured_output_key(params)
    kind = option.name.lower()
    digest = hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return kind, text, digest


def is_small(params: Any) -> bool:
    """Whether StructuredOutputsParams are read in no time."""
    values = (params.json, params.choice, params.regex, params.grammar, params.structural_tag)
    try:
        for value in values:
            if not isinstance(value, str | None):
                _measure(value, SMALL_TEXT)
    except VLLMValidationError:
        return False
    return sum(len(value) for value in values if isinstance(value, str)) <= SMALL_TEXT


def _measure(value: Any, most: int = MAX_SPEC_BYTES) -> None:
    """Refuse what is too large or too deep before it is written as text."""
    size, level = 0, [value]
    for _ in range(MOST_LEVELS + 1):
        deeper: list[Any] = []
        for each in level:
            size += 2 + (len(each) if isinstance(each, str) else 0)
            if isinstance(each, dict):
                size += sum(map(len, filter(lambda name: isinstance(name, str), each)))
                deeper.extend(each.values())
            elif isinstance(each, list):
                deeper.extend(each)
            if size + 2 * len(deeper) > most:
                raise VLLMValidationError(f"the specification has more than {most} bytes")
        if not deeper:
            return
        level = deeper
    raise VLLMValidationError(f"the specification nests objects and arrays more than {MOST_LEVELS} levels deep")
