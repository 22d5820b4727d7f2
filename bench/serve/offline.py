# SPDX-License-Identifier: Apache-2.0
"""An offline engine (`vllm.LLM`) that answers repeated runs, so that its start is not paid for every one.

    python -m bench.serve.offline MODEL --host 127.0.0.1 --port 8000 [engine options of vllm serve]

`VllmServer` starts and stops it like a server: GET /health, /v1/models and /metrics, and POST /run, one at a time:

    {"requests": [{"prompt": text} or {"input_len": n}, each with "output_tokens"], "seed": s, "max_concurrency": c}

where `input_len` asks for so many random tokens, and `max_concurrency` for a client that has so many requests in
flight and sends the next one when one is answered; null sends all at once. A request may have a "temperature", and a
"max_concurrency" of its own, which counts while it is the next to be sent. It answers with the fields that
`vllm bench serve` gives for a run.
"""

from __future__ import annotations

import collections
import json
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import argparse

    from vllm import LLM
    from vllm.utils.argparse_utils import FlexibleArgumentParser


def run_requests(
    engine: LLM, requests: list[dict[str, Any]], seed: int, max_concurrency: int | None = None
) -> dict[str, Any]:
    """Generate for requests to the asked length, greedily where they do not say otherwise; the client's fields."""
    from vllm import SamplingParams

    generator = np.random.default_rng(seed)
    vocabulary = engine.model_config.get_vocab_size()
    prompts: list[Any] = []
    parameters = []
    for request in requests:
        if "input_len" in request:
            prompts.append({"prompt_token_ids": generator.integers(vocabulary, size=request["input_len"]).tolist()})
        else:
            prompts.append(request["prompt"])
        temperature, length = request.get("temperature", 0), request["output_tokens"]
        parameters.append(SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True))
    began = time.perf_counter()
    limits = [request.get("max_concurrency", max_concurrency) or len(requests) for request in requests]
    if min(limits, default=0) >= len(requests):
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
    else:
        outputs = generate_in_turn(engine.llm_engine, prompts, parameters, limits)
    duration = time.perf_counter() - began
    total_input = sum(len(output.prompt_token_ids or ()) for output in outputs)
    total_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "completed": sum(output.finished for output in outputs),
        "failed": len(requests) - len(outputs),
        "duration": duration,
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(outputs) / duration,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
    }


def generate_in_turn(engine: Any, prompts: list[Any], parameters: list[Any], limits: list[int]) -> list[Any]:
    """Outputs in the order in which requests end; none is left behind in the engine where one is refused.

    limits: requests in flight, by request, that its being sent makes at most.
    """
    waiting = collections.deque(zip(prompts, parameters, limits, strict=True))
    outputs: list[Any] = []
    in_flight: set[str] = set()
    try:
        while True:
            while waiting and len(in_flight) < waiting[0][2]:
                prompt, asked, _ = waiting.popleft()
                request_id = uuid.uuid4().hex
                engine.add_request(request_id, prompt, asked)
                in_flight.add(request_id)
            if not in_flight:
                return outputs
            ended = [output for output in engine.step() if output.finished and output.request_id in in_flight]
            in_flight.difference_update(output.request_id for output in ended)
            outputs += ended
    finally:
        if in_flight:
            engine.abort_request(list(in_flight))


def make_handler(engine: LLM, name: str) -> type[BaseHTTPRequestHandler]:
    """The HTTP side of one engine."""
    from prometheus_client import REGISTRY, generate_latest

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, generate_latest(REGISTRY), "text/plain")
            elif self.path == "/v1/models":
                self._answer(200, json.dumps({"data": [{"id": name}]}).encode())
            else:
                self._answer(200 if self.path == "/health" else 404, b"{}")

        def do_POST(self) -> None:
            if self.path != "/run":
                self._answer(404, b"{}")
                return
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                result = run_requests(engine, asked["requests"], asked["seed"], asked.get("max_concurrency"))
            except ValueError as error:
                # A request that the engine refuses, for example one longer than its context; the engine lives on.
                self._answer(400, json.dumps({"error": str(error)}).encode())
                return
            self._answer(200, json.dumps(result).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Silence: health checks would push the engine's own lines out of the log's tail."""

        def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def make_parser() -> FlexibleArgumentParser:
    """Of MODEL and the engine options of vllm serve."""
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Before the parser is made: plugins add names that options may take.
    load_general_plugins()
    parser = FlexibleArgumentParser(prog="python -m bench.serve.offline")
    parser.add_argument("model_directory", metavar="MODEL")
    return EngineArgs.add_cli_args(parser)


def make_engine(options: argparse.Namespace) -> LLM:
    """The engine of what `make_parser` read."""
    from vllm import LLM, EngineArgs

    options.model = options.model_directory
    engine_args = EngineArgs.from_cli_args(options)
    # Counters of steps and tokens come from the engine's own statistics, which LLM leaves off by default.
    engine_args.disable_log_stats = False
    return LLM.from_engine_args(engine_args)


def main() -> None:
    """Start the engine, then listen: whoever gets an answer gets it from a ready engine."""
    parser = make_parser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(sys.argv[1:])
    name = options.served_model_name
    engine = make_engine(options)
    handler = make_handler(engine, name[0] if isinstance(name, list) else str(name or options.model))
    with HTTPServer((options.host, options.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
