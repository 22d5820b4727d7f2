# SPDX-License-Identifier: Apache-2.0
"""The finished configuration of an engine with structured generation: checked, and told the backend's name."""

from __future__ import annotations

import copy
from typing import Any

from vllm_ext import config
from vllm_ext.patches import registry
from vllm_ext.structured.options import read_options


def prepare_engine(vllm_config: Any) -> None:
    """Name our backend in the configuration, by which every process knows that requests are ours.

    The user's arguments keep theirs: vLLM shares the object between both. Raises config.ConfigError.
    """
    mismatch = registry.find_mismatch(registry.find_record("structured_backend"))
    if mismatch is not None:
        raise config.ConfigError(
            f"vllm_ext.structured cannot run: {mismatch}. Install a vllm-ext release for this vLLM: "
            "pip install --upgrade vllm-ext"
        )
    _add_block(vllm_config)
    read_options(vllm_config)
    own = copy.copy(vllm_config.structured_outputs_config)
    own.backend = config.STRUCTURED_BACKEND
    vllm_config.structured_outputs_config = own
    if not vllm_config.model_config.skip_tokenizer_init:
        from vllm_ext.structured import validation

        validation.close_gates()
        validation.open_gate(vllm_config)


def _add_block(vllm_config: Any) -> None:
    """Write the block into a configuration that only names the backend, so that every process reads one thing."""
    block = config.find_block(vllm_config.additional_config)
    if config.parse(block).structured is None:
        given = dict(vllm_config.additional_config or {})
        vllm_config.additional_config = {**given, "vllm_ext": {**(block or {}), "structured": {}}}
