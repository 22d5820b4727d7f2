# SPDX-License-Identifier: Apache-2.0
"""How much of a model's quality is left, measured through a running server."""
