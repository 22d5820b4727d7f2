# SPDX-License-Identifier: Apache-2.0
"""Damaged configs, plans and headers, several hundred of each: an error that names the place, or the same weights.

What no reader can see is left out: the bytes of a tensor's data, and the type and shape of tensors that the plan does
not name, which vLLM compares with its own parameters.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compress.small_model import make_tensors, write_model
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.checkpoint import read_module, unpack_weight, validate_checkpoint
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.safetensors_io import INDEX_FILE, CheckpointError, read_header
from vllm_ext.quantization.scheme import Scheme, list_schemes

CASES = 500
#: Far beyond what any of them takes, far below a hang.
SECONDS = 5.0

#: Keys of config.json that say which tensors there are, beside those that experts are compared with.
OF_ALL_LAYERS = ("num_hidden_layers", "tie_word_embeddings")

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**30, -(10**18), 0.5, float("nan"), float("inf"), "", "x", "w4a16_g64", "w3a8",
    "\u0000", "😀" * 50, [], [0], ["x"], [[[[]]]], {}, {"gate_up": "w4a16_g32"}, {"": ""}, {"plan": {}}, "experts.0",
)  # fmt: skip


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside of a JSON value, its own left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found += [(*path, key), *list_places(item, (*path, key))]
    return found


def mutate_json(value: Any, generator: random.Random, allowed: Callable[[tuple[Any, ...]], bool]) -> Any:
    """A copy with one value replaced, removed, renamed or doubled somewhere."""
    value = copy.deepcopy(value)
    places = [place for place in list_places(value) if allowed(place)]
    *parents, key = generator.choice(places)
    parent = value
    for step in parents:
        parent = parent[step]
    action = generator.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        text = str(key)
        cut = generator.randrange(len(text) + 1)
        parent[text[:cut] + generator.choice(["", "x", ".", "0", "é"]) + text[cut + 1 :]] = parent.pop(key)
    elif action == 2 and isinstance(parent[key], str) and parent[key]:
        text = parent[key]
        cut = generator.randrange(len(text))
        parent[key] = text[:cut] + generator.choice("0123456789agswx_-") + text[cut + 1 :]
    elif action == 3 and isinstance(parent[key], int):
        parent[key] += generator.choice([-1, 1, 8, -8, 2**31])
    else:
        parent[key] = copy.deepcopy(generator.choice(ODD_VALUES))
    return value


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    model = write_model(folder / "model", make_tensors(dense_layer=1))
    attention = {f"model.layers.0.self_attn.{name}_proj": "w3a8_g32" for name in "qkv"}
    modules = {
        f"model.layers.0.mlp.experts.{e}": {"gate_up": gate_up, "down": down}
        for e, (gate_up, down) in enumerate(
            [
                ("w2a16_g32", "w4a16_g64_sym"),
                ("w3a8_g64", "w16a16"),
                ("w8a16_g-1", "w5a16_g32"),
                ("w6a8_g32", "w3a8_g-1"),
            ]
        )
    }
    plan = Plan.parse({**attention, **modules, "model.layers.1.mlp.down_proj": "w4a16_g32"})
    quantize_model(model, folder / "packed", plan=plan, shard_bytes=100_000)
    return folder / "packed"


def dequantize_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight of the plan, by path, and the other tensors."""
    checkpoint = validate_checkpoint(directory)
    found = {}
    for module, schemes in checkpoint.plan.modules.items():
        for path, tensors in read_module(checkpoint, module).items():
            scheme = schemes
            if isinstance(schemes, ExpertSchemes):
                scheme = schemes.down if path.endswith("down_proj") else schemes.gate_up
            assert isinstance(scheme, Scheme)
            found[path] = unpack_weight(tensors, scheme)
    for name in checkpoint.plan.producer.get("other_tensors", ()):
        found[name] = checkpoint.reader.read(name)
    return found


