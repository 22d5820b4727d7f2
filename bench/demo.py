# SPDX-License-Identifier: Apache-2.0
"""Serve the shipped small MoE in bf16, with `--quantization mxmoe`, and packed to 3.25 bits; print one table.

    python -m bench.demo [--json] [--windows N] [--serve-args OPTIONS] [--keep-logs]

All are plain `vllm serve` processes on loopback, one after the other, asked the same through the `openai` client. The
packed checkpoint is made by `vllm-ext quantize` from the shipped calibration texts. Progress goes to stderr; the table,
or with `--json` one object on the last line, to stdout. Exit codes: 0 ok, 1 failed
(the message names the step and shows the end of the server's log), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bench.expert_bytes import count_expert_weights, read_mxmoe_metrics
from bench.quality.perplexity import Tokenizer, load_tokenizer, measure_perplexity
from bench.serve.server import ServerFailed, VllmServer, read_log_tail
from bench.steps import Progress, StepFailed

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = Path(__file__).parent / "models" / "tiny_moe"
SERVED_NAME = "tiny-moe"
CONTEXT = 512
PROMPT = "In the beginning God"
STREAM_PROMPT = "def __init__(self"
CHAT_MESSAGE = "And Moses said unto the people,"
MAX_TOKENS = 24
#: vLLM's compiled mode on a CPU includes Python.h, which Debian ships apart from Python.
HAS_PYTHON_HEADERS = (Path(sysconfig.get_path("include")) / "Python.h").is_file()

#: Options of `vllm serve` for each arm of the comparison; "packed" serves another directory.
ARMS: dict[str, list[str]] = {"bf16": [], "mxmoe": ["--quantization", "mxmoe"], "packed": []}
TITLES = {"bf16": "bf16", "mxmoe": "--quantization mxmoe", "packed": "packed by vllm-ext quantize"}
PACKED_BITS = 3.25
SPEED_TOKENS = 128


@dataclass
class ArmResult:
    """What one server answered and holds. Perplexities are of held-out text, `CONTEXT` tokens a window."""

    expert_bytes: int
    bits_per_weight: float
    perplexity_kjv: float
    perplexity_py: float
    perplexity_tokens: int
    completion: str
    streamed: str
    stream_chunks: int
    chat: str
    tokens_per_second: float
    startup_seconds: float
    exit_code: int | None = None


def ask_all(client: OpenAI, progress: Progress, arm: str) -> tuple[str, str, int, str]:
    """One completion, one streamed completion and one chat: their texts, and the chunks of the stream.

    Greedy, so that two servers with equal weights would give equal texts.
    """
    with progress.step(f"{arm}: completion"):
        answer = client.completions.create(model=SERVED_NAME, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0)
        completion = answer.choices[0].text
    with progress.step(f"{arm}: streamed completion"):
        pieces = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model=SERVED_NAME, prompt=STREAM_PROMPT, max_tokens=MAX_TOKENS, temperature=0, stream=True
            )
            if chunk.choices
        ]
    with progress.step(f"{arm}: chat"):
        reply = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": CHAT_MESSAGE}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        chat = reply.choices[0].message.content or ""
    for request, text in (("completion", completion), ("streamed completion", "".join(pieces)), ("chat", chat)):
        if not text:
            raise StepFailed(f"{arm}: the answer to the {request} request is empty")
    return completion, "".join(pieces), len(pieces), chat


def measure_speed(client: OpenAI, progress: Progress, arm: str) -> float:
    """Decoded tokens per second of one stream, the first token (prefill) left out."""
    with progress.step(f"{arm}: decode {SPEED_TOKENS} tokens"):
        stream = client.completions.create(
            model=SERVED_NAME,
            prompt=PROMPT,
            max_tokens=SPEED_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        first = last = 0.0
        tokens = 0
        for chunk in stream:
            if chunk.choices:
                last = time.monotonic()
                first = first or last
            elif chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
    if tokens < 2 or last <= first:
        raise StepFailed(f"{arm}: the stream to be timed had {tokens} tokens")
    return (tokens - 1) / (last - first)


def quantize(output: Path, progress: Progress) -> None:
    """Make the packed checkpoint with the `vllm-ext` command. Raises StepFailed with its message."""
    calibration = [part for name in ("kjv", "py") for part in ("--calibration", str(MODEL / f"{name}_train.txt"))]
    command = ["quantize", str(MODEL), "-o", str(output), "--bits", str(PACKED_BITS), *calibration]
    with progress.step(f"vllm-ext quantize --bits {PACKED_BITS}"):
        done = subprocess.run(
            [sys.executable, "-m", "vllm_ext.cli", *command], capture_output=True, text=True, timeout=600
        )
        if done.returncode != 0:
            raise StepFailed(f"vllm-ext quantize failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def run_arm(
    arm: str,
    model: Path,
    tokenizer: Tokenizer,
    windows: int | None,
    serve_args: Sequence[str],
    logs: Path,
    progress: Progress,
) -> ArmResult:
    """Start one server on a model directory, ask it everything, and stop it. Raises StepFailed."""
    from openai import DefaultHttpxClient, OpenAI

    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; the default takes a share of the machine's memory
    server = VllmServer(
        model,
        args=["--served-model-name", SERVED_NAME, "--max-model-len", "1024", *serve_args, *ARMS[arm]],
        env=environment,
        log_path=logs / f"{arm}.log",
        start_timeout=300,
        on_progress=progress.show_wait,
    )
    try:
        with progress.step(f"{arm}: start vllm serve {' '.join(ARMS[arm])}".rstrip()):
            server.start()
        # A proxy from the environment must not see requests to loopback.
        http_client = DefaultHttpxClient(trust_env=False, timeout=120)
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", http_client=http_client, max_retries=0)
        with client:
            completion, streamed, chunks, chat = ask_all(client, progress, arm)
            tokens_per_second = measure_speed(client, progress, arm)
        perplexities, tokens = {}, 0
        for domain in ("kjv", "py"):
            with progress.step(f"{arm}: perplexity of {domain}_val.txt"):
                text = (MODEL / f"{domain}_val.txt").read_text(encoding="utf-8")
                measured = measure_perplexity(server.base_url, SERVED_NAME, text, tokenizer, CONTEXT, windows)
                perplexities[domain] = measured.perplexity
                tokens += measured.tokens
        with progress.step(f"{arm}: bytes of expert weights"):
            num_bytes, weights = count_expert_weights(MODEL)
            bits = 8 * num_bytes / weights
            if arm != "bf16":
                num_bytes, bits = read_mxmoe_metrics(server, weights)
        result = ArmResult(
            expert_bytes=num_bytes,
            bits_per_weight=bits,
            perplexity_kjv=perplexities["kjv"],
            perplexity_py=perplexities["py"],
            perplexity_tokens=tokens,
            completion=completion,
            streamed=streamed,
            stream_chunks=chunks,
            chat=chat,
            tokens_per_second=tokens_per_second,
            startup_seconds=server.startup_seconds,
        )
        with progress.step(f"{arm}: stop"):
            result.exit_code = server.stop()
        if result.exit_code != 0:
            raise StepFailed(f"{arm}: stop: the server ended with exit code {result.exit_code}")
        return result
    except StepFailed as error:
        if isinstance(error.__cause__, ServerFailed):
            raise  # its message already ends with the log
        raise StepFailed(f"{error}\nlast lines of {server.log_path}:\n{read_log_tail(server.log_path)}") from error
    finally:
        server.stop()


def print_table(results: dict[str, ArmResult], windows: int | None) -> None:
    """One table on stdout: a row for each fact, a column for each server."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    extent = "whole files" if windows is None else f"first {windows} windows"
    table = Table(title="bench/models/tiny_moe under vllm serve", title_style="bold", show_lines=False)
    table.add_column("")
    for arm in results:
        table.add_column(TITLES[arm], overflow="fold", ratio=1)
    rows = {
        "expert weights, bytes": lambda r: f"{r.expert_bytes:,}",
        "bits per expert weight": lambda r: f"{r.bits_per_weight:.2f}",
        "perplexity kjv_val": lambda r: f"{r.perplexity_kjv:.2f}",
        "perplexity py_val": lambda r: f"{r.perplexity_py:.2f}",
        f"{PROMPT!r} ...": lambda r: r.completion,
        f"{STREAM_PROMPT!r} ... (streamed)": lambda r: f"{r.streamed}  [{r.stream_chunks} chunks]",
        f"{CHAT_MESSAGE!r} (chat)": lambda r: r.chat,
        "tokens/s, one stream": lambda r: f"{r.tokens_per_second:.0f}",
        "start-up, s": lambda r: f"{r.startup_seconds:.1f}",
    }
    for label, describe in rows.items():
        # Text, not markup: brackets in generated text are not styles.
        table.add_row(Text(label), *(Text(" ".join(describe(result).split())) for result in results.values()))
    table.caption = (
        f"held-out perplexity at context {CONTEXT}, {extent}; texts are greedy continuations\n"
        "experts this small lie in the processor's cache, so fewer bits are hardly faster here; "
        "docs/cpu-kernels.md has the speed at real sizes"
    )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


