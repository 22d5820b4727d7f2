# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels as part of a process: one OpenMP runtime, two callers at once, no leak, the switch."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.child import ChildResult, run_child
from tests.kernels.native.sanitizers import run_sanitized
from vllm_ext.kernels.native import load, recipe

REPOSITORY = Path(__file__).resolve().parents[3]

#: A layer of mixed formats, and its inputs at a few batch sizes.
LAYER = """
import json, threading, torch
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.mixed_moe import mixed_moe
from vllm_ext.kernels.native import load
R = Layout.CPU_RECORD
FORMATS = [
    (BlockFormat(2, 8, 128, layout=R), BlockFormat(3, 16, 64, layout=R)),
    (BlockFormat(4, 16, -1, layout=R), BlockFormat(6, 8, 32, layout=R)),
    (BlockFormat(8, 16, 32, layout=R), BlockFormat.full_precision(torch.bfloat16)),
]
layer = make_layer(FORMATS, 256, 192)
def call(inputs):
    return mixed_moe(inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 192)
"""


def run(code: str, **environment: str) -> ChildResult:
    return run_child(LAYER + code, PYTHONPATH=str(REPOSITORY), **environment)


def test_the_library_names_no_openmp_runtime_and_no_executable_stack(ops: Any) -> None:
    library = Path(load.describe_kernels()["reason"])
    needed = subprocess.run(["readelf", "-d", "-l", "-W", str(library)], capture_output=True, text=True, check=True)
    assert "libgomp" not in needed.stdout
    stack = next(line for line in needed.stdout.splitlines() if "GNU_STACK" in line)
    assert "RWE" not in stack


RACE = """
torch.set_num_threads({threads})
cases = [make_inputs(tokens, 256, 2, 3, torch.bfloat16, seed=tokens) for tokens in (1, 2, 5, 17, 64)]
expected = [call(inputs) for inputs in cases]
wrong, done = [], []
def work(offset):
    torch.set_num_threads({threads})
    for number in range({rounds}):
        index = (number + offset) % len(cases)
        if not torch.equal(call(cases[index]), expected[index]):
            wrong.append((offset, number))
    done.append(offset)
threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([wrong, sorted(done)]))
"""


def test_threads_that_call_at_once_get_their_own_results(ops: Any) -> None:
    """Semi-PD runs two lanes over one model: scratch memory must not be shared between calls in flight."""
    child = run(RACE.format(threads=2, rounds=150))
    assert child.value == [[], [0, 1, 2]], child.stderr


def test_one_openmp_runtime_and_results_that_do_not_depend_on_its_threads(ops: Any) -> None:
    child = run(
        """
same = []
for tokens in (1, 6, 40):
    inputs = make_inputs(tokens, 256, 2, 3, torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 70):
        torch.set_num_threads(threads)
        results.append(call(inputs))
    same.append(all(torch.equal(result, results[0]) for result in results))
assert load.is_loaded()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
runtimes = [m for m in maps if any(name in m.rsplit("/", 1)[-1] for name in ("gomp", "iomp", "libomp"))]
print(json.dumps([same, runtimes]))
"""
    )
    assert child.value is not None, child.stderr
    same, runtimes = child.value
    assert same == [True] * 3
    assert len(runtimes) == 1, runtimes


LEAK = """
import resource
inputs = [make_inputs(tokens, 256, 2, 3, torch.bfloat16, seed=tokens) for tokens in (1, 3, 20)]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for number in range(600): call(inputs[number % 3])
before = resident()
for number in range({calls}): call(inputs[number % 3])
print(json.dumps(resident() - before))
"""


def test_calls_do_not_grow_the_process(ops: Any) -> None:
    child = run(LEAK.format(calls=1500))
    assert child.value is not None, child.stderr
    assert child.value < 2 << 20


@pytest.mark.slow
def test_a_hundred_thousand_calls_do_not_grow_the_process(ops: Any) -> None:
    child = run_child(LAYER + LEAK.format(calls=100_000), PYTHONPATH=str(REPOSITORY), timeout=1500)
    assert child.value is not None, child.stderr
    assert child.value < 4 << 20


def test_the_switch_chooses_the_instruction_set(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    best = ops.isa()
    try:
        monkeypatch.setenv(load.ISA_ENV, "scalar")
        load._load(None)
        assert ops.isa() == "scalar"
        monkeypatch.setenv(load.ISA_ENV, "abacus")
        with pytest.raises(ValueError, match="VLLM_EXT_CPU_ISA='abacus'"):
            load._load(None)
    finally:
        ops.select_isa(best)
    monkeypatch.setenv(load.ISA_ENV, "torch")
    assert load.describe_kernels() == {"status": "off", "reason": "VLLM_EXT_CPU_ISA=torch"}


def test_the_switch_leaves_the_kernels_out(ops: Any) -> None:
    code = """
found = [load.load_ops(), load.is_loaded()]
inputs = make_inputs(5, 256, 2, 3, torch.bfloat16)
print(json.dumps([*found, bool(torch.isfinite(call(inputs)).all())]))
"""
    assert run(code, VLLM_EXT_CPU_ISA="torch").value == [None, False, True]


def test_unknown_instruction_sets_are_refused(ops: Any) -> None:
    best = ops.isa()
    with pytest.raises((RuntimeError, ValueError), match="abacus"):
        ops.select_isa("abacus")
    assert ops.isa() == best


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_inner_loops_under_the_sanitizers(tmp_path: Path) -> None:
    """The torch-free headers in a program of their own, with address and undefined-behaviour checks."""
    run_sanitized(recipe.NATIVE / "standalone_test.cpp", tmp_path)
