# SPDX-License-Identifier: Apache-2.0
"""Demonstration, benchmarks, and the models and tools that they need."""
