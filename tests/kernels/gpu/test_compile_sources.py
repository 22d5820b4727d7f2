# SPDX-License-Identifier: Apache-2.0
"""The hash that tells whether a compiled kernel is the one in the tree."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

from bench.kernels.compile_sources import LENGTH, hash_kernel, normalize

BASE = """
import triton

IS_OLD = int(triton.__version__.split(".")[0]) < 2
"""

MODULE = """
import triton
import triton.language as tl

from .base import IS_OLD

STEP = tl.constexpr(3)
CHOICE = tl.constexpr(5 if IS_OLD else 7)
UNUSED = tl.constexpr(1)


@triton.jit
def add_step(value):
    return value + STEP + CHOICE


@triton.jit
def add_kernel(target, SIZE: tl.constexpr):
    \"\"\"Adds.\"\"\"
    place = target + tl.arange(0, SIZE)
    tl.store(place, add_step(tl.load(place)))
"""

NUMBERS = itertools.count()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: the text of a module -> the hash of its kernel."""
    from vllm_ext.kernels.gpu.shipped import Shipped

    def load(name: str, text: str) -> Any:
        # Told apart by their path, with one name, as a file that was edited is.
        path = tmp_path / f"{next(NUMBERS)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    def make(text: str, base: str = BASE, **changes: Any) -> str:
        load("vllm_ext.kernels.made.base", base)
        module = load("vllm_ext.kernels.made.kernel", text)
        signature = {"target": "*i32", "SIZE": "constexpr"}
        shipped = Shipped("add", module.add_kernel, signature, {"SIZE": 4}, ("target",), 4)
        return hash_kernel(replace(shipped, **changes))

    monkeypatch.setitem(sys.modules, "vllm_ext.kernels.made", types.ModuleType("vllm_ext.kernels.made"))
    return make


def test_what_a_kernel_is_made_of_changes_its_hash(made: Any) -> None:
    known = made(MODULE)
    assert len(known) == LENGTH
    edits = [
        ("value + STEP", "value - STEP"),
        ("place = target + tl", "place = target + 1 + tl"),
        ("constexpr(3)", "constexpr(4)"),
        ("5 if IS_OLD", "6 if IS_OLD"),
    ]
    hashes = {made(MODULE.replace(before, after)) for before, after in edits}
    assert len(hashes - {known}) == len(edits)
    assert made(MODULE, BASE.replace("< 2", "< 1")) != known
    assert made(MODULE, constants={"SIZE": 8}) != known
    assert made(MODULE, num_warps=8) != known
    assert made(MODULE, divisible=()) != known


def test_what_says_nothing_leaves_the_hash(made: Any) -> None:
    known = made(MODULE)
    edits = [
        ("return value", "# A reason.\n    return value"),
        ("Adds.", "Adds two numbers."),
        ("UNUSED = tl.constexpr(1)", "UNUSED = tl.constexpr(2)"),
        ("(target, SIZE: tl.constexpr)", "(\n    target,\n    SIZE: tl.constexpr,\n)"),
        ("import triton\n", "import triton\n\n\n"),
    ]
    assert {made(MODULE.replace(before, after)) for before, after in edits} == {known}


def test_a_constant_that_goes_by_the_compiler_is_one_for_all(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = made(MODULE)
    monkeypatch.setattr("triton.__version__", "1.0.0")
    assert made(MODULE) == known


def test_python_is_compared_without_its_form() -> None:
    one = 'def f(a, b):\n    """Text."""\n    return [a, b]  # Why.\n'
    other = "def f(\n    a,\n    b,\n):\n    return [\n        a,\n        b,\n    ]\n"
    assert normalize(one) == normalize(other)
    assert normalize(one) != normalize(one.replace("[a, b]", "[b, a]"))
    # A text that is a value is none of a docstring.
    assert normalize('x = "one"\n') != normalize('x = "two"\n')
