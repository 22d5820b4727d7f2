# SPDX-License-Identifier: Apache-2.0
"""One signature text from source and from the live object."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

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
try:
    import module_that_does_not_exist
except ImportError:
    def fallback(a): ...
with open(__file__):
    def opened(b): ...
limit = 3
class Base:
    def inherited(self): ...
class Owner(Base):
    @staticmethod
    def fixed(a): ...
    @classmethod
    async def made(cls, a=None): ...
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
    @functools.cached_property
    def cached(self): ...
    def plain(self, *, key): ...
"""
TARGETS = {
    "conditional": "function(a/, b, c=, *rest, d!, e!=, **more)",
    "guarded": "async function(x=)",
    "Owner.fixed": "staticmethod(a)",
    "Owner.made": "async classmethod(cls, a=)",
    "Owner.size": "property",
    "Owner.cached": "property",
    "fallback": "function(a)",
    "opened": "function(b)",
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


@pytest.mark.parametrize("name", ["missing", "Owner.missing", "Missing.fixed", "Owner.inherited", "limit", "Owner"])
def test_absent_symbols(package: Path, name: str) -> None:
    target = f"signature_sample.module:{name}"
    with pytest.raises(signature.SymbolAbsentError, match=name.rpartition(".")[2]):
        signature.read_source_signature(package, target)
    with pytest.raises(signature.SymbolAbsentError):
        signature.read_live_signature(target)
    with pytest.raises(signature.SymbolAbsentError, match="no file for module"):
        signature.read_source_signature(package, "signature_sample.gone:f")


@pytest.mark.parametrize(
    "changed",
    [
        "def f(self, a, b=1): ...",
        "def f(self, b, a=1): ...",
        "def f(self, a, b): ...",
        "def f(self, a, *, b=1): ...",
        "async def f(self, a, b=1): ...",
        "@staticmethod\n    def f(self, a, b=1): ...",
    ],
)
def test_digest_sees_what_a_caller_sees(changed: str, tmp_path: Path) -> None:
    """Only the first variant is called like the original; its annotations and default value differ."""
    digests = []
    for text in ("def f(self, a: int, b: str = '') -> None: ...", changed):
        (tmp_path / "m.py").write_text(f"class C:\n    {text}\n")
        digests.append(signature.compute_digest(signature.read_source_signature(tmp_path, "root.m:C.f")))
    assert (digests[0] == digests[1]) == (changed == "def f(self, a, b=1): ...")
