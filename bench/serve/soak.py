# SPDX-License-Identifier: Apache-2.0
"""Minutes of clients that leave and are aborted, against a real `vllm serve` with semipd on: does anything stay behind?

    python -m bench.serve.soak [--minutes 30] [--mode always|auto] [--clients 10] [--seed 0] [--out DIR] [--log FILE]

The cache is too small for all clients, so requests are preempted, too. Watched all the time: resident memory, threads
and open files of all processes of the server, blocks in use, requests that run and wait. When the clients are gone, no
request may be left and every block must be free; known prompts, asked among the others and again at the end, must have
the answers that they had at the start; the server must end in order. With `always` all prompts go through the prefill
lane; with `auto` the engine changes between lanes and mixed batches. A record of case `semipd_soak`, whose arm is the
mode, and a plot beside it.

Exit codes: 0 nothing was found, 1 something was, 2 bad usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, hide_paths, write_record
from bench.run import leave_on_signals
from bench.serve.server import ServerFailed, VllmServer, parse_metric
from bench.serve.soak_clients import Clients, Counts
from bench.serve.usage import count_entries, read_resident_bytes

CASE = "semipd_soak"
MODES = ("always", "auto")
MODEL = ROOT / "bench" / "models" / "tiny_moe"
TEXT = MODEL / "kjv_val.txt"
#: Chunks that a long prompt takes several of; a cache for a part of the clients. In float32, where answers do not
#: depend on who else is in a batch.
ARGS = (
    *("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "256", "--dtype", "float32"),
    *("--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "72"),
    *("--additional-config.vllm_ext.semipd.slo_ttft_ms", "500"),
    *("--additional-config.vllm_ext.semipd.slo_tpot_ms", "50"),
    "--additional-config.vllm_ext.semipd.mode",
)
#: The endpoints that abort by name and empty the prefix cache are for developers.
ENVIRONMENT = {
    "VLLM_PLUGINS": "vllm_ext",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
#: Seconds between two looks at the server.
PERIOD = 2.0
#: Seconds until everything is over when nobody asks any more.
DRAIN_SECONDS = 60.0
#: The state to begin with is the median of this part of the time, when everything was in use once; the state in the
#: end that of the last part.
BEGINNING, END = (0.2, 0.4), (0.8, 1.0)
#: What more there may be in the end. Memory: allocators keep what is fragmented, a little more of it for every new
#: combination of requests; thousands of requests that each leave a token's list behind are above it.
MOST_MIB, MOST_THREADS, MOST_FILES = 48.0, 2, 8
#: Counters that must have moved, or the soak has not shown anything.
MOVED = ("prefill_batches", "decode_batches", "overlap_seconds", "deferred_frees", "first_tokens", "finished")


@dataclass(frozen=True)
class Sample:
    """The server at a moment, seconds after the start. blocks: part of the cache in use."""

    seconds: float
    resident: float
    threads: int
    files: int
    blocks: float
    running: int
    waiting: int
    requests: int


def take_sample(server: VllmServer, seconds: float, requests: int) -> Sample:
    """Look at the processes and the metrics of a running server."""
    group = server.process_group
    assert group is not None
    said = server.get("/metrics", timeout=60.0)

    def read(name: str) -> float:
        value = parse_metric(said, f"vllm:{name}")
        if value is None:
            raise ValueError(f"the server has no metric vllm:{name}")
        return value

    return Sample(
        seconds=round(seconds, 2),
        resident=round(read_resident_bytes(group) / 2**20, 2),
        threads=count_entries(group, "task"),
        files=count_entries(group, "fd"),
        blocks=round(read("kv_cache_usage_perc"), 5),
        running=int(read("num_requests_running")),
        waiting=int(read("num_requests_waiting")),
        requests=requests,
    )


def grow(samples: Sequence[Sample], read: Callable[[Sample], float]) -> tuple[float, float]:
    """(median in the beginning, median in the end) of what is read. Raises ValueError for fewer than ten samples."""
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples are too few to tell a leak from noise; soak for longer")
    parts = [samples[int(first * len(samples)) : int(last * len(samples))] for first, last in (BEGINNING, END)]
    begin, end = (statistics.median(read(sample) for sample in part) for part in parts)
    return begin, end


def list_faults(samples: Sequence[Sample], last: Sample, counts: Counts, moved: dict[str, float]) -> list[str]:
    """What was found: growth, what was left when all clients were gone, and what they saw.

    last: when nothing was asked any more. moved: counters of the lanes.
    """
    faults = list(counts.faults)
    if counts.num_faults > len(faults):
        faults.append(f"and {counts.num_faults - len(faults)} more")
    for what, most, read in (
        ("MiB of memory", MOST_MIB, lambda sample: sample.resident),
        ("threads", MOST_THREADS, lambda sample: sample.threads),
        ("open files", MOST_FILES, lambda sample: sample.files),
    ):
        begin, end = grow(samples, read)
        if end - begin > most:
            faults.append(f"from {begin:.1f} to {end:.1f} {what}, more than {most:g} are a leak")
    if last.running or last.waiting or last.blocks:
        faults.append(
            f"left behind: {last.running} running and {last.waiting} waiting requests, {last.blocks:.2%} of the blocks"
        )
    faults += [f"{name} did not move: the soak shows nothing" for name, value in moved.items() if not value > 0]
    return faults


async def soak(server: VllmServer, minutes: float, clients: int, seed: int) -> tuple[list[Sample], Sample, Counts]:
    """(samples while clients ask, the server when they are gone, what they saw)."""
    samples: list[Sample] = []
    words = TEXT.read_text(encoding="utf-8").split()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        crowd = Clients(server.base_url, server.model, session, words)
        await crowd.learn()
        began = time.monotonic()
        tasks = [asyncio.create_task(crowd.run(number, seed)) for number in range(clients)]

        async def look() -> Sample:
            # In a thread: the clients go on.
            return await asyncio.to_thread(take_sample, server, time.monotonic() - began, crowd.counts.requests)

        while time.monotonic() - began < 60 * minutes and server.is_running():
            samples.append(await look())
            if len(samples) % 30 == 0:
                print(_describe(samples[-1], crowd.counts), file=sys.stderr, flush=True)
            await asyncio.sleep(PERIOD)
        crowd.stopped.set()
        for one in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(one, BaseException):
                crowd.counts.note_fault(f"a client ended: {type(one).__name__}: {one}")
        deadline = time.monotonic() + DRAIN_SECONDS
        last = await look()
        while (last.running or last.waiting or last.blocks) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            last = await look()
        await _empty_cache(session, server, crowd.counts)
        await crowd.check_known()
        return samples, last, crowd.counts


async def _empty_cache(session: aiohttp.ClientSession, server: VllmServer, counts: Counts) -> None:
    # vLLM refuses while any block is held.
    async with session.post(f"{server.base_url}/reset_prefix_cache") as response:
        said = await response.text()
        if response.status != 200 or json.loads(said) != {"success": True}:
            counts.note_fault(f"the prefix cache cannot be emptied: {response.status} {said[:200]}")


def _describe(sample: Sample, counts: Counts) -> str:
    return (
        f"{sample.seconds / 60:.1f} min: {counts.requests} requests, {counts.num_faults} faults, "
        f"{sample.resident:.0f} MiB, {sample.threads} threads, {sample.files} files, {sample.blocks:.0%} of the blocks"
    )


def make_record(
    mode: str,
    samples: Sequence[Sample],
    last: Sample,
    counts: Counts,
    moved: dict[str, float],
    faults: Sequence[str],
    **run: Any,
) -> Record:
    """The record of a soak; failed where something was found."""
    metrics = {
        "minutes": Metric(samples[-1].seconds / 60, "min"),
        "requests": Metric(counts.requests, "requests"),
        **{name: Metric(count, "requests") for name, count in counts.ended.items()},
        "before_first_token": Metric(counts.before_first_token, "requests"),
        "known_answers": Metric(counts.known, "requests"),
        "wrong": Metric(counts.wrong, "requests"),
        "stalled": Metric(counts.stalled, "requests"),
        "faults": Metric(len(faults), "faults"),
        "blocks_left": Metric(100 * last.blocks, "%"),
    }
    for name, unit, read in (
        ("resident", "MiB", lambda sample: sample.resident),
        ("threads", "threads", lambda sample: sample.threads),
        ("files", "files", lambda sample: sample.files),
    ):
        begin, end = grow(samples, read)
        metrics |= {f"{name}_begin": Metric(begin, unit), f"{name}_end": Metric(end, unit)}
    metrics |= {name: Metric(value, "s" if name.endswith("seconds") else "") for name, value in moved.items()}
    columns = {name: [asdict(sample)[name] for sample in samples] for name in asdict(last)}
    return Record(
        case=CASE,
        arm=mode,
        repetition=0,
        metrics=metrics,
        status="failed" if faults else "ok",
        error=hide_paths("; ".join(faults)) or None,
        settings={
            "kind": "soak",
            "stock_arm": MODES[0],
            "args": [*ARGS, mode],
            "limits": {"memory": f"{MOST_MIB:g} MiB", "threads": MOST_THREADS, "files": MOST_FILES},
            **run,
            "samples": columns,
        },
        **describe_environment(),
    )


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory, threads and files, blocks, and requests over time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no display, no state between figures

    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in samples]
    lines = (
        (("resident (MiB)", [sample.resident for sample in samples]),),
        (("threads", [sample.threads for sample in samples]), ("files", [sample.files for sample in samples])),
        (("blocks in use (%)", [100 * sample.blocks for sample in samples]),),
        (("running", [sample.running for sample in samples]), ("waiting", [sample.waiting for sample in samples])),
    )
    for panel, drawn in zip(panels, lines, strict=True):
        for (label, values), color in zip(drawn, ("#4c72b0", "#dd8452"), strict=False):
            panel.plot(minutes, values, linewidth=0.8, color=color, label=label)
        panel.set_ylim(0, None)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7, loc="lower right")
    panels[-1].set_xlabel("minutes", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": CASE}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def run(minutes: float, mode: str, clients: int, seed: int, out: Path, log: Path) -> Record:
    """Start the server, soak it, judge, and write record and plot. Raises ServerFailed where it does not start, or ends
    by itself."""
    with VllmServer(MODEL, args=[*ARGS, mode], env=ENVIRONMENT, log_path=log) as server:
        try:
            samples, last, counts = asyncio.run(soak(server, minutes, clients, seed))
        except (OSError, aiohttp.ClientError) as error:
            raise ServerFailed(f"the server does not answer any more: {error}", log, server.stop()) from error
        moved = {name: server.read_metric(f"vllm_ext:semipd_{name}_total") or 0.0 for name in MOVED}
        moved["preemptions"] = server.read_metric("vllm:num_preemptions_total") or 0.0
        code = server.stop()
    faults = list_faults(samples, last, counts, moved)
    if code != 0:
        faults.append(f"the server ended with exit code {code}")
    record = make_record(mode, samples, last, counts, moved, faults, clients=clients, seed=seed)
    path = write_record(out, record)
    draw(samples, path.with_name(f"{mode}.svg"))
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve.soak", description="Soak a server with semipd on.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log here")
    options = parser.parse_args(argv)
    if not options.minutes >= 0.5 or options.clients < 1:
        parser.error("give at least half a minute and one client")
    leave_on_signals()
    with tempfile.TemporaryDirectory(prefix="vllm-ext-soak-") as folder:
        log = options.log or Path(folder) / "server.log"
        try:
            record = run(options.minutes, options.mode, options.clients, options.seed, options.out, log)
        except ServerFailed as error:
            print(error, file=sys.stderr)
            return 1
    shown = {name: metric.value for name, metric in record.metrics.items()}
    print(json.dumps({"status": record.status, **shown}))
    for fault in (record.error or "").split("; ") if record.error else ():
        print(f"found: {fault}", file=sys.stderr)
    return 1 if record.status == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
