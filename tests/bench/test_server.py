# SPDX-License-Identifier: Apache-2.0
"""VllmServer's handling of processes. The stand-ins only start, die and refuse to die; engines are tested elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.serve.server import (
    ServerFailed,
    VllmServer,
    find_free_port,
    list_group,
    parse_metric,
    read_log_tail,
)

#: Answers /health, and starts a child as an API server starts its engine. Arguments: host, port and behaviour.
STAND_IN = """
import http.server, os, signal, subprocess, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
behaviour = arguments["--behaviour"]
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
if behaviour == "dies":
    print("cannot allocate the engine", flush=True)
    os._exit(7)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("STAND_IN_ANSWER", "unset").encode())

def leave(number, frame):
    if behaviour == "stubborn":
        return
    process.kill()
    process.wait()
    os._exit(0)

signal.signal(signal.SIGTERM, leave)
server = http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Handler)
if behaviour == "silent":
    server.server_close()
    signal.pause()
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return [sys.executable, str(path)]


def make_server(stand_in: list[str], tmp_path: Path, behaviour: str, **options: Any) -> VllmServer:
    return VllmServer(
        "none", log_path=tmp_path / "server.log", command=stand_in, args=["--behaviour", behaviour], **options
    )


def assert_nothing_left(server: VllmServer) -> None:
    assert server.process_group is not None
    assert list_group(server.process_group) == []


def test_stops_cleanly_and_reports(stand_in: list[str], tmp_path: Path) -> None:
    with make_server(stand_in, tmp_path, "polite") as server:
        assert server.get("/health") == "unset"
        assert server.startup_seconds > 0
        assert server.is_running()
        assert server.process_group != os.getpgid(0)
        assert server.process_group is not None
        # The leader and its child: the count proves that list_group sees what the other tests say is gone.
        assert len(list_group(server.process_group)) == 2
    assert server.exit_code == 0
    assert not server.is_running()
    assert_nothing_left(server)
    assert server.stop() == 0


def test_kills_a_group_that_ignores_sigterm(stand_in: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    with make_server(stand_in, tmp_path, "stubborn", stop_timeout=0.5) as server:
        pass
    assert server.exit_code == -signal.SIGKILL
    assert time.monotonic() - began < 15
    assert_nothing_left(server)


def test_early_exit_shows_the_log_and_ends_orphans(stand_in: list[str], tmp_path: Path) -> None:
    server = make_server(stand_in, tmp_path, "dies")
    with pytest.raises(ServerFailed, match=r"exit code 7(?s:.)*cannot allocate the engine") as failure:
        server.start()
    assert failure.value.exit_code == 7
    assert failure.value.log_path == tmp_path / "server.log"
    assert_nothing_left(server)


def test_start_timeout_leaves_nothing(stand_in: list[str], tmp_path: Path) -> None:
    server = make_server(stand_in, tmp_path, "silent", start_timeout=1.0)
    with pytest.raises(ServerFailed, match="not ready after 1 s"):
        server.start()
    assert_nothing_left(server)


def test_interrupt_while_waiting_leaves_nothing(stand_in: list[str], tmp_path: Path) -> None:
    def interrupt(seconds: float, log_line: str) -> None:
        raise KeyboardInterrupt

    server = make_server(stand_in, tmp_path, "silent", on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt), server:
        pytest.fail("entered")
    assert_nothing_left(server)


def test_interrupt_while_stopping_leaves_nothing(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(stand_in, tmp_path, "stubborn")
    server.start()

    def interrupt(seconds: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert_nothing_left(server)
    assert server.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_server_ends_with_a_killed_caller(
    stand_in: list[str], tmp_path: Path, repository: Path, number: signal.Signals
) -> None:
    caller = f"""
import time
from pathlib import Path
from typing import Any
from bench.serve.server import VllmServer
with VllmServer(
    "none", log_path=Path({str(tmp_path / "server.log")!r}), command={stand_in!r}, args=["--behaviour", "polite"]
) as server:
    print(server.process_group, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=repository, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    group = int(process.stdout.readline())
    assert list_group(group)
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while list_group(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list_group(group) == []


def test_environment_is_added_and_removed(stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAND_IN_ANSWER", raising=False)
    with make_server(stand_in, tmp_path, "polite", env={"STAND_IN_ANSWER": "given"}) as server:
        assert server.get("/health") == "given"
    monkeypatch.setenv("STAND_IN_ANSWER", "inherited")
    with make_server(stand_in, tmp_path, "polite", env={"STAND_IN_ANSWER": None}) as server:
        assert server.get("/health") == "unset"


def test_loopback_requests_avoid_proxies(stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{find_free_port()}")
    with make_server(stand_in, tmp_path, "polite", start_timeout=20) as server:
        assert server.get("/health") == "unset"


def test_starts_once(stand_in: list[str], tmp_path: Path) -> None:
    with make_server(stand_in, tmp_path, "polite") as server, pytest.raises(RuntimeError, match="already started"):
        server.start()
    assert_nothing_left(server)


def test_missing_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match=r"no `vllm` command.*pip install"):
        VllmServer("none", log_path=tmp_path / "server.log").start()


def test_free_port_can_be_bound() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", find_free_port()))


def test_log_tail(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read_log_tail(path) == "(no output)"
    path.write_text("\n\n")
    assert read_log_tail(path) == "(no output)"
    path.write_bytes(b"".join(f"line {i}\n\n".encode() for i in range(5000)) + b"\xff end")
    assert read_log_tail(path, 2) == "line 4999\n\N{REPLACEMENT CHARACTER} end"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vllm_ext:a_bytes", 12.5), ("vllm_ext:b_total", 3.0), ("vllm_ext:a", None), ("vllm_ext:absent", None)],
)
def test_metrics_are_summed_over_labels(name: str, expected: float | None) -> None:
    exposition = (
        "# HELP vllm_ext:a_bytes Bytes.\n# TYPE vllm_ext:a_bytes gauge\n"
        'vllm_ext:a_bytes{engine="0",x="a b"} 10.0\nvllm_ext:a_bytes{engine="1"} 2.5\nvllm_ext:b_total 3.0\n'
    )
    assert parse_metric(exposition, name) == expected
