# SPDX-License-Identifier: Apache-2.0
"""The patch records against the installed vLLM, and what happens when one does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from vllm_ext import config
from vllm_ext.patches import check, registry, signature


def test_every_symbol_matches_the_installed_vllm() -> None:
    root = check.find_installed_root()
    assert root is not None
    assert {result.status for result in check.check_records(root)} == {"match"}
    assert all(registry.find_mismatch(record) is None for record in registry.RECORDS)


def test_live_and_source_signatures_agree() -> None:
    root = check.find_installed_root()
    assert root is not None
    for symbol in [symbol for record in registry.RECORDS for symbol in record.symbols]:
        live = signature.read_live_signature(symbol.target)
        assert live == signature.read_source_signature(root, symbol.target)


def test_records_are_complete_and_few() -> None:
    assert len(registry.RECORDS) <= 12
    assert sum(len(record.symbols) for record in registry.RECORDS) <= 25
    for record in registry.RECORDS:
        assert record.feature in {"core", *config.FEATURES}
        assert record.reason
        assert record.change
        assert record.removal
        target, _, function = record.apply.partition(":")
        assert target.startswith("vllm_ext.patches.")
        assert function


def test_readme_is_the_index(repository: Path) -> None:
    text = (repository / "patches" / "README.md").read_text()
    for record in registry.RECORDS:
        assert f"| `{record.name}` | {record.feature} | {record.process} |" in text
        for symbol in record.symbols:
            assert f"`{symbol.target}`" in text
        for column in (record.reason, record.change, record.without, record.removal):
            assert column in text


def test_selection_by_feature_and_process() -> None:
    assert registry.select_records((), "api") == []
    assert [record.name for record in registry.select_records(("mxmoe",), "api")] == ["metrics_route"]
    assert registry.select_records(("mxmoe",), "engine") == []
    with pytest.raises(KeyError, match="engine_config"):
        registry.find_record("unknown")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "000000000000"}, "is now function(self, usage_context=, headless=)"),
        ({"target": "vllm.engine.arg_utils:EngineArgs.renamed"}, "(absent)"),
        ({"target": "vllm.engine.arg_utils:logger"}, "is not a function"),
        ({"target": "vllm.no_such_module:f"}, "(absent)"),
    ],
)
def test_mismatch_disables_with_one_line(
    change: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    record = registry.find_record("engine_config")
    broken = dataclasses.replace(record, symbols=(dataclasses.replace(record.symbols[0], **change),))
    monkeypatch.setattr(registry, "RECORDS", (broken,))
    assert not registry.apply_record("engine_config")
    (line,) = messages
    assert line.startswith("vllm-ext: patch engine_config is left out (")
    assert reason in line
    assert broken.without in line


def test_check_runs_on_an_unpacked_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the few files, one of them changed, stands for a newer vLLM unpacked beside ours."""
    installed = check.find_installed_root()
    assert installed is not None
    root = tmp_path / "vllm"
    for symbol in [symbol for record in registry.RECORDS for symbol in record.symbols]:
        module, _ = signature.split_target(symbol.target)
        folder = Path(*module.split(".")[1:])
        path = folder / "__init__.py" if (installed / folder).is_dir() else folder.with_suffix(".py")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / path, root / path)
    (root / "__init__.py").write_text("raise RuntimeError('the check must not import vLLM')")
    assert check.main(["--root", str(root)]) == 0
    arguments = root / "engine" / "arg_utils.py"
    arguments.write_text(
        arguments.read_text().replace("headless: bool = False,", "headless: bool = False, extra=None,")
    )
    (root / "v1" / "metrics" / "prometheus.py").unlink()
    assert check.main(["--root", str(root), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["patches"]
    assert [patch["status"] for patch in found][:3] == ["mismatch", "match", "absent"]
    assert {patch["status"] for patch in found[3:]} == {"match"}
    assert "extra=" in found[0]["reason"]


def test_check_without_a_vllm(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main(["--root", str(tmp_path)])
