# SPDX-License-Identifier: Apache-2.0
"""The training script: the same split and tokens every time, and an interrupted run that ends like a whole one."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.models import train_tiny_moe as script


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What `prepare` makes of a Bible of 40 chapters and a library of 40 files."""
    rng = random.Random(0)
    sentence = "and the LORD said unto Moses go in before king of Egypt speak people that they may serve me"
    words = sentence.split()
    verses = [f"Ge{c}:{v} {' '.join(rng.choices(words, k=25))}." for c in range(1, 41) for v in range(1, 9)]
    (tmp_path / "kjv.txt").write_text("BRS Release\n" + "\n".join(verses) + "\n\n", encoding="latin-1")
    library = tmp_path / "lib"
    for folder in ("package", "test", "site-packages"):
        (library / folder).mkdir(parents=True)
    for index in range(40):
        body = "".join(f"def {rng.choice(words)}_{i}(self, x):\n    return x + {i}\n\n" for i in range(80))
        (library / "package" / f"module_{index:02}.py").write_text(body)
    (library / "package" / "short.py").write_text("x = 1\n")
    for skipped in ("test", "site-packages"):
        (library / skipped / "skipped.py").write_text("skipped = 1\n" * 400)
    output = tmp_path / "data"
    arguments = ["--kjv", str(tmp_path / "kjv.txt"), "--python-root", str(library), "--vocab-size", "400"]
    assert script.main(["prepare", *arguments, "-o", str(output)]) == 0
    return output


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 4, "moe_intermediate_size": 16}
    monkeypatch.setattr(script, "ARCHITECTURE", {**script.ARCHITECTURE, **sizes})
    monkeypatch.setattr(script, "BATCH_SIZE", 2)
    monkeypatch.setattr(script, "SEQUENCE_LENGTH", 32)
    monkeypatch.setattr(script, "VALIDATION_SEQUENCES", 4)


def test_prepare_splits_by_document(data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data)
    assert len(tokenizer) == 400
    for domain in script.DOMAINS:
        train = (data / f"{domain}_train.txt").read_text().split("\n\n" if domain == "kjv" else "\n\n\n\n")
        held_out = (data / f"{domain}_val.txt").read_text().split("\n\n" if domain == "kjv" else "\n\n\n\n")
        assert (len(train), len(held_out)) == (38, 2)
        assert not set(train) & set(held_out)
        ids = np.load(data / f"{domain}_val.npy")
        assert (ids == script.BOS_ID).sum() == (ids == script.EOS_ID).sum() == 2
        assert "".join(held_out[0].split()) in "".join(tokenizer.decode(ids).split())
    assert "skipped" not in (data / "py_train.txt").read_text() + (data / "py_val.txt").read_text()


def test_interrupted_training_ends_like_a_whole_run(
    data: Path,
    tmp_path: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.train(data, tmp_path / "whole", steps=6, minutes=None, seed=1, device="cpu")
    # A clock that moves a second whenever it is read: the time is over after two of the six steps.
    with monkeypatch.context() as context:
        context.setattr(script, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        assert not script.train(data, tmp_path / "parts", steps=6, minutes=4 / 60, seed=1, device="cpu")
    assert "goes on from step 2" in capsys.readouterr().err
    assert script.train(data, tmp_path / "parts", steps=6, minutes=None, seed=1, device="cpu")
    assert "step 2 of 6" in capsys.readouterr().err
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    assert whole["model.norm.weight::step"] == 6
    assert (whole["model.norm.weight"] != 1).all()
    served = load_file(tmp_path / "whole" / "model.safetensors")
    assert served["model.layers.0.mlp.experts.3.down_proj.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r'made with .*"steps": 6.*"steps": 7'):
        script.train(data, tmp_path / "parts", steps=7, minutes=None, seed=1, device="cpu")


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("no verses\n")
    assert script.main(["prepare", "--kjv", str(empty), "-o", str(tmp_path / "data")]) == 1
    assert "has no line such as" in capsys.readouterr().err
    assert script.main(["train", "--data", str(tmp_path), "-o", str(tmp_path / "model")]) == 1
    assert "kjv_train.npy is missing; run `prepare" in capsys.readouterr().err
    with pytest.raises(ValueError, match="10 documents are too few"):
        script.split_documents(["text"] * 10, random.Random(0))
