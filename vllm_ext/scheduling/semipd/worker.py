# SPDX-License-Identifier: Apache-2.0
"""The worker of semi-PD: two model runners over one module and one set of KV tensors."""

from __future__ import annotations

import contextlib
from collections.abc import ItemsView, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from vllm import forward_context
from vllm.config import CompilationMode
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.linear import pack_linear_layers, without_onednn
from vllm_ext.scheduling.semipd.scratch import lock_scratch


class SharedCounts(dict[str, int]):
    """A dictionary that one thread may go through while another adds and removes."""

    def items(self) -> ItemsView[str, int]:  # type: ignore[override]
        """Of a copy: vLLM goes through all requests with prompt logprobs in every batch, the other lane's too."""
        return self.copy().items()


class SecondCPURunner(CPUModelRunner):
    """The prefill lane's runner: batch and buffers of its own; module, KV tensors and requests of the first one."""

    def share(self, first: CPUModelRunner) -> None:
        """Take the module, once `first` has loaded it, and the requests, which go from one runner to the other."""
        self.first = first
        self.model = first.model
        self.requests = first.requests
        self.num_prompt_logprobs = first.num_prompt_logprobs = SharedCounts()

    def initialize_kv_cache_tensors(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int],
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of `first`, to which the layers are bound already."""
        self.kv_caches.extend(self.first.kv_caches)
        return {}


class LaneCPUWorker(CPUWorker):
    """`run_lane` may run for both lanes at once, in a thread each; all else while no lane runs."""

    def init_device(self) -> None:
        """As vLLM's, with a second runner. Raises ValueError for the V2 model runner, and where a thread would see
        the other's forward context.
        """
        if not hasattr(forward_context, "_vllm_ext_context"):
            raise ValueError(
                "semipd needs patch lane_threads, which does not fit this vLLM: `vllm-ext doctor` says why; "
                "switch semipd off"
            )
        if self.use_v2_model_runner:
            raise ValueError(
                "semipd on CPUs runs with the V1 model runner: unset VLLM_USE_V2_MODEL_RUNNER, or switch semipd off"
            )
        super().init_device()
        self.second_runner = SecondCPURunner(self.vllm_config, torch.device("cpu"))
        self.runners = {Lane.PREFILL: self.second_runner, Lane.DECODE: self.model_runner}
        #: The lane that computed a request last.
        self._latest: dict[str, Lane] = {}

    def load_model(self, **kwargs: Any) -> None:
        """As vLLM's, once, with linear layers that two threads may run."""
        with without_onednn():
            super().load_model(**kwargs)
        self._pack_linear_layers()
        self.second_runner.share(self.model_runner)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which makes layers anew."""
        with without_onednn():
            super().reload_weights(*args, **kwargs)
        self._pack_linear_layers()
        self._lock_scratch()

    def update_config(self, overrides: dict[str, Any]) -> None:
        """As vLLM's, of both runners."""
        super().update_config(overrides)
        for name in overrides:
            setattr(self.second_runner, name, getattr(self.vllm_config, name))

    def update_max_model_len(self, max_model_len: int) -> None:
        """As vLLM's, of both runners."""
        super().update_max_model_len(max_model_len)
        self.second_runner.update_max_model_len(max_model_len)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM's, and the second runner's tables for the same tensors. Raises ValueError for a KV cache whose blocks
        the lanes do not fence, and for layers that two threads cannot run.
        """
        check_groups(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        self.second_runner.initialize_kv_cache(kv_cache_config)
        self._lock_scratch()

    @property
    def _is_compiled(self) -> bool:
        return bool(self.vllm_config.compilation_config.mode != CompilationMode.NONE)

    def _pack_linear_layers(self) -> None:
        if not self._is_compiled:
            pack_linear_layers(self.model_runner.model)

    def _lock_scratch(self) -> None:
        lock_scratch(self.model_runner.model, self.runners.values(), is_compiled=self._is_compiled)

    @torch.inference_mode()
    def run_lane(self, lane: Lane, output: Any, grammar: Any) -> Any:
        """Run a lane's batch and sample; the runner's output."""
        runner = self.runners[lane]
        for rid in output.finished_req_ids:
            self._latest.pop(rid, None)
        for rid in output.scheduled_cached_reqs.req_ids:
            if self._latest.get(rid, lane) is not lane:
                # What this runner may still have of it is from before the other lane's batches.
                runner.input_batch.remove_request(rid)
        self._latest.update(dict.fromkeys(output.num_scheduled_tokens, lane))
        made = runner.execute_model(output)
        if made is not None:
            return made
        with spare_seeds(runner):
            return runner.sample_tokens(grammar)


def check_groups(kv_cache_config: KVCacheConfig) -> None:
    """Refuse all but full attention: what else there is recycles blocks, or keeps state elsewhere, in the order in
    which batches are scheduled. Raises ValueError naming the kind and a layer.
    """
    for group in kv_cache_config.kv_cache_groups:
        if type(group.kv_cache_spec) is not FullAttentionSpec:
            raise ValueError(
                f"semipd does not run with a KV cache of {type(group.kv_cache_spec).__name__} "
                f"({group.layer_names[0]}), only with one of full attention: switch semipd off"
            )


@contextlib.contextmanager
def spare_seeds(runner: Any) -> Iterator[None]:
    """Within, requests whose prompt goes on do not draw from their own generator.

    vLLM samples a token for every request of a batch, drops those of unfinished prompts, and takes their draws back,
    which CPU generators cannot do: it fails there (0.32, GPUModelRunner._bookkeeping_sync). Without draws there is
    nothing to take back, and a seed gives the same tokens however a prompt is cut.
    """
    batch = runner.input_batch
    unfinished = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
    spared = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(spared)
