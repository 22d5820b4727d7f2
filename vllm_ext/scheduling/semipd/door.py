# SPDX-License-Identifier: Apache-2.0
"""`admission: refuse`: prompts that would be late are refused where they come in, in the API process.

vLLM refuses there already, with 503 and a sentence of its own, who comes in while `max_num_queued_tokens` prompt tokens
wait, and reads that number at every request. The scheduler's process writes the controller's limit into the metrics;
here a thread keeps vLLM's number at it.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Any

from vllm_ext import observability

logger = logging.getLogger("vllm.vllm_ext")

#: Seconds between two looks; the controller decides once a second.
PERIOD = 0.25


def follow_limit(vllm_config: Any) -> threading.Thread | None:
    """Keep `max_num_queued_tokens` of this configuration at the controller's limit while the configuration lives.

    A number of the user's stays the upper bound. Returns the thread; None where metrics cannot be written.
    """
    directory = os.environ.get(observability.DIRECTORY_ENV)
    if directory is None:
        logger.warning("vllm-ext refuses no prompts (semipd.admission): the engine's metrics cannot be read")
        return None
    scheduler_config = vllm_config.scheduler_config
    thread = threading.Thread(
        target=_follow,
        args=(weakref.ref(scheduler_config), scheduler_config.max_num_queued_tokens, directory),
        name="vllm-ext-door",
        daemon=True,
    )
    thread.start()
    return thread


def read_limit(directory: str, given: int | None) -> int | None:
    """Prompt tokens that may wait: the controller's limit and the user's, whichever is less; None for any number."""
    limits = [
        int(value)
        for (_, name), value in observability.read_records(directory).items()
        if name == "vllm_ext:semipd_max_queued_tokens" and value > 0
    ]
    return min(limits + ([] if given is None else [given]), default=None)


def _follow(reference: weakref.ref[Any], given: int | None, directory: str) -> None:
    pause = threading.Event()
    # The directory goes with the server.
    while os.path.isdir(directory):
        scheduler_config = reference()
        if scheduler_config is None:
            return
        scheduler_config.max_num_queued_tokens = read_limit(directory, given)
        del scheduler_config
        pause.wait(PERIOD)
