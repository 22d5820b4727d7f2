# SPDX-License-Identifier: Apache-2.0
"""Quantizing at scale: many files in and out, memory of one layer, kills, full disks, and inputs that change."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.compress.runnable_model import add_tokenizer, write_random_text, write_runnable
from vllm_ext import cli
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rounders import HessianRounder
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.checkpoint import open_checkpoint, write_plain_checkpoint
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorReader
from vllm_ext.quantization.scheme import Scheme

SCHEMES = [Scheme.parse(name) for name in ("w2a16_g32", "w4a16_g32")]
WEIGHT = "model.layers.2.mlp.experts.1.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_runnable(
        tmp_path_factory.mktemp("models") / "model", dtype=torch.bfloat16, max_position_embeddings=512
    )
    add_tokenizer(directory)
    write_random_text(directory.parent / "text.txt", 8 * 512)
    return directory


def quantize(model: Path, output: Path, text: Path, **options: Any) -> dict[str, str]:
    """{file: sha256} of the output."""
    quantize_model(
        model, output, bits=3.75, schemes=SCHEMES, rounding="gptq", calibration=[text], num_windows=4, sweeps=0,
        **options,
    )  # fmt: skip
    return hash_files(output)


def hash_files(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def split_model(model: Path, output: Path, shard_bytes: int) -> Path:
    """The same model in many files."""
    reader = TensorReader(model)
    write_plain_checkpoint(
        output, config=json.loads((model / "config.json").read_text()), infos=reader.infos,
        tensors=((name, reader.read(name)) for name in reader.infos), companions=model, shard_bytes=shard_bytes,
    )  # fmt: skip
    return output


def test_many_files_in_and_out(model: Path, tmp_path: Path) -> None:
    sharded = split_model(model, tmp_path / "sharded", 30_000)
    assert len(list(sharded.glob("*.safetensors"))) > 5
    text = model.parent / "text.txt"
    quantize(model, tmp_path / "one", text)
    quantize(sharded, tmp_path / "many", text, shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = (open_checkpoint(tmp_path / name) for name in ("one", "many"))
    assert one.plan.sha256 == many.plan.sha256
    assert set(one.reader.infos) == set(many.reader.infos)
    for name in one.reader.infos:
        assert torch.equal(one.reader.read(name), many.reader.read(name)), name


class Killed(BaseException):
    """What no code of the package catches."""


def test_another_input_at_the_same_path_starts_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept of the old weights is not used, although files have the same names, sizes and times."""
    source, text = tmp_path / "model", model.parent / "text.txt"
    shutil.copytree(model, source)
    original = HessianRounder.round_layer

    def stop(self: HessianRounder, layer: Any, *arguments: Any) -> Any:
        if layer.index == 2:
            raise Killed
        return original(self, layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HessianRounder, "round_layer", stop)
        with pytest.raises(Killed):
            quantize(source, tmp_path / "out", text)
    assert list(tmp_path.glob(".out.work/*/*layer-0*"))
    path = source / "model.safetensors"
    status = path.stat()
    tensors = load_file(path)
    tensors[WEIGHT] = -tensors[WEIGHT]
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert quantize(source, tmp_path / "out", text) == quantize(source, tmp_path / "fresh", text)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("replace", [False, True], ids=["written", "replaced"])
def test_an_input_that_changes_while_it_is_read_is_named(model: Path, tmp_path: Path, replace: bool) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    source = open_source(directory)
    source.reader.read(WEIGHT)
    path = directory / "model.safetensors"
    if replace:
        shutil.copyfile(path, directory / "other")
        (directory / "other").replace(path)
    else:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x00")
        os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was read: start again"):
        source.reader.read(WEIGHT)


