# SPDX-License-Identifier: Apache-2.0
"""The one scheduler factory. vLLM runs one scheduler class per engine, so features meet here as mixins.

Outermost first:  LaneMixin > ForcedTokensMixin > GoodputMixin > AsyncScheduler | Scheduler

The class travels to EngineCore as text (`name_scheduler`), not as a pickled type: vLLM resolves
`vllm_ext.scheduling.factory.<name>` by attribute, and this module's `__getattr__` composes the class there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping

#: Feature -> "module:Class" of its scheduler mixin, outermost first. Imported only where it is used.
MIXINS: Mapping[str, str] = {
    "semipd": "vllm_ext.scheduling.semipd.scheduler:LaneMixin",
    "structured": "vllm_ext.scheduling.forced_tokens:ForcedTokensMixin",
    "smartspec": "vllm_ext.scheduling.goodput:GoodputMixin",
}

_STOCK = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "Scheduler": "vllm.v1.core.sched.scheduler:Scheduler",
}


def name_scheduler(features: Iterable[str], base: str = "AsyncScheduler") -> str | None:
    """Value for `scheduler_cls`, or None where no active feature schedules and vLLM's own class stays.

    `base` is the stock class underneath: "AsyncScheduler", or "Scheduler" where asynchronous scheduling is off.
    """
    scheduling = [feature for feature in MIXINS if feature in set(features)]
    return f"{__name__}.{'_with_'.join([base, *scheduling])}" if scheduling else None


@functools.cache
def make_scheduler(base: str, features: tuple[str, ...]) -> type:
    """Compose the scheduler class of `features` over a stock class.

    The order is that of `MIXINS`, whatever the order of `features`. Raises KeyError for an unknown base or a
    feature that has no mixin, naming it.
    """
    if base not in _STOCK:
        raise KeyError(f"no scheduler {base!r} to build on; known: {', '.join(_STOCK)}")
    unknown = set(features) - set(MIXINS)
    if unknown:
        raise KeyError(f"features without a scheduler mixin: {', '.join(sorted(unknown))}")
    bases = [_load(MIXINS[feature]) for feature in MIXINS if feature in features]
    return type("_with_".join([base, *features]), (*bases, _load(_STOCK[base])), {"__module__": __name__})


def _load(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> type:
    base, *features = name.split("_with_")
    if base not in _STOCK or not features:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_scheduler(base, tuple(features))
