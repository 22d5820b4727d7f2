# SPDX-License-Identifier: Apache-2.0
"""The parts of bench/kernels/gpu.py: each module has `run(context)`, and imports triton."""
