# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode as two lanes over one model and one KV pool: what decides, without vLLM."""
