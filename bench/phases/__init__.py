# SPDX-License-Identifier: Apache-2.0
"""A simulator of prefill and decode on one device: two lanes and their controllers against mixed batches."""
