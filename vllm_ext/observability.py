# SPDX-License-Identifier: Apache-2.0
"""Metrics that cross processes: EngineCore and workers write a shared-memory record, the API process serves it.

vLLM's messages between EngineCore and the API server are typed and drop extra fields, so numbers travel beside
them. The API process makes a private directory in shared memory and names it in VLLM_EXT_METRICS_DIR. Every
process that writes owns one file there, eight-byte floats only:

    header  [layout, engine_index]        then one value per entry of METRICS

A file is written by one process and read by any; an aligned eight-byte store is not torn, so no lock is shared.
At a scrape the Prometheus collector sums the files of each engine; of a process that is gone the counters still
count, and the gauges no longer do. Without the variable, writing does nothing. Metrics never stop a server: where
shared memory is full or gone, one warning is logged and nothing is counted from then on.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import mmap
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger("vllm.vllm_ext")

#: Directory of this server's records; set by the API process, inherited by the others.
DIRECTORY_ENV = "VLLM_EXT_METRICS_DIR"

_DIRECTORY_PREFIX = f"vllm_ext-{os.getuid()}-"
_LOCK_NAME = "owner.lock"


@dataclass(frozen=True)
class Metric:
    """One exported number; `name` follows vllm_ext:<feature>_<noun>_<unit>[_total]."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str


