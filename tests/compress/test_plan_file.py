# SPDX-License-Identifier: Apache-2.0
"""Plan files that cannot be read, by message; `test_quantize` reads one that was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ext.compress.plan_file import read_plan
from vllm_ext.quantization.plan import PlanError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "must map module paths to schemes"),
        ('{"a": "w4a16_g64", "a": "w3a16_g64"}', "a is given twice"),
        ('{"a": "w4a16_g99"}', r"plan\.json: a: scheme 'w4a16_g99'"),
        ('{"plan": {"a": "w4a16_g64"}, "version": 3}', "version 3"),
        ('{"plan": {"a": "w4a16_g64"}, "version": 1, "plan_sha256": "00"}', "plan_sha256 is '00'"),
    ],
)
def test_bad_plan_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.json")
