# SPDX-License-Identifier: Apache-2.0
"""How many bytes the routed experts take, in a checkpoint and in a running server."""

from __future__ import annotations

import json
import math
from pathlib import Path

from bench.serve.server import VllmServer

WEIGHT_BYTES_METRIC = "vllm_ext:mxmoe_weight_bytes"
WEIGHT_COUNT_METRIC = "vllm_ext:mxmoe_weight_count"


def count_expert_weights(model: Path) -> tuple[int, int]:
    """(bytes, weights) of the routed experts, from the headers of the model's safetensors files."""
    num_bytes = weights = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            # The format: header length as a little-endian uint64, then the header as JSON.
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if ".experts." in name:
                begin, end = tensor["data_offsets"]
                num_bytes += end - begin
                weights += math.prod(tensor["shape"])
    if weights == 0:
        raise ValueError(f"{model} holds no tensor with '.experts.' in its name")
    return num_bytes, weights


def read_mxmoe_metrics(server: VllmServer, weights: int) -> tuple[int, float]:
    """(bytes, bits per weight) of the experts that the server holds, from its `/metrics`.

    Raises ValueError when the plugin does not export them, or holds fewer weights in mixed precision than `weights`.
    """
    values = {name: server.read_metric(name) for name in (WEIGHT_BYTES_METRIC, WEIGHT_COUNT_METRIC)}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ValueError(
            f"the server's /metrics has no {' and no '.join(missing)}; run `vllm-ext doctor` to see whether "
            "the plugin is loaded (VLLM_PLUGINS, if set, must name vllm_ext)"
        )
    num_bytes, count = values[WEIGHT_BYTES_METRIC] or 0.0, values[WEIGHT_COUNT_METRIC] or 0.0
    if count != weights:
        raise ValueError(
            f"{WEIGHT_COUNT_METRIC} is {count:.0f}, but the model has {weights} expert weights: "
            "the bytes of the rest are not counted, so the two columns would not compare"
        )
    return int(num_bytes), 8 * num_bytes / count
