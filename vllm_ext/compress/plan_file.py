# SPDX-License-Identifier: Apache-2.0
"""Plan files: schemes that a user gives, or that `vllm-ext plan -o` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_ext.quantization.plan import FORMAT_VERSION, Plan, PlanError


def read_plan(path: Path) -> Plan:
    """A plan file: a `quantization_config` (of which only "plan" is required), or {module path: scheme} alone.

    Raises PlanError naming the file for anything else, and for a plan whose recorded hash is another.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except (OSError, ValueError) as error:
        raise PlanError(f"plan file {path} cannot be read ({error}): give a JSON file") from error
    try:
        if isinstance(value, dict) and "plan" in value:
            plan = Plan.from_config({"quant_method": "mxmoe", "version": FORMAT_VERSION, **value})
            return Plan(plan.modules, plan.ignore)
        return Plan.parse(value)
    except PlanError as error:
        raise PlanError(f"plan file {path}: {error}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values of one key the last would win without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found
