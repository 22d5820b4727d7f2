# SPDX-License-Identifier: Apache-2.0
"""The check before a model relies on the kernels: silent where they are right, and it does notice where not."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from vllm_ext.kernels.gpu import faults, launch, selfcheck
from vllm_ext.kernels.gpu.configurations import Device, list_choices
from vllm_ext.kernels.gpu.faults import Check, find_fault, list_checks
from vllm_ext.kernels.mixed_moe import triton

CPU = torch.device("cpu")
#: Of the smallest tile, with 16-bit activations.
MOE_CHECK = list_checks(launch.describe_device(CPU))[2:3]


@pytest.fixture(autouse=True)
def _forget() -> None:
    selfcheck.is_sound.cache_clear()


def answer(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have this Python run in place of the comparison."""
    monkeypatch.setattr(selfcheck, "COMMAND", (sys.executable, "-c", code))


@pytest.mark.slow
def test_right_kernels_are_trusted() -> None:
    for dtype in launch.DTYPES:
        assert selfcheck.ask_child(CPU, dtype) is None
    assert selfcheck.is_sound(CPU, torch.bfloat16)


def test_a_float32_model_is_not_asked_about() -> None:
    assert not selfcheck.is_sound(CPU, torch.float32)


@pytest.mark.parametrize("device", [Device((8, 0), 108), Device((9, 0), 132), Device((12, 0), 170)])
def test_every_tile_that_a_gpu_can_get_is_checked(device: Device) -> None:
    names = [check.name for check in list_checks(device)]
    for int8, activations in ((False, "a16"), (True, "a8")):
        for tile in list_choices(int8, device):
            start = f"tiles of {tile.block_n} by {tile.block_tokens} tokens, w"
            assert any(name.startswith(start) and activations in name for name in names)
    # Every width with 16-bit activations, every one but ternary's with 8-bit ones.
    for word in ("w2a16", "w3a16", "w4a16", "w6a16", "w8a16", "w16a16", "w2a8", "w3a8", "w4a8", "w6a8", "w8a8"):
        assert any(word in name for name in names), word


def test_a_right_kernel_has_no_fault() -> None:
    assert find_fault(CPU, torch.bfloat16, MOE_CHECK) is None
    assert find_fault(CPU, torch.float16, list_checks(launch.describe_device(CPU))[:2]) is None


def test_a_wrong_order_of_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton.mixed_moe

    def swap_neighbours(*arguments: Any, **options: Any) -> torch.Tensor:
        out = real(*arguments, **options)
        assert out is not None
        return out.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    monkeypatch.setattr(triton, "mixed_moe", swap_neighbours)
    fault = find_fault(CPU, torch.bfloat16, MOE_CHECK)
    assert fault is not None
    assert fault.startswith("tiles of 64 by 16 tokens, w4a16_g128 and w2a16_g-1: error ")
    assert "allowed is 0.0045" in fault


def test_a_compiler_that_gives_up_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(triton, "mixed_moe", fail)
    assert "RuntimeError: no kernel image" in str(find_fault(CPU, torch.float16, MOE_CHECK))


def test_a_tile_that_does_not_fit_is_a_fault_where_no_other_serves() -> None:
    def fail(*_: object) -> tuple[float, float]:
        raise OutOfResources(115_712, 101_376, "shared memory")

    assert find_fault(CPU, torch.bfloat16, [Check("large", fail, must_fit=False)]) is None
    assert "small: out of resource: shared memory" in str(find_fault(CPU, torch.bfloat16, [Check("small", fail)]))
    checks = list_checks(launch.describe_device(CPU))
    assert [check.must_fit for check in checks] == [True, True, True, False, False, False, True, False, False]


def test_a_loader_s_settings_play_no_part_and_a_nan_is_a_fault() -> None:
    seen = []

    def measure(*_: object) -> tuple[float, float]:
        seen.append((torch.get_float32_matmul_precision(), torch.empty(0).dtype, torch.empty(0).device))
        return float("nan"), 1.0

    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert "error nan" in str(find_fault(CPU, torch.bfloat16, [Check("one", measure)]))
        assert (torch.get_float32_matmul_precision(), torch.get_default_dtype()) == ("medium", torch.bfloat16)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    assert seen == [("highest", torch.float32, CPU)]


def test_the_command_line_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for fault in (None, "wrong"):
        monkeypatch.setattr(faults, "find_fault", lambda *_, fault=fault: fault)
        assert faults.main(["cpu", "float16"]) == 0
        assert json.loads(capsys.readouterr().out) == {"fault": fault}


def test_the_command_line_tells_a_gpu_that_it_cannot_have_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch, "zeros", fail)
    assert faults.main(["cuda:0", "float16"]) == selfcheck.NO_DEVICE


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "ended with code -6"),
        ("import sys; sys.exit('illegal access')", "ended with code 1: illegal access"),
        ('print(\'{"fault": "tile 1: wrong"}\')', "are not used on cpu: tile 1: wrong. The float32 reference runs"),
        ("print('loaded')", "answered 'loaded'"),
        ("pass", "ended with code 0"),
    ],
)
def test_a_process_that_fails_is_a_fault(
    code: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, code)
    with caplog.at_level(logging.ERROR, logger="vllm.vllm_ext.kernels"):
        assert not selfcheck.is_sound(CPU, torch.bfloat16)
    assert message in caplog.text


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(selfcheck, "TIMEOUT", 0.3)
    assert "took longer than 0 s" in str(selfcheck.ask_child(CPU, torch.bfloat16))


def test_a_python_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "COMMAND", ("no-such-python",))
    assert "did not start" in str(selfcheck.ask_child(CPU, torch.bfloat16))


def test_where_a_second_process_cannot_have_the_gpu_this_one_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, f"raise SystemExit({selfcheck.NO_DEVICE})")
    asked = []
    monkeypatch.setattr(faults, "find_fault", lambda *arguments: asked.append(arguments))
    assert selfcheck.is_sound(CPU, torch.bfloat16)
    assert asked == [(CPU, torch.bfloat16)]


def test_a_good_answer_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What was printed before is not its answer; and it finds what this process imports.
    (tmp_path / "only_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    answer(monkeypatch, "import only_here; print('compiling'); print('{\"fault\": null}')")
    assert selfcheck.is_sound(CPU, torch.bfloat16)
