# SPDX-License-Identifier: Apache-2.0
"""Memory while a model is rounded as it loads: the result and one layer, not the model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from vllm import LLM
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from bench.models.make_model import make_model
from vllm_ext.quantization.moe import list_storage

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MIB = 2**20
HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 512, 512, 32, 8
LAYER_BYTES = 3 * 2 * HIDDEN * INTERMEDIATE * EXPERTS


def read_anonymous() -> int:
    """Memory of this process that is no mapped file, in bytes: vLLM maps the weights it reads."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


class Watch:
    """The most that `read_anonymous` says while the context lasts, above what it said at the beginning."""

    def __enter__(self) -> Watch:
        self.begun = self.highest = read_anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, read_anonymous())

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()
        self.kept = read_anonymous() - self.begun
        self.peak = self.highest - self.begun


def test_the_peak_is_the_result_and_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_in_process: None
) -> None:
    """Four hundred MiB of experts, more than four times what stays of them."""
    model = make_model(
        "tiny-qwen3-moe", tmp_path / "model", hidden=HIDDEN, experts=EXPERTS, moe_intermediate=INTERMEDIATE,
        layers=LAYERS,
    )  # fmt: skip
    assert LAYERS * LAYER_BYTES == 384 * MIB
    watches = []
    original = CPUModelRunner.load_model

    def load(self: CPUModelRunner, *arguments: object, **options: object) -> None:
        with Watch() as watch:
            original(self, *arguments, **options)
        watches.append(watch)

    monkeypatch.setattr(CPUModelRunner, "load_model", load)
    llm = LLM(
        model=str(model), quantization="mxmoe", dtype="bfloat16", max_model_len=128, max_num_seqs=2,
        enforce_eager=True, distributed_executor_backend="uni",
    )  # fmt: skip
    try:
        (storage,) = llm.apply_model(list_storage)
    finally:
        llm.llm_engine.engine_core.shutdown()
    (watch,) = watches
    resident = sum(layer.resident_bytes for layer in storage.values())
    print(
        f"kept {watch.kept / MIB:.0f} MiB, peak {watch.peak / MIB:.0f} MiB, resident experts {resident / MIB:.0f} MiB"
    )
    # What is beside the experts here: embeddings, head, attention, and the allocator's own.
    assert watch.kept < resident + 64 * MIB
    # A layer in full, its buffers on the way, and working copies of one expert.
    assert watch.peak < resident + 64 * MIB + 2.5 * LAYER_BYTES, (watch.peak, watch.kept, resident)
    assert watch.peak < 0.8 * LAYERS * LAYER_BYTES
