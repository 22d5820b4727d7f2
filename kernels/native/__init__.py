# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU: compiled on first use (build.py), loaded once per process (load.py), and the layout in
which they want their weights (layout.py).

Importing this package compiles and loads nothing.
"""
