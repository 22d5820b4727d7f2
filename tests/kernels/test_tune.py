# SPDX-License-Identifier: Apache-2.0
"""The search for tiles: what it makes of times, and that all of it runs, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_ext.kernels import tune
from vllm_ext.kernels.gpu import search
from vllm_ext.kernels.gpu.configurations import DECODE_TILE, LARGE_TILE, MIDDLE_TILE
from vllm_ext.kernels.gpu.tuning import Split, Step

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")


def test_tiles_change_in_the_middle_of_two_points() -> None:
    found = [(1.0, (DECODE_TILE,)), (4.0, (DECODE_TILE,)), (16.0, (MIDDLE_TILE,)), (64.0, (LARGE_TILE,))]
    steps = search.join_steps(found, is_complete=True)
    assert steps == (Step(8.0, (DECODE_TILE,)), Step(32.0, (MIDDLE_TILE,)), Step(None, (LARGE_TILE,)))
    # Nothing is said of what was not measured.
    assert search.join_steps(found[:3], is_complete=False)[-1] == Step(16.0, (MIDDLE_TILE,))
    assert search.join_steps([], is_complete=False) == ()


def test_a_split_is_fitted_to_times() -> None:
    # Few thread blocks gain from parts, many lose.
    timed = [(10, 64, {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.5}), (600, 64, {1: 4.0, 2: 5.0, 4: 6.0, 8: 9.0})]
    fitted = search.fit_split(timed, 132)
    assert (fitted.choose(10, 64, 132), fitted.choose(600, 64, 132)) == (8, 1)
    # Where parts never pay, there are none.
    assert search.fit_split([(10, 64, {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3})], 132) == Split(1, 8, 1)


def test_the_rule_stays_where_nothing_is_faster_by_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, rival = (DECODE_TILE,) * 2, (replace(DECODE_TILE, num_stages=6),) * 2
    times = {rule: 1.0}
    monkeypatch.setattr(search, "_time_tiles", lambda trials, tiles, rule, target: times.get(tiles))
    for seconds, best in ((0.98, rule), (0.9, rival)):
        times[rival] = seconds
        assert search.find_tiles([], rule, [rule, rival], None) == best  # type: ignore[arg-type]
    # The second GEMM by itself.
    times[rival[0], rule[0]] = 0.8
    assert search.find_tiles([], rule, [rule, rival], None) == (rival[0], rule[0])  # type: ignore[arg-type]


def test_variants_that_no_rule_chooses_are_tried_where_they_may_win() -> None:
    from bench.kernels.gpu_parts import decode
    from vllm_ext.kernels.gpu.shipped import DECODE_VARIANTS

    candidates = search.list_candidates((DECODE_TILE, DECODE_TILE), is_dry_run=False)
    for tile in DECODE_VARIANTS.values():
        assert (tile, tile) in candidates
        assert tile in decode.VARIANTS
    assert (LARGE_TILE, LARGE_TILE) not in candidates


def test_bad_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, message in (
        ("--ops=moe", "'moe' is none of mixed_linear, mixed_moe"),
        ("--layers=8x2x64", "'8x2x64' is not 4 sizes joined by x"),
        ("--bits=four", "invalid _numbers value"),
    ):
        with pytest.raises(SystemExit) as raised:
            tune.main([argument])
        assert raised.value.code == 2
        assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_goes_through_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_ext.kernels.tune", "--dry-run", "--output", str(tmp_path / "tables")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps, no table written" in done.stderr
    assert not (tmp_path / "tables").exists()
