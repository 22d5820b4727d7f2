# SPDX-License-Identifier: Apache-2.0
"""What a conformance case is: a schema, texts, and the form in which a request and an output have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.structured.tool_calls import Choice, write_call, write_tag


@dataclass(frozen=True)
class Case:
    """One keyword in one place, three texts of each sort.

    form: (model of vLLM's registry, tool choice) where the schema is a strict tool's, and the texts are arguments.
    """

    name: str
    schema: Any
    valid: tuple[str, str, str]
    invalid: tuple[str, str, str]
    form: tuple[str, Choice] | None = None

    @property
    def spec(self) -> tuple[str, str]:
        """(kind, text) of what a request asks for."""
        if self.form is None:
            return "json", json.dumps(self.schema)
        return "structural_tag", write_tag(*self.form, self.schema)

    @property
    def texts(self) -> tuple[str, ...]:
        """Outputs that are judged: the valid ones, then the invalid ones."""
        given = (*self.valid, *self.invalid)
        if self.form is None:
            return given
        return tuple(write_call(self.form[0], json.loads(text)) for text in given)
