# SPDX-License-Identifier: Apache-2.0
"""Configured engines leave the pack's state in the environment; tests of other folders must not find it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vllm_ext import activation


@pytest.fixture(autouse=True, scope="module")
def restored_environment() -> Iterator[None]:
    """Withdraw what a file's engines exported when its tests are over."""
    before = set(os.environ)
    yield
    activation.withdraw_state()
    for name in [name for name in os.environ if name.startswith("VLLM_EXT") and name not in before]:
        del os.environ[name]
