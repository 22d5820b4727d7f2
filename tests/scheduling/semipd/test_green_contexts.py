# SPDX-License-Identifier: Apache-2.0
"""Splits of a GPU's SMs: their arithmetic, and what is asked of the driver, of which a stand-in keeps account."""

from __future__ import annotations

import itertools
import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd import green_contexts
from vllm_ext.scheduling.semipd.green_contexts import (
    LEAST_SMS,
    GreenContextsUnavailable,
    GreenPartition,
    SmRules,
    SmSplit,
    find_rules,
    plan_sm_splits,
)

HOPPER = SmRules(8, 8)


def test_splits_of_known_gpus() -> None:
    # H200, A100 and RTX 4090.
    assert plan_sm_splits(132, find_rules(9)) == [(36, 96), (68, 64), (100, 32)]
    assert plan_sm_splits(108, find_rules(8)) == [(28, 80), (54, 54), (80, 28)]
    assert plan_sm_splits(128, find_rules(8)) == [(32, 96), (64, 64), (96, 32)]
    assert plan_sm_splits(148, find_rules(10)) == [(36, 112), (76, 72), (108, 40)]
    assert SmSplit(36, 96).measure_shares() == pytest.approx((36 / 132, 96 / 132))


@given(
    num_sms=st.integers(1, 300),
    rules=st.sampled_from([find_rules(major) for major in (6, 7, 8, 9, 10, 12)]),
    shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6),
)
def test_splits_are_whole_allowed_and_in_order(num_sms: int, rules: SmRules, shares: list[float]) -> None:
    try:
        splits = plan_sm_splits(num_sms, rules, shares)
    except GreenContextsUnavailable:
        assert num_sms < 2 * LEAST_SMS + rules.multiple
        return
    assert 1 <= len(splits) <= len(shares)
    for split in splits:
        assert sum(split) == num_sms
        assert min(split) >= LEAST_SMS
        assert split.decode % rules.multiple == 0
        # The nearest that is allowed to one of the shares.
        room = (LEAST_SMS - rules.multiple, num_sms - LEAST_SMS + rules.multiple)
        assert room[0] < split.decode < room[1]
    assert [one.prefill for one in splits] == sorted({one.prefill for one in splits})
    for share in shares:
        wanted = min(max((1 - share) * num_sms, LEAST_SMS), num_sms - LEAST_SMS)
        assert min(abs(one.decode - wanted) for one in splits) < rules.multiple


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(GreenContextsUnavailable, match="a GPU of 46 SMs is too small for two lanes of 24"):
        plan_sm_splits(46, HOPPER)
    for shares in ([], [0.0], [0.5, 1.0]):
        with pytest.raises(ValueError, match="each between 0 and 1"):
            plan_sm_splits(132, HOPPER, shares)
    with pytest.raises(GreenContextsUnavailable, match=r"this GPU has 5\.x"):
        find_rules(5)


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


NAMES = {
    "cuDeviceGet": "get_device",
    "cuDeviceGetDevResource": "get_resource",
    "cuDevSmResourceSplitByCount": "split",
    "cuDevResourceGenerateDesc": "describe",
    "cuGreenCtxCreate": "create_context",
    "cuGreenCtxStreamCreate": "create_stream",
    "cuStreamDestroy": "destroy_stream",
    "cuGreenCtxDestroy": "destroy_context",
}


