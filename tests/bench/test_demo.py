# SPDX-License-Identifier: Apache-2.0
"""The demonstration without servers: how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import demo


def test_failed_step_is_named_with_the_end_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A real `vllm serve` refuses this option before it imports much.
    monkeypatch.setitem(demo.ARMS, "bf16", ["--no-such-option"])
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert demo.main(["--windows", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "demo failed: bf16: start vllm serve --no-such-option: the server ended" in captured.err
    assert "unrecognized arguments: --no-such-option" in captured.err
    assert f"logs: {tmp_path}" in captured.err
    assert (tmp_path / "bf16.log").is_file()


def test_bad_usage_ends_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--windows", "-1"])
