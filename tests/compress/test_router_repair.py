# SPDX-License-Identifier: Apache-2.0
"""Router repair: fewer tokens change experts, never worse than before, nothing else of the checkpoint changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compress.runnable_model import (
    EXPERTS,
    add_tokenizer,
    make_tokens,
    write_random_text,
    write_runnable,
)
from vllm_ext.compress import quantize, router_repair
from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.calibration import CalibrationError, cut_windows, load_tokenizer, make_windows
from vllm_ext.compress.held_out import split_held_out
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rounders import NearestRounder
from vllm_ext.compress.router_repair import RouterRepair, repair_routers
from vllm_ext.compress.sequential import split_plan
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.quantization.checkpoint import validate_checkpoint
from vllm_ext.quantization.plan import Plan

WINDOWS = split_held_out(make_tokens(windows=24, context=32))


def make_plan(layers: tuple[int, ...], experts: int, scheme: str) -> Plan:
    return Plan.parse(
        {
            f"model.layers.{layer}.mlp.experts.{e}": {"gate_up": scheme, "down": scheme}
            for layer in layers
            for e in range(experts)
        }
    )


PLAN = make_plan((0, 2), EXPERTS, "w2a16_g32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_runnable(
        tmp_path_factory.mktemp("models") / "model", dtype=torch.bfloat16, max_position_embeddings=512
    )
    add_tokenizer(directory)
    write_random_text(directory.parent / "text.txt", 8 * 512)
    return directory


def repair(source: SourceModel, plan: Plan = PLAN, windows: Any = WINDOWS, **options: Any) -> RouterRepair:
    def read_codes(layer: Any) -> Any:
        return NearestRounder().round_layer(layer, *split_plan(source, plan, layer.index))

    return repair_routers(source, plan, read_codes, *windows, **options)


def test_the_shipped_model_keeps_more_of_its_experts(tiny_moe: str) -> None:
    """On text that the gates were not fitted to; what that is worth in loss is within the noise of so few tokens."""
    directory = Path(tiny_moe)
    tokenizer = load_tokenizer(directory)
    windows = np.concatenate(
        [cut_windows(directory / f"{kind}_train.txt", tokenizer, 128)[:16] for kind in ("kjv", "py")]
    )
    found = repair(open_source(directory), make_plan(tuple(range(5)), 16, "w2a16_g128"), split_held_out(windows))
    assert found.kept == (found.loss_after < found.loss_before)
    assert found.loss_after == pytest.approx(found.loss_before, abs=0.02)
    assert found.loss_full < found.loss_before
    assert found.changed_after < 0.9 * found.changed_before
    # Every layer sees the same tokens; the first layer's router sees nothing that is quantized.
    assert found.layers[0].changed_before == 0
    assert found.layers[0].changed == 0
    assert found.tokens == 8 * 128
    assert set(found.gates) <= {f"model.layers.{layer}.mlp.gate.weight" for layer in range(1, 5)}
    assert all(gate.dtype == torch.bfloat16 for gate in found.gates.values())
    assert "before" in found.describe()


@pytest.mark.parametrize("method", ["least squares", "divergence"])
def test_a_fit_undoes_what_is_linear(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 16, generator=generator)
    gate = torch.randn(8, 16, generator=generator)
    bent = inputs @ (torch.eye(16) + 0.08 * torch.randn(16, 16, generator=generator))
    fitted = router_repair._fit_gates(gate, bent, inputs)[method]

    def choose(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ weight.T).topk(2).indices.sort(-1).values

    wanted = choose(gate, inputs)
    before = float((choose(gate, bent) != wanted).any(-1).float().mean())
    after = float((choose(fitted, bent) != wanted).any(-1).float().mean())
    assert before > 0.2
    assert after < 0.15 * before


def test_worse_gates_are_not_taken(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_repair, "_fit_gates", lambda old, *_: {"least squares": -old})
    found = repair(open_source(model))
    assert [layer.method for layer in found.layers] == ["none", "none"]
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert found.changed_after == found.changed_before
    assert not found.kept
    assert found.loss_after == found.loss_before
    assert "not better, so the gates are left as they are" in found.describe()


def test_gates_that_raise_the_loss_are_dropped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((1.0, 1.2, 1.3))
    monkeypatch.setattr(router_repair.LayerStream, "loss", lambda *_: next(losses))
    found = repair(open_source(model))
    assert any(layer.method != "none" for layer in found.layers)
    assert found.gates == {}
    assert (found.loss_full, found.loss_before, found.loss_after) == (1.0, 1.2, 1.3)


def test_a_finished_repair_is_read_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((1.0, 1.3, 1.2))
    monkeypatch.setattr(router_repair.LayerStream, "loss", lambda *_: next(losses))
    cache = StageCache(tmp_path, {"of": "this test"})
    first = repair(open_source(model), cache=cache)
    monkeypatch.setattr(router_repair, "LayerStream", lambda *_: pytest.fail("nothing is to be run"))
    again = repair(open_source(model), cache=cache)
    assert first.kept
    assert again.layers == first.layers
    assert again.to_json() == first.to_json()
    assert set(again.gates) == set(first.gates)
    assert all(torch.equal(gate, first.gates[name]) for name, gate in again.gates.items())


def test_without_held_out_windows(model: Path) -> None:
    with pytest.raises(ValueError, match="router repair needs windows to fit with and windows held out"):
        repair(open_source(model), windows=(WINDOWS[0], WINDOWS[1][:0]))


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_only_gates_change(model: Path, tmp_path: Path, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = [model.parent / "text.txt"]
    arguments: dict[str, Any] = {"plan": PLAN, "rounding": rounding, "calibration": text}
    windows = make_windows(text, load_tokenizer(model))
    used, held = split_held_out(windows)
    assert len(held)
    # What judges the gates, no code was chosen with.
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "make_windows", lambda *_, **__: used)
        quantize_model(model, tmp_path / "plain", **arguments)
    # Random text says nothing of what is better: the loss is made to fall.
    losses = iter((1.0, 1.3, 1.2))
    monkeypatch.setattr(router_repair.LayerStream, "loss", lambda *_: next(losses))
    # Nor do few random tokens: whatever is fitted is taken as nearer than the old gate.
    distances = itertools.count(start=100, step=-1)
    monkeypatch.setattr(router_repair, "_compare", lambda *_: (float(next(distances)), 0.5))
    report = quantize_model(model, tmp_path / "repaired", repair_router=True, **arguments)
    assert report.repair is not None
    assert report.to_json()["router_repair"]["kept"]
    plain, repaired = (validate_checkpoint(tmp_path / name) for name in ("plain", "repaired"))
    assert repaired.plan.producer["router_repair"] is True
    assert plain.reader.infos == repaired.reader.infos
    different = {
        name for name in plain.reader.infos if not torch.equal(plain.reader.read(name), repaired.reader.read(name))
    }
    # The first router sees nothing quantized: its fit is the gate it had.
    assert different == {"model.layers.2.mlp.gate.weight"}
    assert "routers are fitted anew" in (tmp_path / "repaired" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "repaired"]


class Killed(BaseException):
    """What no code of the package catches."""


def test_killed_in_the_repair(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {
        "plan": PLAN, "rounding": "gptq", "calibration": [model.parent / "text.txt"], "repair_router": True
    }  # fmt: skip
    quantize_model(model, tmp_path / "whole", **arguments)

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(router_repair, "_compare", kill)
        with pytest.raises(Killed):
            quantize_model(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    quantize_model(model, tmp_path / "out", **arguments)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_repair_needs_text(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--repair-router needs calibration text: give --calibration FILE"):
        quantize_model(model, tmp_path / "out", plan=PLAN, repair_router=True)
    assert list(tmp_path.iterdir()) == []
