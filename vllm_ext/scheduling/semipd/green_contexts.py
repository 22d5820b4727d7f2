# SPDX-License-Identifier: Apache-2.0
"""How the lanes share a GPU: green contexts of CUDA, each with streams that run on its multiprocessors (SMs) only.

Both contexts of a split come from one division of the device, since contexts that are made one by one may overlap. The
decode lane gets the aligned group and the prefill lane what is left. All splits are made at the start: to change from
one to another is to take another stream. Only SMs are divided; memory bandwidth and the second-level cache are not.

No part of the engine uses this yet: vLLM's V2 runner has no lanes so far. Never run on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_ext.scheduling.phases.controller import Split
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.cores import SHARES

#: SMs that each lane has at least. Kernels that wait for all their blocks at a barrier count the SMs of the device, not
#: of the stream, and hang where too few run at once: vLLM keeps FlashInfer's top-k away from devices of 16 and fewer.
LEAST_SMS = 24


class GreenContextsUnavailable(RuntimeError):  # noqa: N818 - reads as what is the case
    """This machine cannot divide its GPU; the message says why, and what to do."""


class SmRules(NamedTuple):
    """What the driver asks of a group of SMs: so many at least, and a multiple of so many."""

    least: int
    multiple: int


class SmSplit(NamedTuple):
    """SMs of both lanes."""

    prefill: int
    decode: int

    def measure_shares(self) -> Split:
        """Parts of the SMs."""
        total = self.prefill + self.decode
        return Split(self.prefill / total, self.decode / total)


def find_rules(major: int) -> SmRules:
    """Rules by the major number of the compute capability, for drivers that do not say them themselves.

    From the driver's reference, section "Green Contexts". Raises GreenContextsUnavailable below 6.
    """
    if major < 6:
        raise GreenContextsUnavailable(
            f"green contexts need compute capability 6.0, this GPU has {major}.x; set vllm_ext.semipd.enabled to false"
        )
    return {6: SmRules(1, 1), 7: SmRules(2, 2), 8: SmRules(4, 2)}.get(major, SmRules(8, 8))


def plan_sm_splits(num_sms: int, rules: SmRules, shares: Sequence[float] = SHARES) -> list[SmSplit]:
    """Splits of a device by the share of the prefill lane, least prefill first, without repetition.

    The decode lane's count is the nearest that the rules allow; both lanes have LEAST_SMS at least. With steps of 8 the
    default shares of an H200's 132 SMs are (36, 96), (68, 64), (100, 32). Raises ValueError for a share that is not
    between 0 and 1, GreenContextsUnavailable for a device too small for two lanes.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares of the prefill lane are {list(shares)}: need some, each between 0 and 1")
    least = -(-max(LEAST_SMS, rules.least) // rules.multiple) * rules.multiple
    most = (num_sms - LEAST_SMS) // rules.multiple * rules.multiple
    if most < least:
        raise GreenContextsUnavailable(
            f"a GPU of {num_sms} SMs is too small for two lanes of {least}; set vllm_ext.semipd.enabled to false"
        )
    wanted = [round((1 - share) * num_sms / rules.multiple) * rules.multiple for share in shares]
    counts = sorted({min(max(count, least), most) for count in wanted}, reverse=True)
    return [SmSplit(num_sms - count, count) for count in counts]


class GreenPartition:
    """Streams of both lanes for every split of one device. Close it when nothing runs on them any more.

    `splits` are those that the driver made. CUDA must be initialized: the contexts belong to the primary context's
    device.
    """

    def __init__(self, device: int, major: int, shares: Sequence[float] = SHARES, driver: Any = None) -> None:
        """device: its ordinal; major: of its compute capability; driver: tests give one, else `cuda.bindings.driver`.

        Raises GreenContextsUnavailable, with nothing left behind, where a step is refused.
        """
        self._driver = load_driver() if driver is None else driver
        self._contexts: list[Any] = []
        self._streams: list[dict[Lane, Any]] = []
        self.splits: list[SmSplit] = []
        try:
            handle = self._call("cuDeviceGet", device)
            kind = self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
            sms = self._call("cuDeviceGetDevResource", handle, kind)
            for planned in plan_sm_splits(sms.sm.smCount, self._read_rules(sms, major), shares):
                self._make_split(handle, sms, planned)
        except BaseException:
            self.close()
            raise

    def get_stream(self, lane: Lane, index: int) -> int:
        """The CUDA stream (CUstream as a number, for torch.cuda.ExternalStream) of a lane in a split."""
        return int(self._streams[index][lane])

    def close(self) -> None:
        """Destroy streams and contexts; again, it does nothing."""
        streams = [stream for both in self._streams for stream in both.values()]
        contexts, self._contexts, self._streams = self._contexts, [], []
        for stream in streams:
            self._driver.cuStreamDestroy(stream)
        for context in contexts:
            self._driver.cuGreenCtxDestroy(context)

    def _make_split(self, device: Any, sms: Any, planned: SmSplit) -> None:
        groups, count, rest = self._call("cuDevSmResourceSplitByCount", 1, sms, 0, planned.decode)
        if count != 1 or rest.sm.smCount < LEAST_SMS:
            raise GreenContextsUnavailable(
                f"CUDA made {count} groups of {planned.decode} SMs and left {rest.sm.smCount}; give other "
                "vllm_ext.semipd.splits, or set vllm_ext.semipd.enabled to false"
            )
        both: dict[Lane, Any] = {}
        # Known before it is whole, so that `close` finds what there is.
        self._streams.append(both)
        for lane, resource in ((Lane.PREFILL, rest), (Lane.DECODE, groups[0])):
            description = self._call("cuDevResourceGenerateDesc", [resource], 1)
            flags = int(self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
            context = self._call("cuGreenCtxCreate", description, device, flags)
            self._contexts.append(context)
            not_blocking = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            both[lane] = self._call("cuGreenCtxStreamCreate", context, not_blocking, 0)
        self.splits.append(SmSplit(rest.sm.smCount, groups[0].sm.smCount))

    def _read_rules(self, sms: Any, major: int) -> SmRules:
        # Drivers from CUDA 13 on say it; the table is a guideline.
        least, multiple = (getattr(sms.sm, name, 0) for name in ("minSmPartitionSize", "smCoscheduledAlignment"))
        return SmRules(least, multiple) if least and multiple else find_rules(major)

    def _call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._driver, name, None)
        if function is None:
            raise GreenContextsUnavailable(
                f"these CUDA bindings have no {name}: pip install 'cuda-bindings>=12.4', or set "
                "vllm_ext.semipd.enabled to false"
            )
        code, *values = function(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise GreenContextsUnavailable(
                f"{name} answered {getattr(code, 'name', code)}: the driver must be of CUDA 12.4 or newer, and the GPU "
                "not divided by MIG or MPS; else set vllm_ext.semipd.enabled to false"
            )
        return values[0] if len(values) == 1 else values


def load_driver() -> Any:
    """`cuda.bindings.driver`, which CUDA builds of torch bring along. Raises GreenContextsUnavailable without it."""
    try:
        # Only machines with a GPU have it.
        driver = importlib.import_module("cuda.bindings.driver")
        # The first call loads libcuda.
        driver.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise GreenContextsUnavailable(
            f"green contexts need an NVIDIA driver and its Python bindings ({error}): pip install cuda-bindings, or "
            "set vllm_ext.semipd.enabled to false"
        ) from error
    return driver
