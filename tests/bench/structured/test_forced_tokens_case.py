# SPDX-License-Identifier: Apache-2.0
"""The benchmark of forced tokens, with engines that answer by rote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bench.records import read_record
from bench.structured import forced_tokens
from bench.structured.schemas import PROMPTS, SCHEMAS


def test_schemas_are_many_and_bounded() -> None:
    assert len(SCHEMAS) >= 30
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for string in find_strings(schema):
            # The shipped model would not end a free string.
            assert {"maxLength", "pattern"} & set(string), name
    assert sum("$defs" in schema for schema in SCHEMAS.values()) >= 3


def find_strings(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for item in node for found in find_strings(item)]
    if not isinstance(node, dict):
        return []
    own = [node] if node.get("type") == "string" else []
    return own + [found for value in node.values() for found in find_strings(value)]


class Engine:
    """Stock takes a step for a token; the pack a step for two once it knows a pass, and writes something else once."""

    made: dict[str, Engine] = {}  # noqa: RUF012

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self.made[arm] = self
        self.asked: list[Any] = []
        self.features = {"arm": arm}
        self.is_stopped = False

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "forget":
            self.asked.append(None)
            return None
        assert method == "generate"
        return self.generate(*arguments)

    def generate(self, prompts: list[str], schemas: list[Any], tokens: int) -> dict[str, Any]:
        if tokens == forced_tokens.MAX_TOKENS:
            self.asked += [(len(prompts), *pair) for pair in zip(prompts, map(json.dumps, schemas), strict=True)]
        assert len(prompts) == len(schemas)
        length = tokens if schemas[0] is None or tokens == forced_tokens.CPU_TOKENS else 10
        output = [[len(prompt)] * length for prompt in prompts]
        if tokens == 1:
            output = [[1] for _ in prompts]
        elif self.arm == "pack" and length == 10:
            # Two tokens a step; the first of every call is another one.
            output[0] = [1]
        steps = length // 2 if self.arm == "pack" else length
        cost = 2 if schemas[0] is not None else 1
        return {
            "tokens": output, "finished": [True] * len(prompts), "steps": steps, "seconds": 0.1, "cpu_seconds": cost,
        }  # fmt: skip

    def stop(self) -> None:
        self.is_stopped = True


def test_records_say_what_the_engines_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forced_tokens, "Engine", Engine)
    assert forced_tokens.main(["--repetitions", "2", "--schemas", "10", "--out", str(tmp_path)]) == 0
    pack = read_record(tmp_path / "structured_forced" / "pack-1.json")
    assert pack.metrics["steps_batch_1"].value == 10 * 5
    assert pack.metrics["steps_batch_8"].value == 2 * 5
    assert pack.metrics["steps_ratio_median_batch_1"].value == 0.5
    assert pack.metrics["identical_batch_8"].value == 8
    assert pack.metrics["identical_known_batch_8"].value == 8
    assert pack.features == {"arm": "pack"}
    stock = read_record(tmp_path / "structured_forced" / "stock-0.json")
    assert stock.metrics["identical_batch_8"].value == stock.metrics["requests_batch_8"].value == 10
    assert not (tmp_path / "structured_forced" / "pack-masks-0.json").exists()
    cpu = read_record(tmp_path / "structured_cpu" / "stock-0.json")
    assert cpu.metrics["cpu_ratio"].value == 2.0
    assert cpu.metrics["cpu_unconstrained"].value == pytest.approx(1e6 / (32 * 64))
    assert "/" not in json.dumps(cpu.settings)


def test_every_pass_has_prompts_of_its_own_and_the_first_of_two_is_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forced_tokens, "Engine", Engine)
    most = len(PROMPTS) // 4
    arguments = ["--case", "structured_forced", "--schemas", "9", "--out", str(tmp_path)]
    assert forced_tokens.main([*arguments, "--repetitions", str(most)]) == 0
    asked = Engine.made["pack"].asked
    pairs = [request[1:] for request in asked if request is not None]
    assert len(pairs) == len(set(pairs)) == 9 * 4 * most
    # Forgotten before the passes of one request at a time, and before those of eight.
    found: list[int | None] = []
    for request in asked[: 2 + 4 * 9]:
        if request is None:
            found.append(None)
        elif not found or found[-1] in (None, 9):
            found.append(1)
        else:
            found[-1] = (found[-1] or 0) + 1
    assert found == [None, 9, 9, None, 9, 9]
    with pytest.raises(SystemExit, match="2"):
        forced_tokens.main([*arguments, "--repetitions", str(most + 1)])


def test_an_engine_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arm: str) -> None:
        raise RuntimeError(f"{arm} did not start")

    monkeypatch.setattr(forced_tokens, "Engine", fail)
    assert forced_tokens.main(["--out", str(tmp_path)]) == 1
    assert "stock did not start" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        forced_tokens.main(["--repetitions", "0"])