METRICS: tuple[Metric, ...] = (
    Metric("vllm_ext:mxmoe_layer_count", "gauge", "MoE layers whose experts are held in mixed precision."),
    Metric(
        "vllm_ext:mxmoe_weight_bytes",
        "gauge",
        "Stored bytes of quantized expert weights: codes, scales, zero points and alignment.",
    ),
    Metric("vllm_ext:mxmoe_weight_count", "gauge", "Expert weights held in mixed precision."),
    Metric(
        "vllm_ext:mxmoe_resident_bytes",
        "gauge",
        "Bytes of those layers' experts in memory, in the layout that the kernels read.",
    ),
    Metric(
        "vllm_ext:mxmoe_linear_weight_bytes",
        "gauge",
        "Stored bytes of quantized linear layers outside of the experts: codes, scales, zero points and alignment.",
    ),
    Metric("vllm_ext:mxmoe_linear_weight_count", "gauge", "Weights of those linear layers."),
    Metric(
        "vllm_ext:mxmoe_linear_resident_bytes",
        "gauge",
        "Bytes of those linear layers in memory, in the layout that the kernels read.",
    ),
    Metric(
        "vllm_ext:mxmoe_routed_pairs_total",
        "counter",
        "(token, expert) pairs computed by the CPU path of vllm_ext::mixed_moe, over all layers and ranks.",
    ),
    Metric("vllm_ext:kv_cache_layer_count", "gauge", "Attention layers whose KV cache is quantized."),
    Metric(
        "vllm_ext:kv_cache_token_bytes",
        "gauge",
        "Bytes of a token in the quantized pages of those layers: codes, scales and lows.",
    ),
    Metric("vllm_ext:kv_cache_token_elements", "gauge", "Elements of K and V of a token in those layers."),
    Metric(
        "vllm_ext:kv_cache_stored_tokens_total", "counter", "(token, layer) pairs quantized, over all layers and ranks."
    ),
    Metric(
        "vllm_ext:kv_cache_attended_tokens_total",
        "counter",
        "(query token, layer) pairs whose attention read quantized pages, over all layers and ranks.",
    ),
    Metric(
        "vllm_ext:kv_cache_saturated_groups_total",
        "counter",
        "Groups of keys or values, in prompts, that begin or spread beyond what fp8 scales and lows hold.",
    ),
    Metric(
        "vllm_ext:kv_cache_underflow_groups_total",
        "counter",
        "Groups of keys or values, in prompts, whose levels lie closer than fp8 scales tell apart.",
    ),
    Metric("vllm_ext:structured_xgrammar_requests_total", "counter", "Structured requests that xgrammar serves."),
    Metric("vllm_ext:structured_guidance_requests_total", "counter", "Structured requests that llguidance serves."),
    Metric(
        "vllm_ext:structured_refused_total",
        "counter",
        "Specifications refused: a keyword that no engine honours, or over a limit.",
    ),
    Metric("vllm_ext:structured_trials_total", "counter", "Costly specifications tried in a process of their own."),
    Metric("vllm_ext:structured_compiles_total", "counter", "Specifications compiled in the engine."),
    Metric("vllm_ext:structured_compile_seconds_total", "counter", "Time that took, in threads beside it."),
    Metric(
        "vllm_ext:structured_masks_aside_total",
        "counter",
        "Masks of slow grammars filled beside the steps, while their requests waited.",
    ),
    Metric(
        "vllm_ext:structured_over_budget_total", "counter", "Requests ended because their masks took too much time."
    ),
    Metric("vllm_ext:smartspec_draft_length", "gauge", "Drafts asked for the next step, mean over its requests."),
    Metric(
        "vllm_ext:smartspec_expected_tokens_per_second",
        "gauge",
        "Expected tokens of the next step over its expected time, if the drafter finds every draft it is asked for.",
    ),
    Metric(
        "vllm_ext:smartspec_decoded_tokens_total",
        "counter",
        "Tokens put out by steps without prompt tokens in them; over decode_seconds_total: measured goodput.",
    ),
    Metric(
        "vllm_ext:smartspec_decode_seconds_total",
        "counter",
        "Time of those steps, with what the engine does between two of them.",
    ),
    Metric(
        "vllm_ext:smartspec_predicted_step_seconds", "gauge", "Predicted time of the last step that was learned from."
    ),
    Metric(
        "vllm_ext:smartspec_measured_step_seconds",
        "gauge",
        "Measured time of that step and of what the engine did before it, without control.",
    ),
    Metric(
        "vllm_ext:smartspec_planned_tokens_total",
        "counter",
        "Drafts wanted, by request; lookups may find fewer, and a model makes the longest one's number for all.",
    ),
    Metric("vllm_ext:smartspec_verified_tokens_total", "counter", "Drafts verified, padding left out."),
    Metric("vllm_ext:smartspec_accepted_tokens_total", "counter", "Drafts accepted."),
    Metric("vllm_ext:smartspec_probe_steps_total", "counter", "Steps that drafted only to learn if it pays again."),
    Metric(
        "vllm_ext:smartspec_trie_stored_tokens",
        "gauge",
        "Tokens that the trie drafter holds: of running requests, and of the trie over finished ones.",
    ),
    Metric("vllm_ext:smartspec_trie_node_count", "gauge", "Nodes in use by all tries."),
    Metric("vllm_ext:smartspec_trie_inserted_tokens_total", "counter", "Tokens put into tries."),
    Metric("vllm_ext:smartspec_trie_searched_rows_total", "counter", "Requests of a step that tries were asked about."),
    Metric("vllm_ext:smartspec_trie_matched_rows_total", "counter", "Of these, requests for which drafts were found."),
    Metric("vllm_ext:smartspec_trie_drafted_tokens_total", "counter", "Drafts found in tries."),
    Metric("vllm_ext:smartspec_trie_prunes_total", "counter", "Times that a trie was cut to make room."),
    Metric(
        "vllm_ext:structured_forced_tokens_active",
        "gauge",
        "1 where tokens that a grammar forces are drafted, 0 where not.",
    ),
    Metric(
        "vllm_ext:structured_forced_tokens_limit_index",
        "gauge",
        "0 where they are drafted, else the number of what keeps them off; `vllm-ext doctor --server` says what.",
    ),
    Metric("vllm_ext:structured_forced_tokens_total", "counter", "Drafts verified that a grammar forced, by text."),
    Metric("vllm_ext:structured_forced_accepted_tokens_total", "counter", "Of these, drafts accepted."),
    Metric(
        "vllm_ext:structured_forced_certain_tokens_total",
        "counter",
        "Of these, drafts that were the only token their mask allowed.",
    ),
    Metric("vllm_ext:semipd_prefill_batches_total", "counter", "Batches of the prefill lane."),
    Metric("vllm_ext:semipd_decode_batches_total", "counter", "Batches of the decode lane."),
    Metric("vllm_ext:semipd_prefill_busy_seconds_total", "counter", "Time in which the prefill lane ran a batch."),
    Metric("vllm_ext:semipd_decode_busy_seconds_total", "counter", "Time in which the decode lane ran a batch."),
    Metric("vllm_ext:semipd_overlap_seconds_total", "counter", "Time in which both did."),
    Metric(
        "vllm_ext:semipd_deferred_frees_total",
        "counter",
        "Requests that ended while a batch used their blocks, which went back when it had run.",
    ),
    Metric("vllm_ext:semipd_split_index", "gauge", "Number of the split in force, least prefill first."),
    Metric("vllm_ext:semipd_switches_total", "counter", "Changes of split and pace, and to and from mixed batches."),
    Metric(
        "vllm_ext:semipd_decode_interval_seconds",
        "gauge",
        "Seconds from a decode step to the next while prompts are computed, 0 where none waits.",
    ),
    Metric("vllm_ext:semipd_mixing_active", "gauge", "1 where prompts go into the batches of decode, 0 where not."),
    Metric(
        "vllm_ext:semipd_mixed_batches_total",
        "counter",
        "Of the decode lane's batches, those with prompts and decoding requests in them.",
    ),
    Metric(
        "vllm_ext:semipd_mixed_busy_seconds_total",
        "counter",
        "Of the decode lane's time, that of batches into which prompts may go.",
    ),
    Metric(
        "vllm_ext:semipd_max_queued_tokens",
        "gauge",
        "Prompt tokens beyond which who comes in is late, as neither objective can be met; 0 where nobody is.",
    ),
    Metric("vllm_ext:semipd_held_requests", "gauge", "Late requests that are held back now."),
    Metric("vllm_ext:semipd_held_requests_total", "counter", "Late requests that were held back."),
    Metric("vllm_ext:semipd_prefill_holds_total", "counter", "Times that prefill waited for decode to catch up."),
    Metric("vllm_ext:semipd_fairness_client_count", "gauge", "Clients whose service is counted."),
    Metric(
        "vllm_ext:semipd_fairness_overtakes_total",
        "counter",
        "Requests that began before older ones of clients who were served more.",
    ),
    Metric("vllm_ext:semipd_first_tokens_total", "counter", "First tokens of requests."),
    Metric("vllm_ext:semipd_first_tokens_in_time_total", "counter", "Of these, within slo_ttft_ms."),
    Metric("vllm_ext:semipd_finished_total", "counter", "Finished requests of two tokens and more."),
    Metric(
        "vllm_ext:semipd_finished_in_time_total", "counter", "Of these, with a mean time per token within slo_tpot_ms."
    ),
)

