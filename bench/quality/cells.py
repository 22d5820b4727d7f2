# SPDX-License-Identifier: Apache-2.0
"""The cells of the quality table: a method at a budget of true bits, calibrated with a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.quantization.scheme import Scheme

#: Texts of the shipped model, by domain: {name: (calibration, held out)}.
TEXTS = {"kjv": ("kjv_train.txt", "kjv_val.txt"), "py": ("py_train.txt", "py_val.txt")}

#: The narrowest block of that model: (N, K).
SHAPE = (256, 128)

BF16 = "bf16"

#: Of the cells that are measured once.
FIRST_SEED = 0

#: Calibration windows of 512 tokens, of all texts together; a quarter of them is held out where something is chosen.
NUM_WINDOWS = 64


@dataclass(frozen=True)
class Budget:
    """A column. bits: true bits a weight, scales and zero points included. uniform: schemes of the uniform rows, by
    row: of those that fit the one that its rounding did best with on held-out text, which is not always the largest: at
    2 bits zero points are worth more than smaller groups. schemes: what mixed plans choose from; nothing: the default
    of `vllm-ext quantize`. mxmoe_schemes: what MxMoE's row chooses from, one group size and zero points everywhere as
    in its paper."""

    name: str
    bits: float
    uniform: Mapping[str, str]
    schemes: tuple[str, ...] = ()
    mxmoe_schemes: tuple[str, ...] = tuple(f"w{bits}a16_g128" for bits in (2, 3, 4, 5, 6, 8))


BUDGETS = (
    Budget("2.25", 2.25, {"rtn": "w2a16_g128", "gptq": "w2a16_g128", "gptaq": "w2a16_g128"}),
    Budget("2.5", 2.5, {"rtn": "w2a16_g64", "gptq": "w2a16_g64", "gptaq": "w2a16_g64"}),
    Budget("3.25", 3.25, {"rtn": "w3a16_g128", "gptq": "w3a16_g64_sym", "gptaq": "w3a16_g64_sym"}),
    Budget("4.25", 4.25, {"rtn": "w4a16_g64_sym", "gptq": "w4a16_g128", "gptaq": "w4a16_g128"}),
    Budget(
        "5a8", 5.0, dict.fromkeys(("rtn", "gptq", "gptaq"), "w4a8_g32"),
        tuple(
            f"w{bits}a8_g{group}"
            for bits in (3, 4, 5, 6, 8)
            for group in ("128", "128_sym", "-1", "-1_sym", *(("64", "32") if bits < 5 else ()))
        ),
        tuple(f"w{bits}a8_g128" for bits in (3, 4, 5, 6, 8)),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row. arguments: of `quantize_model`. uniform: one scheme for all blocks. options: of the mixed plan.
    mxmoe_schemes: choose from those of the budget. equal: exactly the bytes of the uniform row EQUAL_ROW, not the whole
    budget. budgets: names of those it is measured at; nothing: all."""

    name: str
    title: str
    arguments: Mapping[str, Any]
    uniform: bool = False
    options: PlanOptions = field(default_factory=PlanOptions)
    mxmoe_schemes: bool = False
    equal: bool = False
    budgets: tuple[str, ...] = ()


_MXMOE = PlanOptions(measure="layer", per_layer=True, force_mixed=True, compare=False)
_BEST: dict[str, Any] = {"rounding": "gptaq", "rotate": True, "repair_router": True}

METHODS = (
    Method("rtn", "round to nearest, uniform", {"rounding": "rtn"}, uniform=True),
    Method(
        "gptq", "GPTQ with rotation, act-order and clip search, uniform",
        {"rounding": "gptq", "rotate": True, "sweeps": 0}, uniform=True,
    ),
    Method("gptaq", "GPTAQ, code refinement and router repair, uniform", _BEST, uniform=True),
    Method(
        "mxmoe",
        "MxMoE's allocation (layer norms, each layer the same bits) over the kind of schemes its paper has: one group "
        "size, zero points everywhere; rounding as the row above",
        _BEST, options=_MXMOE, mxmoe_schemes=True,
    ),
    Method(
        "mxmoe_wide", "MxMoE's allocation over exactly the schemes that ours has; rounding the same", _BEST,
        options=_MXMOE,
    ),
    Method("ours", "one allocation over all layers by expected loss; rounding the same", _BEST),
    Method(
        "ours_equal", "ours with exactly the bytes of `gptaq`", _BEST, equal=True,
        options=PlanOptions(force_mixed=True, compare=False), budgets=("2.5",),
    ),
)  # fmt: skip

