# SPDX-License-Identifier: Apache-2.0
"""vllm-ext: an extension pack for vLLM. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
