# SPDX-License-Identifier: Apache-2.0
"""Which schemes a block may take: one column is one kind of scheme for every block, whatever its shape."""

from __future__ import annotations

import pytest

from vllm_ext.compress.families import Block, Kind, Module
from vllm_ext.compress.sensitivity import DEFAULT_BITS, FINE_BITS, FINE_GROUPS, list_units
from vllm_ext.quantization.plan import PlanError
from vllm_ext.quantization.scheme import Scheme


def make_module(*inputs: int) -> Module:
    blocks = tuple(Block(f"b{K}", (f"m.b{K}",), ((64, K),)) for K in inputs)
    return Module("m", Kind.EXPERT, 0, blocks, 0)


def test_default_options_follow_the_shape() -> None:
    wide, narrow, odd = list_units([make_module(256, 96, 12)], [])
    assert [str(option) for option in wide.options] == [f"w{bits}a16_g128" for bits in DEFAULT_BITS]
    assert [str(option) for option in narrow.options] == [f"w{bits}a16_g32" for bits in DEFAULT_BITS]
    assert set(odd.options) == {Scheme(16)}
    assert odd.sizes.tolist() == [64 * 12 * 2] * len(DEFAULT_BITS)


def test_fine_options_are_the_same_columns_for_every_block() -> None:
    units = list_units([make_module(256, 128, 64, 96, 12)], [], fine=True)
    wide, row, middle, narrow, odd = units
    columns = len(DEFAULT_BITS) + len(FINE_BITS) * (len(FINE_GROUPS) + 2)
    assert all(len(unit.options) == columns for unit in units)
    widths = [option.weight_bits for option in wide.options if option]
    for unit in (row, middle, narrow):
        assert [option.weight_bits for option in unit.options if option] == widths
    names = [[str(option).removeprefix("w2a16_") for option in unit.options[:6]] for unit in units]
    assert names[0] == ["g128", "g64", "g32", "g-1", "g128_sym", "g-1_sym"]
    # A whole row that is one usual group has one name.
    assert names[1] == ["g128", "g64", "g32", "g128", "g128_sym", "g128_sym"]
    # A group that does not fit is that of the column before.
    assert names[2] == ["g64", "g64", "g32", "g64", "g64_sym", "g64_sym"]
    assert names[3] == ["g32", "g32", "g32", "g-1", "g32_sym", "g-1_sym"]
    assert set(odd.options) == {Scheme(16)}


def test_named_schemes_stay_as_they_are() -> None:
    schemes = [Scheme.parse(name) for name in ("w4a16_g128", "w3a16_g32")]
    wide, narrow = list_units([make_module(256, 96)], schemes, fine=True)
    assert wide.options == tuple(schemes)
    assert narrow.options == (None, schemes[1])
    assert narrow.sizes[0] == 0
    with pytest.raises(PlanError, match=r"m b96 takes none of the schemes: .*128 does not divide K=96"):
        list_units([make_module(96)], schemes[:1])
