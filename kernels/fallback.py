# SPDX-License-Identifier: Apache-2.0
"""The one warning of an op that runs its reference because its device has no fast path."""

from __future__ import annotations

import functools
import logging

# A child of the logger "vllm": inside a server its handlers print it; alone, Python's last resort does.
_logger = logging.getLogger("vllm.vllm_ext.kernels")


@functools.cache
def warn_no_fast_path(op: str, device_type: str) -> None:
    """Say it once per op and device type: the cache makes later calls silent."""
    _logger.warning(
        "vllm_ext::%s has no fast path for device %r: the float32 reference runs. It is slow and cannot "
        "be captured in a CUDA graph (use --enforce-eager)",
        op,
        device_type,
    )
