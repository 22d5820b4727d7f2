# SPDX-License-Identifier: Apache-2.0
"""A small trained MoE, and makers of random models at real shapes."""