_INDEX = {metric.name: position for position, metric in enumerate(METRICS)}
_HEADER = 2
_SLOTS = _HEADER + len(METRICS)
#: Identifies the order of METRICS, so that a reader of another release skips a file it would misread.
_LAYOUT = float(zlib.crc32("\n".join(_INDEX).encode()))

_lock = threading.Lock()
# A child forked while another thread holds the lock would wait for ever.
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]
_record: tuple[int, memoryview[float] | None] | None = None
_owned: tuple[str, int] | None = None
_collector: Collector | None = None


# --- writing: EngineCore and workers -----------------------------------------------------------------------


def add(name: str, amount: float, engine_index: int = 0) -> None:
    """Add `amount` to a metric of this process; does nothing when no API process collects.

    `engine_index` (vLLM's data-parallel rank) is taken from the process's first call. Raises KeyError for a
    name that METRICS does not list.
    """
    position = _HEADER + _INDEX[name]
    with _lock:
        values = _find_record(engine_index)
        if values is not None:
            values[position] += amount


def set_gauge(name: str, value: float, engine_index: int = 0) -> None:
    """Set a gauge of this process; otherwise as `add`."""
    position = _HEADER + _INDEX[name]
    with _lock:
        values = _find_record(engine_index)
        if values is not None:
            values[position] = value


def _find_record(engine_index: int) -> memoryview[float] | None:
    """This process's record, created on first use and again after a fork; None where nobody collects."""
    global _record
    if _record is None or _record[0] != os.getpid():
        directory = os.environ.get(DIRECTORY_ENV)
        if not directory:
            return None
        try:
            _record = (os.getpid(), _create_record(directory, engine_index))
        except OSError as error:
            logger.warning("vllm-ext counts nothing in this process, its metrics record cannot be made: %s", error)
            _record = (os.getpid(), None)
    return _record[1]


