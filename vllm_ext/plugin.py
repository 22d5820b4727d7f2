# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point. vLLM calls `register` in every one of its processes."""

from __future__ import annotations

import logging

# A child of the logger "vllm", so that messages pass through vLLM's own handler and format.
logger = logging.getLogger("vllm.vllm_ext")

_registered = False


def register() -> None:
    """Register the pack's names with vLLM, install the configuration hook, and apply what the parent asked for.

    Idempotent, and nothing is raised: an exception that leaves a vLLM plugin kills the process,
    servers of models that do not use the pack included. `vllm-ext doctor` shows what went wrong.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm_ext import activation

        activation.activate()
    except Exception:
        logger.warning("vllm-ext is not active; `vllm-ext doctor` tells why", exc_info=True)
