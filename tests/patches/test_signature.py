# SPDX-License-Identifier: Apache-2.0
"""One signature text from source and from the live object."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.patches import signature

SOURCE = """
import functools
if True:
    def conditional(a, /, b, c=1, *rest, d, e=2, **more): ...
else:
    pass
try:
    async def guarded(x: "int" = 3) -> None: ...
except ImportError:
    def guarded(): ...
class Owner:
    @staticmethod
    def fixed(a): ...
    @classmethod
    async def made(cls, a=None): ...
    @property
    def size(self): ...
    def plain(self, *, key): ...
"""
TARGETS = {
    "conditional": "function(a/, b, c=, *rest, d!, e!=, **more)",
    "guarded": "async function(x=)",
    "Owner.fixed": "staticmethod(a)",
    "Owner.made": "async classmethod(cls, a=)",
    "Owner.size": "property",
    "Owner.plain": "function(self, key!)",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "signature_sample"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield root
    for name in [name for name in sys.modules if name.startswith("signature_sample")]:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "expected"), TARGETS.items())
def test_source_and_live_agree(package: Path, name: str, expected: str) -> None:
    target = f"signature_sample.module:{name}"
    assert signature.read_source_signature(package, target) == expected
    assert signature.read_live_signature(target) == expected


@pytest.mark.parametrize("name", ["missing", "Owner.missing", "Missing.fixed"])
def test_absent_symbols(package: Path, name: str) -> None:
    target = f"signature_sample.module:{name}"
    with pytest.raises(signature.SymbolAbsentError, match=name.rpartition(".")[2]):
        signature.read_source_signature(package, target)
    with pytest.raises(signature.SymbolAbsentError):
        signature.read_live_signature(target)
    with pytest.raises(signature.SymbolAbsentError, match="no file for module"):
        signature.read_source_signature(package, "signature_sample.gone:f")


names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)


@given(names, names)
def test_digest_changes_with_the_parameters(left: list[str], right: list[str]) -> None:
    texts = [f"function({', '.join(parameters)})" for parameters in (left, right)]
    assert (signature.compute_digest(texts[0]) == signature.compute_digest(texts[1])) == (left == right)
