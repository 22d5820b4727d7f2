# SPDX-License-Identifier: Apache-2.0
"""Which windows are held out, and who wins on them; `test_planning` has the losses themselves."""

from __future__ import annotations

import numpy as np

from vllm_ext.compress.held_out import Comparison, count_windows, split_held_out


def test_held_out_windows_are_a_quarter_of_every_source() -> None:
    windows = np.repeat(np.arange(8), 4).reshape(32, 1)
    used, held = split_held_out(windows)
    assert held.ravel().tolist() == list(range(8))
    assert len(used) == 24
    assert split_held_out(windows[:3])[1].shape == (0, 1)


def test_windows_drawn_leave_those_asked_for() -> None:
    for used in (3, 4, 16, 48, 63, 64, 65, 127, 128):
        left, held = split_held_out(np.zeros((count_windows(used), 1)))
        assert len(left) == used
        assert len(held) >= 1


def test_nothing_is_closed_where_uniform_loses_nothing() -> None:
    same = Comparison(10, 1.0, 1.0, 1.0, 1.0, 4, 4, 4, "w4a16_g128")
    assert (same.closed, same.mixed_wins) == (0.0, False)
