# SPDX-License-Identifier: Apache-2.0
"""A simulator of speculative decoding: the controller of vllm_ext.speculation against fixed lengths and an oracle."""
