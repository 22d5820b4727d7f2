# SPDX-License-Identifier: Apache-2.0
"""semi-PD in vLLM: scheduler mixin, executor and worker around the lanes of `vllm_ext.scheduling.phases`."""