class FakeDriver:
    """The calls of `cuda.bindings.driver` with its ways of answering; `refused`: a call that fails, from `after` on."""

    CUresult = Result
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, num_sms: int = 132, refused: str = "", after: int = 0, **said: int) -> None:
        self.num_sms, self.refused, self.left, self.said = num_sms, refused, after, said
        self.alive: dict[str, set[int]] = {"context": set(), "stream": set()}
        self.sms_of: dict[int, set[int]] = {}
        self.handles = itertools.count(100)
        self.missing = ""

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES or name == self.__dict__.get("missing"):
            raise AttributeError(name)
        return getattr(self, NAMES[name])

    def answer(self, name: str, *values: Any) -> tuple[Any, ...]:
        if name == self.refused:
            self.left -= 1
            if self.left < 0:
                return (Result.CUDA_ERROR_NOT_SUPPORTED, *(None for _ in values))
        return (Result.CUDA_SUCCESS, *values)

    def make(self, sms: set[int]) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(sms), **self.said), sms=sms)

    def get_device(self, ordinal: int) -> Any:
        return self.answer("cuDeviceGet", ordinal)

    def get_resource(self, device: Any, kind: Any) -> Any:
        assert kind == 1
        return self.answer("cuDeviceGetDevResource", self.make(set(range(self.num_sms))))

    def split(self, groups: int, resource: Any, flags: int, least: int) -> Any:
        assert (groups, flags) == (1, 0)
        # Rounded up to the granularity of Hopper.
        count = -(-least // 8) * 8
        first, rest = set(range(count)), set(range(count, self.num_sms))
        return self.answer("cuDevSmResourceSplitByCount", [self.make(first)], 1, self.make(rest))

    def describe(self, resources: list[Any], count: int) -> Any:
        assert len(resources) == count == 1
        return self.answer("cuDevResourceGenerateDesc", resources[0])

    def create_context(self, description: Any, device: Any, flags: int) -> Any:
        assert flags == 1
        handle = next(self.handles)
        answer = self.answer("cuGreenCtxCreate", handle)
        if answer[0] == Result.CUDA_SUCCESS:
            self.alive["context"].add(handle)
            self.sms_of[handle] = description.sms
        return answer

    def create_stream(self, context: int, flags: int, priority: int) -> Any:
        assert context in self.alive["context"]
        handle = next(self.handles)
        answer = self.answer("cuGreenCtxStreamCreate", handle)
        if answer[0] == Result.CUDA_SUCCESS:
            self.alive["stream"].add(handle)
            self.sms_of[handle] = self.sms_of[context]
        return answer

    def destroy_stream(self, stream: int) -> Any:
        self.alive["stream"].remove(stream)
        return (Result.CUDA_SUCCESS,)

    def destroy_context(self, context: int) -> Any:
        assert not self.alive["stream"], "streams go before their contexts"
        self.alive["context"].remove(context)
        return (Result.CUDA_SUCCESS,)


def test_lanes_of_a_split_share_no_sm_and_have_all_of_them() -> None:
    driver = FakeDriver()
    partition = GreenPartition(0, 9, driver=driver)
    assert partition.splits == plan_sm_splits(132, HOPPER)
    for index, split in enumerate(partition.splits):
        prefill, decode = (driver.sms_of[partition.get_stream(lane, index)] for lane in (Lane.PREFILL, Lane.DECODE))
        assert (len(prefill), len(decode)) == split
        assert not prefill & decode
        assert len(prefill | decode) == 132
    assert len(driver.alive["stream"]) == len(driver.alive["context"]) == 6
    for _ in range(2):
        partition.close()
        assert driver.alive == {"context": set(), "stream": set()}


def test_the_drivers_own_rules_come_before_the_table() -> None:
    driver = FakeDriver(minSmPartitionSize=16, smCoscheduledAlignment=16)
    assert GreenPartition(0, 9, driver=driver).splits == [(36, 96), (68, 64), (100, 32)]
    driver = FakeDriver(148, minSmPartitionSize=16, smCoscheduledAlignment=16)
    assert GreenPartition(0, 10, driver=driver).splits == [(36, 112), (68, 80), (116, 32)]


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if not name.endswith("Destroy")],
)
def test_a_refused_call_leaves_nothing_behind(name: str) -> None:
    once = name.startswith("cuDeviceGet")
    for after in range(1 if once else 3):
        driver = FakeDriver(refused=name, after=after)
        with pytest.raises(
            GreenContextsUnavailable, match=f"{name} answered CUDA_ERROR_NOT_SUPPORTED: the driver must"
        ):
            GreenPartition(0, 9, driver=driver)
        assert driver.alive == {"context": set(), "stream": set()}


def test_old_bindings_are_named() -> None:
    driver = FakeDriver()
    driver.missing = "cuGreenCtxCreate"
    with pytest.raises(GreenContextsUnavailable, match=r"have no cuGreenCtxCreate: pip install 'cuda-bindings>=12\.4'"):
        GreenPartition(0, 9, driver=driver)


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenContextsUnavailable, match="pip install cuda-bindings"):
        green_contexts.load_driver()
