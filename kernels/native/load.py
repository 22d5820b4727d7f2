# SPDX-License-Identifier: Apache-2.0
"""The compiled operators of the CPU, `torch.ops.vllm_ext_cpu`, loaded on first use.

Where they cannot be had (no compiler, a folder that cannot be written), one warning says why and what to do, and
everything runs on torch's own operators.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import torch

from .build import BuildError, build, cache_folder, find_built, find_prebuilt, require_compiler
from .recipe import LIBRARY, find_compiler, make_recipe

#: Chooses the instruction set of the kernels, or "torch" for none of them; unset: the best of this machine.
ISA_ENV = "VLLM_EXT_CPU_ISA"

#: Value of `ISA_ENV` that leaves the compiled kernels out.
TORCH_ONLY = "torch"

# A child of the logger "vllm": inside a server its handlers print it; alone, Python's last resort does.
_logger = logging.getLogger("vllm.vllm_ext.kernels")

_lock = threading.Lock()
# A child forked while another thread holds the lock would wait for ever.
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]
_tried = False
_found: Any | None = None


def load_ops(cache_dir: str | os.PathLike[str] | None = None) -> Any | None:
    """`torch.ops.vllm_ext_cpu`; None where there is none, after one warning per process.

    The first call in a process may compile for half a minute. cache_dir: as in `build.cache_folder`; only the first
    call's counts. Raises ValueError where $VLLM_EXT_CPU_ISA names no instruction set of this machine.
    """
    global _tried
    if not _tried:
        with _lock:
            if not _tried:
                _load(cache_dir)
                _tried = True
    return find_ops()


def find_ops() -> Any | None:
    """`torch.ops.vllm_ext_cpu` where this process has loaded it; None otherwise. Never compiles."""
    global _found
    # Asked in every call of an operator: a global is found sooner than a name in torch.ops.
    if _found is None and is_loaded():
        _found = getattr(torch.ops, LIBRARY)
    return _found


def is_loaded() -> bool:
    """Whether this process has the compiled operators."""
    return hasattr(getattr(torch.ops, LIBRARY), "isa")


def _load(cache_dir: str | os.PathLike[str] | None) -> None:
    isa = os.environ.get(ISA_ENV)
    if isa == TORCH_ONLY:
        _logger.info("the compiled CPU kernels are switched off: %s=%s", ISA_ENV, isa)
        return
    if not is_loaded():
        try:
            if not _load_prebuilt():
                _load_library(_build(cache_dir))
        except (BuildError, OSError) as error:
            _logger.warning("vllm-ext runs its CPU operators on torch alone, which is slower: %s", error)
            return
    if isa:
        try:
            getattr(torch.ops, LIBRARY).select_isa(isa)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{ISA_ENV}={isa!r}: {str(error).splitlines()[0]}") from error


def _load_prebuilt() -> bool:
    """Load the library of the wheel, where there is one. One that does not load here is no reason to have none."""
    library = find_prebuilt()
    if library is None:
        return False
    try:
        _load_library(library)
    except (BuildError, OSError) as error:
        # Such as: made on a system with a newer C library.
        _logger.warning("vllm-ext compiles its CPU operators, for those in the package do not load: %s", error)
        return False
    return True


def _load_library(library: Path) -> None:
    torch.ops.load_library(library)
    if not is_loaded():
        raise BuildError(f"{library} registers no operators")


def _build(cache_dir: str | os.PathLike[str] | None) -> Path:
    compiler = require_compiler()
    return build(make_recipe(compiler), compiler, cache_folder(cache_dir))


def describe_kernels(cache_dir: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """{"status", "reason"} of the compiled kernels on this machine, for people. Compiles nothing.

    status: "ready" (compiled), "pending" (the first use compiles), "off" (runs on torch alone).
    """
    if os.environ.get(ISA_ENV) == TORCH_ONLY:
        return {"status": "off", "reason": f"{ISA_ENV}={TORCH_ONLY}"}
    prebuilt = find_prebuilt()
    if prebuilt is not None:
        return {"status": "ready", "reason": f"in the package: {prebuilt.name}"}
    compiler = find_compiler()
    if compiler is None:
        return {"status": "off", "reason": "no C++ compiler: install g++, or name one in CXX"}
    try:
        folder = cache_folder(cache_dir)
        built = find_built(make_recipe(compiler), compiler, folder)
    except (BuildError, OSError) as error:
        return {"status": "off", "reason": str(error)}
    if built is not None:
        return {"status": "ready", "reason": str(built)}
    return {"status": "pending", "reason": f"compiled on first use with {compiler.version}, into {folder}"}
