# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext doctor` on this machine, on a filtered one, and against a server's /metrics."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child import run_child
from vllm_ext import cli, compat, doctor
from vllm_ext.patches import registry
from vllm_ext.structured import carrier


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
    assert report["features"]["smartspec"]["status"] == "ready"
    assert report["features"]["semipd"]["status"] == "ready"
    # What structured.forced_tokens 'auto' does on this platform.
    said = report["features"]["structured"]["reason"]
    assert said.startswith("forced tokens on") or "on CPUs only" in said
    assert report["features"]["nested"]["status"] == "planned"
    assert report["cpu_kernels"]["status"] in {"ready", "pending"}
    assert {patch["status"] for patch in report["patches"]} == {"match"}
    assert all({"target", "status", "reason"} <= patch.keys() for patch in report["patches"])
    assert report["server"] == {'vllm_ext:mxmoe_weight_bytes{engine="0"}': 42.0}


def test_what_was_switched_for_forced_tokens_is_said() -> None:
    """Of a server, what each of its engines does and why."""
    prefix = "vllm_ext:structured_forced_tokens_"
    index = carrier.ForcedTokensPlan("async").limit_index
    values: dict[str, float] = {}
    for engine, active, limit in ((0, 1, 0), (1, 0, index), (2, 0, 0), (3, 0, 999)):
        values[f'{prefix}active{{engine="{engine}"}}'] = active
        values[f'{prefix}limit_index{{engine="{engine}"}}'] = limit
    said = doctor._explain_forced_tokens(values)
    assert said['engine="0"'] == "forced tokens on"
    assert "asynchronous scheduling" in said['engine="1"']
    assert "--no-async-scheduling" in said['engine="1"']
    assert "another release" in said['engine="3"']
    assert len(said) == 3


def test_filtered_plugin_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "plugin NOT loaded" in out
    assert "VLLM_PLUGINS='another' leaves the pack out" in out
    assert "add vllm_ext to VLLM_PLUGINS" in out


def test_code_that_does_not_load_is_a_problem(tmp_path: Path) -> None:
    """A module that only a quantized model needs is broken; the plugin itself registers."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['vllm_ext.kernels.mixed_moe'] = None\n")
    code = "import json; from vllm_ext import doctor; print(json.dumps(doctor.gather()))"
    report = run_child(code, PYTHONPATH=str(tmp_path)).value
    assert report["plugin_loaded"] is True
    assert report["features"]["mxmoe"]["status"] == "off"
    (problem,) = report["problems"]
    assert "vllm_ext.kernels.mixed_moe" in problem["fix"]


def test_a_changed_vllm_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    record = registry.find_record("metrics_route")
    changed = dataclasses.replace(record, symbols=(dataclasses.replace(record.symbols[0], digest="0" * 12),))
    monkeypatch.setattr(registry, "RECORDS", (changed,))
    monkeypatch.setattr(doctor, "_probe_plugin", lambda: {"mxmoe": "MxMoEConfig", "hook": True, "broken": None})
    (problem,) = doctor.gather()["problems"]
    assert record.symbols[0].target in problem["problem"]
    assert record.without in problem["problem"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:notaport", "nonsense", "http://127.0.0.1:9"])
def test_bad_server_urls_are_problems(url: str) -> None:
    problems: list[dict[str, str]] = []
    assert doctor._read_server(url, problems) == {}
    assert "cannot read" in problems[0]["problem"]


def test_no_vllm_and_a_dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "find_installed_vllm", lambda: None)
    report = doctor.gather(server="http://127.0.0.1:9")
    assert report["vllm"] is None
    assert report["patches"] == []
    assert 'pip install "vllm==0.32.*"' in report["problems"][0]["fix"]
    assert "cannot read http://127.0.0.1:9/metrics" in report["problems"][1]["problem"]
