# SPDX-License-Identifier: Apache-2.0
"""Options that make no sense, alone or together, by message."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext.compress.plan_options import PlanOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "fisher"}, "unknown measure 'fisher' of sensitivity; known: weight, layer, loss"),
        ({"exponent": 2.0, "per_layer": True}, "from 0 to 1, got 2"),
        ({"exponent": 0.5}, "belongs to the allocation per layer"),
        ({"per_layer": True, "time_weight": 1.0}, "weighs time by its exponent"),
        ({"time_weight": -1.0}, "must not be negative, got -1"),
        ({"exact": True, "max_time_us": 1.0}, "without a limit of time alone"),
        ({"max_time_us": 0.0}, "must be positive, got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**options)
