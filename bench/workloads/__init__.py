# SPDX-License-Identifier: Apache-2.0
"""Seeded request streams for `vllm bench serve`, made offline.

    python -m bench.workloads chat --tokenizer DIR --num-requests 64 --seed 0 --out DIR [--set request_rate=4]

Texts are slices of the shipped corpora (bench/models/tiny_moe), so no download is needed; local ShareGPT, LongBench,
JSONSchemaBench and trace files plug in by path.
"""

from bench.workloads.prepare import WORKLOADS, Workload, prepare_workload

__all__ = ["WORKLOADS", "Workload", "prepare_workload"]
