# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the shipped model, and an environment in which vLLM starts small and offline."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before any test imports vLLM, which reads them at import; engines in child processes inherit them.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test files run at once: threads that spin while they wait would take the other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machines that run these tests are shared and noisy: how long an example takes says nothing about the code.
# "repeat" draws the same examples every time, so that a commit is green or red wherever it runs; "explore" draws new
# ones: `make test-explore` sets it, and what it finds becomes an @example.
_shared_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeat", _shared_machine, derandomize=True, database=None)
settings.register_profile("explore", _shared_machine)
settings.load_profile(os.environ.get("VLLM_EXT_EXAMPLES", "repeat"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: at the end of a parallel run they would leave one core idle."""
    engine_files = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in engine_files)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors of these tests are small: on a shared machine a thread barrier costs more than the work."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_moe() -> str:
    """Directory of the shipped trained MoE."""
    return str(REPOSITORY / "bench" / "models" / "tiny_moe")


@pytest.fixture
def engine_in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`vllm.LLM` without processes of its own, each of which imports vLLM for ten seconds."""
    before = dict(os.environ)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # An n-gram engine or a trie of another test may have left numba behind. vLLM's CPU worker looks into every module
    # when it starts, and fails at this one (vllm/triton_utils/dispatcher.py, 0.32).
    monkeypatch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
    import torch

    num_threads = torch.get_num_threads()
    yield
    # MKL's number belongs to the process, and lanes set it in their threads; torch.set_num_threads is vLLM's by now.
    torch._C.set_num_threads(num_threads)
    # vLLM notes things of its own in the environment, which the engines of later tests would inherit.
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


class Recorder(logging.Handler):
    """Keeps the text of every record."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the pack logs; its logger is tapped directly, since vLLM's set-up stops propagation to the root."""
    logger, recorder = logging.getLogger("vllm.vllm_ext"), Recorder()
    logger.addHandler(recorder)
    yield recorder.texts
    logger.removeHandler(recorder)
