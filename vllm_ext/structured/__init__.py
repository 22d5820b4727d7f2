# SPDX-License-Identifier: Apache-2.0
"""Structured generation: the right grammar engine per request, hostile schemas contained, forced tokens as drafts."""
