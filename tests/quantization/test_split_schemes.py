# SPDX-License-Identifier: Apache-2.0
"""Every scheme on two and four ranks against the whole layer, or an error that names the value."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.test_packed import (
    EXPERTS,
    finish,
    load,
    make_layer,
    make_plan,
    make_tokens,
    pack,
    random_weights,
    run,
    vllm_config,  # noqa: F401 - the fixture that every layer needs
)
from vllm_ext.kernels import tolerances
from vllm_ext.quantization.scheme import Scheme, list_schemes

INTERMEDIATE = 256


def split(name: str, ranks: int, experts: bool) -> torch.Tensor:
    """Sum of the ranks' outputs of a layer whose blocks all have this scheme."""
    plan, weights, tokens = make_plan([(name, name)] * EXPERTS), random_weights(INTERMEDIATE), make_tokens()
    total = torch.zeros_like(tokens[0])
    packed = pack(plan, weights)
    for rank in range(ranks):
        layer = make_layer(plan, **{"ep" if experts else "tp": (rank, ranks)}, intermediate=INTERMEDIATE)
        load(layer, packed)
        total += run(finish(layer), *tokens)
    return total


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", [False, True], ids=["tensor parallel", "expert parallel"])
def test_ranks_add_up_to_the_whole(experts: bool, every: int) -> None:
    """Experts are whole on a rank; a part of the inputs has groups, codes and rounded activations of its own."""
    checked = 0
    for number, name in enumerate(list_schemes()[::every]):
        scheme = Scheme.parse(name)
        whole = split(name, 1, experts)
        for ranks in (2, 4) if number % 4 == 0 else (2,):
            if not experts and scheme.group_size > INTERMEDIATE // ranks:
                continue
            # One scale of activations for a whole row is one for each part of it: other roundings, the same size.
            divided = not experts and scheme.act_bits == 8 and scheme.group_size == -1
            error = float(tolerances.relative_error(split(name, ranks, experts), whole))
            # Activations near the border between two codes may take the other one.
            assert error < (3e-2 if divided else 2e-3 if scheme.act_bits == 8 else 1e-5), (name, ranks, error)
            checked += 1
    assert checked > 100 / every


@pytest.mark.parametrize(("name", "ranks"), [("w4a16_g128", 4), ("w3a8_g64", 8), ("w1.6a16_g128_sym", 4)])
def test_groups_that_a_part_does_not_hold(name: str, ranks: int) -> None:
    plan = make_plan([("w4a16_g32", name)] * EXPERTS)
    part = INTERMEDIATE // ranks
    with pytest.raises(
        ValueError, match=rf"down: tensor parallelism over {ranks} ranks gives each {part} of the K=256"
    ):
        make_layer(plan, tp=(0, ranks), intermediate=INTERMEDIATE)
