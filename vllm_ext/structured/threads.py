# SPDX-License-Identifier: Apache-2.0
"""Threads beside the engine, which it comes before."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

#: Of threads that somebody waits for (nice), and of those that may wait for every other thread of the machine.
NICENESS, LAST = 5, 19


def start_thread(name: str, niceness: int = NICENESS) -> ThreadPoolExecutor:
    """An executor of one thread, started when it has something to do, whose priority is its own (Linux).

    It gives way no less than whoever starts it, as a process without privileges may not be asked to.
    """

    def give_way() -> None:
        thread = threading.get_native_id()
        # Where nobody may change priorities, as under some sandboxes, the thread works with the one that it has.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))

    return ThreadPoolExecutor(1, f"vllm-ext-{name}", initializer=give_way)
