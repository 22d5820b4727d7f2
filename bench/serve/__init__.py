# SPDX-License-Identifier: Apache-2.0
"""Real servers, started and stopped for demonstrations, tests and benchmarks."""
