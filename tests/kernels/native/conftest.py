# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels, with every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vllm_ext.kernels.native.load import load_ops
from vllm_ext.kernels.native.recipe import list_sources


@pytest.fixture(scope="session")
def ops() -> Any:
    """`torch.ops.vllm_ext_cpu`; compiled now where this machine has not done so yet."""
    loaded = load_ops()
    assert loaded is not None, "these tests need a C++ compiler (g++), as `make bootstrap` does"
    return loaded


@pytest.fixture(params=[path.stem.removeprefix("isa_") for path in list_sources()[0]])
def isa(request: pytest.FixtureRequest, ops: Any) -> Iterator[str]:
    """Each compiled instruction set in turn, then the machine's own again."""
    best = ops.isa()
    try:
        ops.select_isa(request.param)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this CPU has no {request.param}: {str(error).splitlines()[0]}")
    yield request.param
    ops.select_isa(best)
