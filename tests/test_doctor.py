# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext doctor` on this machine, on a filtered one, and against a server's /metrics."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from vllm_ext import cli, compat, doctor


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """A loopback server with one line of ours and one of vLLM's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'vllm:num_requests 1.0\nvllm_ext:mxmoe_weight_bytes{engine="0"} 42.0\n')

        def log_message(self, *_arguments: object) -> None:
            """Keep the test's output clean."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_json_report_of_a_sound_installation(metrics_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json", "--server", metrics_url + "/"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["problems"] == []
    assert code == 0
    assert report["vllm"].startswith("0.32.")
    assert report["plugin_loaded"] is True
    assert report["features"]["mxmoe"]["status"] == "ready"
    assert report["features"]["smartspec"]["status"] == "planned"
    assert {patch["status"] for patch in report["patches"]} == {"match"}
    assert all({"target", "status", "reason"} <= patch.keys() for patch in report["patches"])
    assert report["server"] == {'vllm_ext:mxmoe_weight_bytes{engine="0"}': 42.0}


def test_filtered_plugin_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "plugin NOT loaded" in out
    assert "VLLM_PLUGINS='another' leaves the pack out" in out
    assert "add vllm_ext to VLLM_PLUGINS" in out


def test_no_vllm_and_a_dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "find_installed_vllm", lambda: None)
    report = doctor.gather(server="http://127.0.0.1:9")
    assert report["vllm"] is None
    assert report["patches"] == []
    assert 'pip install "vllm==0.32.*"' in report["problems"][0]["fix"]
    assert "cannot read http://127.0.0.1:9/metrics" in report["problems"][1]["problem"]
