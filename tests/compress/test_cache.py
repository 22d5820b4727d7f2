# SPDX-License-Identifier: Apache-2.0
"""Stored results come back whole, under their own key alone, and never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compress.runnable_model import write_runnable
from tests.compress.small_model import edit_tensors, write_model
from vllm_ext.compress import cache as cache_module
from vllm_ext.compress.cache import StageCache, hash_array, hash_source
from vllm_ext.compress.rotation import rotate_source
from vllm_ext.compress.source import open_source


def test_tensors_arrays_and_json_come_back(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, {"model": "a"})
    assert cache.load("nothing") is None
    codes = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    cache.store("layer-0", {"codes": codes, "errors": np.array([0.5, np.inf])})
    cache.store("single", np.arange(4, dtype=np.int64))
    cache.store("record", {"tokens": 3, "names": ["a", "b"]})
    again = StageCache(tmp_path, {"model": "a"})
    found = again.load("layer-0")
    assert torch.equal(found["codes"], codes)
    assert found["errors"].tolist() == [0.5, float("inf")]
    assert again.load("single").tolist() == [0, 1, 2, 3]
    assert again.load("record") == {"tokens": 3, "names": ["a", "b"]}


@given(st.recursive(st.integers() | st.text() | st.booleans(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_value(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    cache = StageCache(tmp_path_factory.mktemp("cache"), {})
    cache.store("value", value)
    assert cache.load("value") == value


def test_another_key_sees_nothing(tmp_path: Path) -> None:
    first = StageCache(tmp_path, {"seed": 0, "windows": "x"})
    first.store("layer", 1)
    assert StageCache(tmp_path, {"windows": "x", "seed": 0}).load("layer") == 1
    assert StageCache(tmp_path, {"seed": 1, "windows": "x"}).load("layer") is None
    assert json.loads((first.folder / "key.json").read_text())["seed"] == 0
    first.store("other", 2)
    first.discard("layer")
    assert (first.load("layer"), first.load("other")) == (None, 2)
    first.remove()
    assert first.load("other") is None


def test_what_is_there_without_reading_it(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, {})
    cache.store("tensor", torch.zeros(2))
    cache.store("value", [1])
    assert [cache.has(name) for name in ("tensor", "value", "other")] == [True, True, False]


def test_scratch_of_killed_processes_is_cleared(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, {})
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = (cache.folder / f"activations-{process}" for process in (int(done.stdout), os.getppid()))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "0.safetensors").write_bytes(b"x")
    with cache.make_scratch("activations") as scratch:
        assert scratch.parent == cache.folder
        assert list(scratch.iterdir()) == []
        (scratch / "file").write_bytes(b"x")
    assert (dead.exists(), alive.exists(), scratch.exists()) == (False, True, False)


def test_a_kill_while_writing_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(tmp_path, {})
    cache.store("layer", {"a": torch.zeros(3)})
    files = sorted(path.name for path in cache.folder.iterdir())

    def die(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            cache.store("layer", {"a": torch.ones(3)})
    assert torch.equal(cache.load("layer")["a"], torch.zeros(3))
    assert sorted(path.name for path in cache.folder.iterdir()) == files


@pytest.mark.parametrize("name", ["layer.safetensors", "record.json"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, name: str) -> None:
    cache = StageCache(tmp_path, {})
    cache.store("layer", torch.arange(10))
    cache.store("record", {"a": 1})
    path = cache.folder / name
    path.write_bytes(path.read_bytes()[:-5])
    assert cache.load(path.stem) is None
    cache.store(path.stem, 5)
    assert StageCache(tmp_path, {}).load(path.stem) == 5


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, {})
    with pytest.raises(TypeError, match="tensors and other values"):
        cache.store("mixed", {"a": torch.zeros(1), "b": 3})
    with pytest.raises(TypeError, match="store a value"):
        cache.store("none", None)
    for name in ("", "../other", "a/b", "key"):
        with pytest.raises(ValueError, match="plain file name"):
            cache.store(name, 1)
    assert not cache.folder.exists()


def test_hashes_follow_the_content(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    first = hash_source(open_source(directory))
    assert hash_source(open_source(write_model(tmp_path / "copy"))) == first
    edit_tensors(directory, model__norm__weight=torch.zeros(128))
    assert hash_source(open_source(directory)) != first
    source = open_source(write_runnable(tmp_path / "runnable"))
    assert len({hash_source(source), hash_source(rotate_source(source, 0)), hash_source(rotate_source(source, 1))}) == 3
    values = np.arange(6)
    assert hash_array(values) == hash_array(values.copy())
    assert hash_array(values) != hash_array(values.reshape(2, 3))
    assert hash_array(values) != hash_array(values.astype(np.int32))
