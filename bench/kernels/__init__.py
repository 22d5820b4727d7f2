# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark suites of the kernels; run by `make bench`."""
