# SPDX-License-Identifier: Apache-2.0
"""vllm/entrypoints/serve/instrumentator/metrics.py: our metrics at /metrics of several API servers."""

from __future__ import annotations

import os
from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_attach_router() -> None:
    """Serve /metrics from a registry with our collector where several API servers share their metrics.

    There the instrumentator builds a registry of its own at every request and takes none of ours. The route put
    before it serves the same multiprocess registry (vLLM's `get_prometheus_registry`) with the collector added.
    A single API server already serves prometheus_client's default registry and is left alone.
    """
    from vllm.entrypoints.serve.instrumentator import metrics

    wrap(metrics, "attach_router", _add_route)


def _add_route(original: Any) -> Any:
    def attach_router(app: Any) -> None:
        original(app)
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            from starlette.routing import Route

            app.routes.insert(0, Route("/metrics", _serve_shared_metrics))

    return attach_router


def _serve_shared_metrics(_request: Any) -> Any:
    from prometheus_client import generate_latest
    from vllm.entrypoints.serve.instrumentator.metrics import PrometheusResponse
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    from vllm_ext import observability

    return PrometheusResponse(generate_latest(observability.extend_registry(get_prometheus_registry())))