class Outcomes:
    """Runs a damaged directory again and again, and counts what became of it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.expected = directory, dequantize_all(directory)
        self.refused = self.unharmed = 0

    def check(self, case: str) -> None:
        begun = time.monotonic()
        try:
            found = dequantize_all(self.directory)
        except (CheckpointError, PlanError):
            self.refused += 1
        else:
            missing = self.expected.keys() - found.keys()
            # What the plan no longer lists as "other" is merely not read here.
            assert not {name for name in missing if not name.endswith(".weight")}, case
            assert all(torch.equal(found[name], self.expected[name]) for name in found), case
            self.unharmed += 1
        assert time.monotonic() - begun < SECONDS, case


def copy_packed(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def test_configs_and_plans(packed: Path, tmp_path: Path) -> None:
    directory = copy_packed(packed, tmp_path)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    outcomes, generator = Outcomes(directory), random.Random(0)

    def is_ours(place: tuple[Any, ...]) -> bool:
        # A plan without its hash may be changed at will; sizes of the model are compared where experts need them.
        if place[0] != "quantization_config":
            return place[0] in ("num_experts", "hidden_size", "moe_intermediate_size", *OF_ALL_LAYERS)
        return len(place) > 1 and place[:3] != ("quantization_config", "producer", "other_tensors")

    for number in range(CASES):
        damaged = mutate_json(config, generator, is_ours)
        path.write_text(json.dumps(damaged))
        outcomes.check(f"case {number}")
    assert outcomes.refused > 0.6 * CASES
    for number in range(CASES // 5):
        text = bytearray(json.dumps(config).encode())
        place = generator.randrange(text.index(b"quantization_config"), len(text))
        text[place : place + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        path.write_bytes(text)
        outcomes.check(f"text {number}")


def test_headers_and_indices(packed: Path, tmp_path: Path) -> None:
    directory = copy_packed(packed, tmp_path)
    outcomes, generator = Outcomes(directory), random.Random(1)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    planned = (".qweight", ".scales", ".zeros")
    with_codes = [path for path in files if any(name.endswith(planned) for name in read_header(path)[0])]
    index = directory / INDEX_FILE
    for number in range(CASES):
        if number % 10 == 0:
            content = index.read_text()
            index.write_text(
                json.dumps(mutate_json(json.loads(content), generator, lambda place: place[0] != "metadata"))
            )
            outcomes.check(f"index {number}")
            index.write_text(content)
            continue
        path = generator.choice(files if number % 4 < 2 else with_codes)
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        kind = number % 4
        if kind == 0:
            cut = generator.randrange(len(data) + 1)
            damaged = data[:cut] + (b"" if generator.random() < 0.5 else generator.randbytes(9))
        elif kind == 1:
            damaged = (
                struct.pack("<Q", generator.choice([0, 1, length - 1, length + 1, 2**63, 2**32, 10**8])) + data[8:]
            )
        else:
            changed = mutate_json(header, generator, lambda place: str(place[0]).endswith(planned))
            text = json.dumps(changed).encode()
            damaged = struct.pack("<Q", len(text)) + text + data[8 + length :]
        path.write_bytes(damaged)
        outcomes.check(f"header {number}")
        path.write_bytes(data)
    assert outcomes.refused > 0.9 * CASES
    outcomes.check("restored")


def test_plan_files() -> None:
    """A plan alone: parsed to itself, or refused by name."""
    generator = random.Random(2)
    names = list_schemes()
    modules: dict[str, Any] = {"model.layers.0.self_attn.o_proj": "w4a16_g64"}
    modules |= {f"model.layers.0.mlp.experts.{e}": {"gate_up": names[7 * e], "down": names[11 * e]} for e in range(4)}
    config = Plan.parse(modules, ("lm_head",)).to_config()
    original, refused = Plan.from_config(config), 0
    for number in range(CASES):
        damaged = mutate_json(config, generator, lambda place: True)
        try:
            plan = Plan.from_config(damaged)
        except PlanError:
            refused += 1
        else:
            # The hash holds the plan; without the hash, what was written is what is read.
            if damaged.get("plan_sha256") is not None:
                assert plan.modules == original.modules, number
            assert plan.to_json() == damaged["plan"]
    assert refused > 0.7 * CASES


def test_sources(tmp_path: Path) -> None:
    """The config.json of an unquantized model: opened as it was, or refused by name."""
    model = write_model(tmp_path / "model")
    path, generator = model / "config.json", random.Random(3)
    config = json.loads(path.read_text())
    expected, refused = set(open_source(model).modules), 0
    for number in range(CASES // 2):
        path.write_text(json.dumps(mutate_json(config, generator, lambda place: True)))
        begun = time.monotonic()
        try:
            found = set(open_source(model).modules)
        except CheckpointError:
            refused += 1
        else:
            assert found == expected, number
        assert time.monotonic() - begun < SECONDS
    assert refused > CASES // 20
