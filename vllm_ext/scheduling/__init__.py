# SPDX-License-Identifier: Apache-2.0
"""The scheduler seat of the engine: one factory composes the mixins of every feature that schedules."""