#: Rows that ours is to beat, the better of them at each budget, and those that it must never be worse than.
MXMOE_ROWS = ("mxmoe", "mxmoe_wide")
UNIFORM_ROWS = ("gptq", "gptaq")

#: The uniform row that differs from ours in mixing alone.
EQUAL_ROW = "gptaq"


@dataclass(frozen=True)
class Cell:
    """One checkpoint of the table. calibration: domains whose training text is used."""

    method: Method
    budget: Budget
    seed: int
    calibration: tuple[str, ...] = tuple(TEXTS)

    @property
    def arm(self) -> str:
        """Name of its record, without the seed."""
        name = f"{self.method.name}_{self.budget.name}"
        return name if len(self.calibration) == len(TEXTS) else f"{name}_from_{'_'.join(self.calibration)}"

    @property
    def options(self) -> PlanOptions:
        """Of the plan. Below 3 bits mixing wins by far: the comparison with a uniform plan is left out there."""
        return replace(self.method.options, compare=self.method.options.compare and self.budget.bits > 3)

    def arguments(self, model: Path) -> dict[str, Any]:
        """Keyword arguments of `quantize_model`."""
        arguments: dict[str, Any] = {"seed": self.seed, "options": self.options, **self.method.arguments}
        if arguments["rounding"] != "rtn":
            arguments["calibration"] = [model / TEXTS[name][0] for name in self.calibration]
            arguments["num_windows"] = NUM_WINDOWS
        if self.method.uniform:
            arguments |= {
                "bits": self.budget.bits,
                "uniform": True,
                "schemes": [Scheme.parse(self.budget.uniform[self.method.name])],
                # One scheme is left: there is nothing to judge.
                "options": PlanOptions(measure="weight"),
            }
        else:
            arguments |= {
                "bits": self._count_equal_bits() if self.method.equal else self.budget.bits,
                "schemes": [
                    Scheme.parse(name)
                    for name in (self.budget.mxmoe_schemes if self.method.mxmoe_schemes else self.budget.schemes)
                ],
            }
        return arguments

    def _count_equal_bits(self) -> float:
        """True bits of the uniform row: the groups of its scheme divide both widths of the shipped model."""
        return Scheme.parse(self.budget.uniform[EQUAL_ROW]).bits_per_weight(*SHAPE)

    def describe(self) -> dict[str, Any]:
        """The same, JSON-ready: what a record was made with, whatever this file says later."""
        arguments = self.arguments(Path())
        options = {key: value for key, value in asdict(arguments["options"]).items() if key not in ("work", "tables")}
        return {
            **arguments,
            "schemes": [str(scheme) for scheme in arguments["schemes"]],
            "calibration": [str(path) for path in arguments.get("calibration", ())],
            "options": {**options, "batches": {str(size): share for size, share in options["batches"].items()}},
        }


def list_cells(seeds: tuple[int, ...], quick: bool = False) -> Iterator[Cell]:
    """Every cell, seed after seed; within a seed the low budgets first, then, for FIRST_SEED, text of one domain.

    quick: two methods at one budget.
    """
    for seed in seeds:
        if quick:
            for method in (_find("gptq"), _find("ours")):
                yield Cell(method, BUDGETS[0], seed)
            continue
        for budget in BUDGETS:
            for method in METHODS:
                # Rounding to nearest knows no seed.
                once = method.arguments["rounding"] == "rtn" and seed != FIRST_SEED
                if not once and (not method.budgets or budget.name in method.budgets):
                    yield Cell(method, budget, seed)
        if seed == FIRST_SEED:
            for name in TEXTS:
                for method in (_find("gptq"), _find("gptaq"), _find("ours")):
                    yield Cell(method, _find_budget("2.5"), seed, (name,))


def _find_budget(name: str) -> Budget:
    return next(budget for budget in BUDGETS if budget.name == name)


def _find(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)
