# SPDX-License-Identifier: Apache-2.0
"""The worker of semi-PD: two model runners over one module and one set of KV tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm import forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.scratch import guard_scratch, without_onednn


class SecondCPURunner(CPUModelRunner):
    """The prefill lane's runner: batch and buffers of its own; module, KV tensors and requests of the first one."""

    def share(self, first: CPUModelRunner) -> None:
        """Take the module, once `first` has loaded it, and the requests, which go from one runner to the other."""
        self.first = first
        self.model = first.model
        self.requests = first.requests
        self.num_prompt_logprobs = first.num_prompt_logprobs

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
        self.second_runner.share(self.model_runner)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM's, and the second runner's tables for the same tensors."""
        super().initialize_from_config(kv_cache_config)
        self.second_runner.initialize_kv_cache(kv_cache_config)
        guard_scratch(self.model_runner.model, self.runners.values())

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
        return runner.sample_tokens(grammar) if made is None else made
