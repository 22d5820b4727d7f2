# SPDX-License-Identifier: Apache-2.0
"""Blocks, the schemes they may take, and what those cost by the weights alone: squared error times routing frequency.

`layer_error` measures the same with calibration text, on the outputs of layers and on the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.compress.families import Block, Module
from vllm_ext.compress.profile import ActivationProfile
from vllm_ext.compress.progress import track
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.default_plan import choose_group_size, measure_error
from vllm_ext.quantization.plan import PlanError
from vllm_ext.quantization.scheme import Scheme

#: Widths tried when the user names no schemes: weight-only, in the group size that fits each block.
DEFAULT_BITS = (2, 3, 4, 5, 6, 8)

#: Widths that are tried in other groups too where calibration text tells what those are worth, and the groups: smaller
#: ones and a whole row; the usual one and a whole row also without zero points. At few bits a scale and a zero point
#: are a large part of the bytes, and what they are worth differs between blocks as much as a bit does. Groups of 64 and
#: 32 without zero points were tried too: no plan chose them.
FINE_BITS = (2, 3, 4)
FINE_GROUPS = (64, 32, -1)


class Unit(NamedTuple):
    """A block whose scheme is to be chosen, and the schemes it may take; None where one does not fit its shape."""

    module: Module
    block: Block
    options: tuple[Scheme | None, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Stored bytes of each option, int64 [options]; 0 where it does not fit."""
        shape = self.block.N, self.block.K, self.block.itemsize
        return np.array([option.stored_bytes(*shape) if option else 0 for option in self.options], np.int64)


def list_units(modules: Sequence[Module], schemes: Sequence[Scheme], *, fine: bool = False) -> list[Unit]:
    """Every block of the modules with its options: the given schemes, or one per DEFAULT_BITS where none are given.

    fine: where none are given, also those of FINE_BITS in FINE_GROUPS and without zero points; the group that fits is
    taken where such a group does not. Raises PlanError, with the reason, for a block that takes none of the schemes.
    """
    return [
        Unit(module, block, _list_options(module, block, schemes, fine))
        for module in modules
        for block in module.blocks
    ]


def measure_weight_errors(source: SourceModel, units: Sequence[Unit], *, progress: bool = False) -> np.ndarray:
    """Squared difference between each unit's weights and their rounded versions, float64 [units, options].

    Reads one weight at a time. inf where an option does not fit; 0 for w16a16. Raises ValueError for NaN weights.
    """
    errors = np.full((len(units), len(units[0].options)), np.inf)
    for row, unit in enumerate(track(units, "weight error", len(units), progress)):
        fitting = [column for column, option in enumerate(unit.options) if option is not None]
        errors[row, fitting] = 0.0
        for path, weight in source.read_weights(unit.block):
            weight = weight.float()
            for column in fitting:
                option = unit.options[column]
                if option is not None and option.is_quantized:
                    errors[row, column] += measure_error(weight, option, path)
    return errors


def weigh_by_frequency(
    errors: np.ndarray, units: Sequence[Unit], profile: ActivationProfile | None, num_experts: Mapping[str, int]
) -> np.ndarray:
    """errors [units, options] times the share of its layer's tokens that a unit sees.

    1 for what every token passes; 1/experts for an expert when there is no profile. num_experts: by layer path.

    Source: MxMoE weighs experts by activation frequency (arXiv:2505.05799, section 4.1); it measures the layer's output
    error where this measures the weight's; see `layer_error.measure_sensitivities` for that.
    """
    weights = np.ones(len(units))
    for row, unit in enumerate(units):
        if unit.module.expert is not None:
            layer = unit.module.path.rpartition(".")[0]
            uniform = 1 / num_experts[layer]
            weights[row] = uniform if profile is None else profile.frequencies(layer)[unit.module.expert]
    return errors * weights[:, None]


def _list_options(
    module: Module, block: Block, schemes: Sequence[Scheme], fine: bool = False
) -> tuple[Scheme | None, ...]:
    options: list[Scheme | None] = []
    if not schemes:
        usual = choose_group_size(block.K)
        for bits in DEFAULT_BITS:
            options.append(Scheme(16) if block.K % 8 else Scheme(bits, 16, usual))
            if not fine or bits not in FINE_BITS:
                continue
            # The same column is the same kind of scheme for every unit, so that one column is a uniform plan.
            for size, symmetric in (*((size, False) for size in FINE_GROUPS), (usual, True), (-1, True)):
                # A whole row that is one usual group: a second name for the same thing.
                size = usual if size == -1 and usual == block.K else size
                fits = block.K % 8 == 0 and (size == -1 or block.K % size == 0)
                options.append(Scheme(bits, 16, size, symmetric) if fits else options[-1])
        return tuple(options)
    reasons = []
    for scheme in schemes:
        try:
            scheme.stored_bytes(block.N, block.K)
            options.append(scheme)
        except ValueError as error:
            options.append(None)
            reasons.append(str(error))
    if not any(options):
        raise PlanError(f"{module.path} {block.name} takes none of the schemes: {'; '.join(reasons)}")
    return tuple(options)
