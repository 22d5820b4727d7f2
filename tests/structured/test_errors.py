# SPDX-License-Identifier: Apache-2.0
"""Messages to clients."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.routing import plan_spec


def plan(schema: Any, **options: Any) -> Any:
    return plan_spec("json", json.dumps(schema), **options)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/" + "x" * 500_000},
        {"$ref": "https://" + "x" * 500_000},
        {"type": "string", "format": "x" * 500_000},
        {"type": "x" * 500_000},
        {"type": "string", "minLength": "x" * 500_000},
        {"properties": {"p" * 500_000: {"not": {}}}},
        {"properties": {"\ud800": {"not": {}}}},
        {"type": "string", "const": "x" * 100, "enum": [10**1000]},
    ],
    ids=lambda schema: str(schema)[:20],
)
def test_messages_are_short_and_can_be_sent(schema: Any) -> None:
    """They are remembered with their verdict, and go into the answer."""
    with pytest.raises(RefusedError) as error:
        plan(schema)
    assert len(str(error.value).encode()) < 1000
