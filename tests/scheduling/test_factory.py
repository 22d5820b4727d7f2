# SPDX-License-Identifier: Apache-2.0
"""The scheduler factory, over vLLM's real scheduler classes."""

from __future__ import annotations

import sys

import pytest
from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ext.scheduling import factory


class Outer:
    """A mixin that must end up outside `Inner`."""


class Inner:
    """A mixin that must end up next to vLLM's class."""


@pytest.fixture
def two_mixins(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__].__name__
    monkeypatch.setattr(factory, "MIXINS", {"semipd": f"{module}:Outer", "smartspec": f"{module}:Inner"})
    factory.make_scheduler.cache_clear()


def test_no_scheduling_feature_leaves_the_stock_class() -> None:
    assert factory.name_scheduler(("mxmoe",)) is None
    assert factory.name_scheduler(()) is None


def test_order_is_fixed_and_vllm_resolves_the_name(two_mixins: None) -> None:
    name = factory.name_scheduler(("smartspec", "mxmoe", "semipd"))
    assert name == "vllm_ext.scheduling.factory.AsyncScheduler_with_semipd_with_smartspec"
    resolved = SchedulerConfig(max_model_len=64, is_encoder_decoder=False, scheduler_cls=name).get_scheduler_cls()
    assert resolved.__mro__[1:4] == (Outer, Inner, AsyncScheduler)
    assert resolved is factory.make_scheduler("AsyncScheduler", ("semipd", "smartspec"))


def test_synchronous_base(two_mixins: None) -> None:
    name = factory.name_scheduler(("smartspec",), base="Scheduler")
    assert name is not None
    built = getattr(factory, name.rpartition(".")[2])
    assert issubclass(built, Scheduler)
    assert not issubclass(built, AsyncScheduler)


def test_unknown_names(two_mixins: None) -> None:
    with pytest.raises(KeyError, match="no scheduler 'Other'"):
        factory.make_scheduler("Other", ("semipd",))
    with pytest.raises(KeyError, match="mxmoe"):
        factory.make_scheduler("Scheduler", ("mxmoe",))
    with pytest.raises(AttributeError, match="nothing_here"):
        factory.nothing_here  # noqa: B018
