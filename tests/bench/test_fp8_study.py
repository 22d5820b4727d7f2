# SPDX-License-Identifier: Apache-2.0
"""The study of FP8 activations: its rounding and its imitation of a tensor core, and what the committed records say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.kernels import fp8_study
from bench.kernels.fp8_study import CASE, Input, add_as_hopper, plant_outliers, rotate, round_e4m3
from bench.records import RESULTS, Record, load_records


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return {record.arm: record for record in load_records(RESULTS) if record.case == CASE}


def test_e4m3_keeps_the_largest_of_a_group_and_four_digits_of_the_others() -> None:
    x = torch.randn(20, 256)
    x[3, 130] = 1e4
    x[5] = 0
    for group_size in (128, -1):
        rounded = round_e4m3(x, group_size)
        groups, values = (one.unflatten(-1, (-1, 128 if group_size == 128 else 256)) for one in (x, rounded))
        largest = groups.abs().amax(-1, keepdim=True)
        assert torch.allclose(values.abs().amax(-1, keepdim=True), largest, rtol=1e-6)
        # Half a unit of three digits behind the leading one, or of the smallest subnormal number.
        assert ((values - groups).abs() <= groups.abs() / 16 * 1.0001 + largest / 448 * 2**-10).all()
    assert torch.equal(round_e4m3(x, 128)[5], x[5])


def test_codes_are_e4m3_numbers_as_they_are() -> None:
    """What the FP8 loop of compile_variants.py rests on."""
    codes = torch.arange(17, dtype=torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), codes.float() / 512)


def test_short_sums_are_exact_where_nothing_is_cut_off() -> None:
    codes, x = torch.randint(0, 4, (5, 128)).double(), torch.randint(-3, 4, (7, 128)).double()
    assert torch.equal(add_as_hopper(codes, x), x @ codes.T)


def test_short_sums_cut_off_what_lies_far_below_the_largest() -> None:
    codes = torch.ones(1, 32).double()
    x = torch.zeros(4, 32).double()
    x[:, 0] = 1.0
    x[0, 1:] = 2.0**-13
    x[1, 1:] = 2.0**-13 * 0.99
    x[2, 1:] = -(2.0**-13) * 0.99
    x[3, 1:] = 2.0**-12 * 1.4
    assert add_as_hopper(codes, x).flatten().tolist() == [1 + 31 * 2**-13, 1.0, 1.0, 1 + 31 * 2**-12]


def test_short_sums_carry_on_from_the_sum_so_far() -> None:
    x = torch.zeros(1, 64).double()
    x[0, 0], x[0, 40] = 1.0, 2.0**-14
    assert add_as_hopper(torch.ones(1, 64).double(), x).item() == 1.0
    x[0, 0] = 0.5
    assert add_as_hopper(torch.ones(1, 64).double(), x).item() == 0.5 + 2.0**-14


def test_planting_and_rotating_leave_products_as_they_were() -> None:
    one = Input(torch.randn(6, 256), torch.randn(10, 256))
    exact = one.x @ one.weight.T
    planted = plant_outliers(one, 100, seed=3)
    changed = (planted.x != one.x).any(0).nonzero().flatten()
    assert [len(changed[changed < 128]), len(changed)] == [1, 2]
    for other in (planted, rotate(planted, 0)):
        assert torch.allclose(other.x @ other.weight.T, exact, atol=2e-3)


def test_int8_loses_a_bounded_share_of_a_group_of_128_and_not_of_a_row() -> None:
    """The bound of docs/gpu-kernels-fp8.md, whatever the outliers."""
    bound = np.sqrt(128 / 12) / 127
    x = torch.randn(50, 2048)
    x[:, ::128] *= 1000
    x[:, 5] *= 1000
    for name, low, high in (("int8_g128", 0.0, bound * 1.05), ("int8_token", 2 * bound, 1.0)):
        rounded = fp8_study.ROUNDERS[name](x)
        groups, errors = (one.unflatten(-1, (-1, 128)).norm(dim=-1) for one in (x, rounded - x))
        assert low < float((errors / groups).mean(0).amax()) <= high


def test_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(8, 128), torch.randn(12, 128)
    monkeypatch.setattr(fp8_study, "collect_inputs", lambda rows, experts: {"gate_up": [Input(x, weight)]})
    monkeypatch.setattr(fp8_study, "NORMAL_SHAPE", (4, 256, 8))
    assert fp8_study.main(["--out", str(tmp_path)]) == 0
    assert {record.arm for record in load_records(tmp_path)} == set(fp8_study.ROUNDERS)
    with pytest.raises(SystemExit):
        fp8_study.main(["--rows", "0"])


def test_the_page_is_that_of_the_records(records: dict[str, Record]) -> None:
    in_order = [records[arm] for arm in fp8_study.ROUNDERS]
    assert (RESULTS / CASE / "README.md").read_text() == fp8_study.render_page(in_order)


def test_what_the_page_concludes_is_in_the_records(records: dict[str, Record]) -> None:
    def find(arm: str, metric: str) -> float:
        value = records[arm].metrics[metric].value
        assert value is not None
        return value

    for name in ("gate_up", "down", "normal"):
        assert find("int8_g128", f"{name}_rounding") < find("e4m3_g128", f"{name}_rounding")
        assert find("int8_g128", f"{name}_w4") < find("e4m3_g128", f"{name}_w4") < 1.05 * find("a16", f"{name}_w4")
    assert find("e4m3_g128", "gate_up_outlier100_output") < 0.5 * find("int8_g128", "gate_up_outlier100_output")
    rotated = find("int8_g128", "gate_up_outlier100_rotated_output")
    assert rotated < 1.5 * find("e4m3_g128", "gate_up_outlier100_output")
    assert find("e4m3_g128", "gate_up_adding") < 0.1 * find("e4m3_g128", "gate_up_output")
