# SPDX-License-Identifier: Apache-2.0
"""KV-cache quantizers: presets, calibration and capacity. Nothing here imports vLLM."""