def check_requirements() -> None:
    """Raise StepFailed naming the pip command when a package of the demonstration is missing."""
    import importlib.util

    missing = [name for name in ("openai", "rich", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise StepFailed(f"{', '.join(missing)} not installed here; run `make demo`, or pip install 'vllm-ext[bench]'")


def run_demo(windows: int | None, serve_args: Sequence[str], logs: Path) -> dict[str, ArmResult]:
    """All arms, one after the other, with these options of `vllm serve` for all. Raises StepFailed."""
    progress = Progress()
    with progress.step("prepare"):
        check_requirements()
        tokenizer = load_tokenizer(MODEL)
    if "--enforce-eager" not in serve_args and not HAS_PYTHON_HEADERS:
        serve_args = [*serve_args, "--enforce-eager"]
        print("no Python.h (package python3-dev): the servers run with --enforce-eager", file=sys.stderr)
    packed = logs / "tiny_moe_packed"
    results = {}
    for arm in ARMS:
        if arm == "packed":
            quantize(packed, progress)
        model = packed if arm == "packed" else MODEL
        results[arm] = run_arm(arm, model, tokenizer, windows, serve_args, logs, progress)
    return results


def _leave(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that every `finally` between here and the server runs.
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description="Compare bf16 and mxmoe, online and packed, under vllm serve."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    parser.add_argument(
        "--windows", type=int, default=40, metavar="N", help="windows of each held-out text (default 40; 0: all)"
    )
    parser.add_argument(
        "--serve-args", type=shlex.split, default=[], metavar="OPTIONS",
        help="options of `vllm serve` for all servers, as one word: --serve-args='--enforce-eager'",
    )  # fmt: skip
    parser.add_argument("--keep-logs", action="store_true", help="keep the servers' logs and say where they are")
    options = parser.parse_args(argv)
    if options.windows < 0:
        parser.error(f"--windows must be 0 or more, got {options.windows}")
    windows = options.windows or None
    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` starts its command with SIGHUP ignored; that stays.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)

    logs = Path(tempfile.mkdtemp(prefix="vllm-ext-demo-"))
    began = time.monotonic()
    failed = True
    try:
        results = run_demo(windows, options.serve_args, logs)
        failed = False
    except StepFailed as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo interrupted; the server is stopped", file=sys.stderr)
        return 130
    finally:
        if failed or options.keep_logs:
            print(f"logs: {logs}", file=sys.stderr)
        else:
            shutil.rmtree(logs)
    seconds = time.monotonic() - began
    print_table(results, windows)
    print(f"{seconds:6.1f} s  done", file=sys.stderr)
    if options.json:
        arms = {arm: asdict(result) for arm, result in results.items()}
        print(json.dumps({**arms, "context": CONTEXT, "windows": windows, "seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