def run_limited(arguments: list[str], file_bytes: int) -> subprocess.CompletedProcess[str]:
    """A command that may write no file beyond a size, as on a full disk."""
    program = (
        "import resource, sys\n"
        "from vllm_ext import cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounding", "file_bytes", "message"),
    [
        ("rtn", 60_000, r"writing .*out failed \(File too large\): free \d+ bytes there"),
        ("gptq", 3_000, r"keeping activations in .*\.out\.work/.* failed \(.*\): free \d+ bytes for each layer there"),
        # Activations of text fit into such files, a layer's codes do not.
        (
            "gptq --sensitivity weight",
            3_000,
            r"keeping unfinished work in .*\.out\.work failed \(File too large\): free",
        ),
    ],
)
def test_full_disk(model: Path, tmp_path: Path, rounding: str, file_bytes: int, message: str) -> None:
    arguments = [
        "quantize", str(model), "-o", str(tmp_path / "out"), "--bits", "3.75", "--schemes", "w2a16_g32,w4a16_g32",
        "--rounding", *rounding.split(), "--windows", "4", "--calibration", str(model.parent / "text.txt"),
    ]  # fmt: skip
    arguments = arguments if rounding != "rtn" else arguments[:8]
    found = run_limited(arguments, file_bytes)
    assert found.returncode == 1
    assert re.search(message, found.stderr), found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
    # With room the same command goes on and finishes.
    assert run_limited(arguments, 10**9).returncode == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/vllm-ext-output/out", r"writing /proc/vllm-ext-output/out failed \(.*\): check the path"),
        ("file/out", r"writing .*file/out failed \(.*\): check the path and its permissions"),
    ],
)
def test_an_output_that_cannot_be_written(
    model: Path, tmp_path: Path, place: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    output = Path(place) if place.startswith("/") else tmp_path / place
    assert (
        cli.main(["quantize", str(model), "-o", str(output), "--bits", "3.75", "--schemes", "w3a16_g32,w4a16_g32"]) == 1
    )
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def fork(run: Callable[[], object]) -> int:
    """Run a function in a process of its own, with everything imported; returns its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            run()
            code = 0
        finally:
            os._exit(code)
    return process


@pytest.mark.slow
def test_killed_at_twenty_random_moments(model: Path, tmp_path: Path) -> None:
    """SIGKILL whenever it happens to come, the same again and again, the same files."""

    def run(name: str) -> None:
        quantize_model(
            model, tmp_path / name, bits=3.75, schemes=SCHEMES, rounding="gptaq", rotate=True, repair_router=True,
            num_windows=4, calibration=[model.parent / "text.txt"],
        )  # fmt: skip

    start = time.monotonic()
    assert os.waitpid(fork(lambda: run("whole")), 0)[1] == 0
    seconds = time.monotonic() - start
    expected = hash_files(tmp_path / "whole")
    generator, kills = random.Random(0), 0
    for _ in range(20):
        process = fork(lambda: run("out"))
        # Short, so that no run gets to its end alone.
        time.sleep(generator.uniform(0.02, 0.3) * seconds)
        os.kill(process, signal.SIGKILL)
        kills += os.waitpid(process, 0)[1] == signal.SIGKILL
        if (tmp_path / "out").exists():
            # Finished between two kills: whole or not at all, and then from the beginning.
            assert hash_files(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
    assert kills >= 15
    assert os.waitpid(fork(lambda: run("out")), 0)[1] == 0
    assert hash_files(tmp_path / "out") == expected
    # What killed writers left says what it is, and nothing else is left.
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("whole", "out")]
    assert all(name.startswith(".out.partial-") for name in left)


def measure_peak(run: Callable[[], None]) -> int:
    """Peak memory in bytes of a function in a process of its own, beyond what that process began with."""
    reading, writing = os.pipe()

    def measure() -> None:
        Path("/proc/self/clear_refs").write_text("5")
        before = _read_status("VmRSS")
        run()
        os.write(writing, str(_read_status("VmHWM") - before).encode())

    process = fork(measure)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert os.waitpid(process, 0)[1] == 0
    return int(text)


def _read_status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_memory_is_that_of_a_layer(tmp_path: Path, rounding: str) -> None:
    """Four times as many layers, the same peak, which is far below the model."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16, "mlp_only_layers": []}
    peaks, weights = [], []
    write_random_text(tmp_path / "text.txt", 5 * 512)
    for layers in (4, 16):
        directory = write_runnable(
            tmp_path / f"model-{layers}", num_hidden_layers=layers, max_position_embeddings=512, **sizes
        )
        add_tokenizer(directory)
        experts = [m for m in open_source(directory).modules if ".experts." in m]
        plan = Plan.parse({path: {"gate_up": "w4a16_g64", "down": "w4a16_g64"} for path in experts})
        output = tmp_path / f"out-{layers}"

        def run(directory: Path = directory, output: Path = output, plan: Plan = plan) -> None:
            quantize_model(
                directory, output, plan=plan, rounding=rounding, num_windows=1, sweeps=0,
                calibration=[tmp_path / "text.txt"] if rounding != "rtn" else [],
            )  # fmt: skip

        peaks.append(measure_peak(run))
        weights.append((directory / "model.safetensors").stat().st_size)
    layer = (weights[1] - weights[0]) // 12
    # Twelve layers more would be 150 MiB.
    assert peaks[1] - peaks[0] < 3 * layer, (peaks, layer)
    assert peaks[1] < weights[1] / 2 + 40 * 2**20, (peaks, weights)