def _create_record(directory: str, engine_index: int) -> memoryview[float]:
    with open(os.path.join(directory, f"{os.getpid()}.record"), "w+b") as file:
        os.fchmod(file.fileno(), 0o600)
        # Reserved now: a store into a hole of a full file system would kill the process with SIGBUS.
        os.posix_fallocate(file.fileno(), 0, _SLOTS * 8)
        values: memoryview[float] = memoryview(mmap.mmap(file.fileno(), _SLOTS * 8)).cast("d")
    values[1] = engine_index
    values[0] = _LAYOUT
    return values


# --- the directory: API process ----------------------------------------------------------------------------


def create_directory() -> None:
    """Create this server's record directory (mode 0700) and export it; one inherited from vLLM's parent is kept.

    Where it cannot be made, one warning is logged and nothing is exported: the server runs without our metrics.
    """
    inherited = os.environ.get(DIRECTORY_ENV)
    if inherited and os.path.isdir(inherited):
        return
    global _owned
    try:
        if _owned is None or not os.path.isdir(_owned[0]):
            _owned = (_make_owned_directory(_shared_memory_root()), os.getpid())
            atexit.register(_remove_owned)
    except OSError as error:
        logger.warning("vllm-ext shows no metrics, their directory cannot be made: %s", error)
        os.environ.pop(DIRECTORY_ENV, None)
        return
    os.environ[DIRECTORY_ENV] = _owned[0]


def _make_owned_directory(parent: str) -> str:
    _remove_abandoned(parent)
    directory = tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=parent)
    # Held for life: a directory whose lock can be taken belongs to a server that is gone. The file gets its
    # name only once it is locked, so that no other server sees it unlocked.
    unnamed = os.path.join(directory, "owner")
    fcntl.flock(os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)
    os.rename(unnamed, os.path.join(directory, _LOCK_NAME))
    return directory


def _shared_memory_root() -> str:
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _remove_owned() -> None:
    # atexit also runs in forked children, which must leave the parent's directory alone.
    if _owned is not None and _owned[1] == os.getpid():
        shutil.rmtree(_owned[0], ignore_errors=True)


def _remove_abandoned(parent: str) -> None:
    """Delete directories of this user whose server was killed before it could clean up."""
    for directory in Path(parent).glob(_DIRECTORY_PREFIX + "*"):
        try:
            lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # being created right now, or already gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue  # its server lives
        finally:
            os.close(lock)


# --- reading: API process ----------------------------------------------------------------------------------


def read_records(directory: str) -> dict[tuple[int, str], float]:
    """Sum the records in `directory`: {(engine_index, metric name): value}.

    Skipped: files of another layout, files that vanish while being read, and the gauges of processes that are gone.
    """
    totals: dict[tuple[int, str], float] = {}
    for path in sorted(Path(directory).glob("*.record")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if len(data) != _SLOTS * 8:
            continue
        values = memoryview(data).cast("d")
        if values[0] != _LAYOUT:
            continue
        is_alive = _is_process_alive(path.stem)
        for metric, value in zip(METRICS, values[_HEADER:], strict=True):
            key = (int(values[1]), metric.name)
            counts = is_alive or metric.kind == "counter"
            totals[key] = totals.get(key, 0.0) + (value if counts else 0.0)
    return totals


def _is_process_alive(pid: str) -> bool:
    return pid.isdigit() and os.path.isdir(f"/proc/{pid}")


class Collector:
    """Prometheus collector over the record directory (prometheus_client's custom-collector protocol)."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def describe(self) -> list[Any]:
        """Nothing to announce: registering must not read files that no process has written yet."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield one family per metric that some engine has reported, labelled by engine index."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        totals = read_records(self.directory)
        engines = sorted({engine for engine, _ in totals})
        for metric in METRICS if engines else ():
            family_type = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = family_type(metric.name, metric.help, labels=["engine"])
            for engine in engines:
                family.add_metric([str(engine)], totals[engine, metric.name])
            yield family


def install_collector() -> None:
    """Register the collector of this server's directory with prometheus_client's default registry, once."""
    global _collector
    directory = os.environ.get(DIRECTORY_ENV)
    if directory is None or (_collector is not None and _collector.directory == directory):
        return
    from prometheus_client import REGISTRY

    if _collector is not None:
        REGISTRY.unregister(_collector)
    _collector = Collector(directory)
    REGISTRY.register(_collector)


def extend_registry(registry: Any) -> Any:
    """Add the installed collector to a registry other than the default one; returns the registry."""
    if _collector is not None:
        registry.register(_collector)
    return registry
