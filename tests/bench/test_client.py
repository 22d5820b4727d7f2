# SPDX-License-Identifier: Apache-2.0
"""What the runner asks of `vllm bench serve`, and what it makes of its answers, with a stand-in for the client."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import client
from bench.case import Workload, parse_case
from bench.client import RunFailed, prepare_load, prepare_requests, run_client
from bench.records import ROOT
from bench.serve.server import VllmServer, list_group
from bench.serve.usage import CpuReading, read_cpu, read_resident_bytes

#: Takes the options of `vllm bench serve`; BEHAVIOUR says how it ends.
STAND_IN = """#!{python}
import json, os, subprocess, sys, time
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
behaviour = os.environ["BEHAVIOUR"]
place = sys.argv[sys.argv.index("--result-dir") + 1]
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(os.path.join(place, "seen.json"), "w") as seen:
    json.dump({{"argv": sys.argv[1:], "group": os.getpgid(0), "plugins": os.environ["VLLM_PLUGINS"],
               "hash": os.environ["PYTHONHASHSEED"]}}, seen)
print("connecting")
if behaviour == "dies":
    print("no such tokenizer")
    child.kill()
    sys.exit(2)
if behaviour != "silent":
    print("Starting main benchmark run...")
if behaviour == "hangs":
    time.sleep(600)
with open(os.path.join(place, "client.json"), "w") as result:
    completed, failed = 3 - (behaviour == "sends fewer"), int(behaviour == "loses")
    json.dump({{"completed": completed, "failed": failed, "duration": 2.0}}, result)
print("============ Serving Benchmark Result ============")
child.kill()
"""


class Client:
    """A stand-in client and the folder in which it runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.script = folder / "vllm"
        self.script.write_text(STAND_IN.format(python=sys.executable))
        self.script.chmod(0o755)
        self.edges: list[float] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(client, "find_vllm_script", lambda: self.script)

    def run(self, behaviour: str, limit: float = 30.0) -> dict[str, Any]:
        self._monkeypatch.setenv("BEHAVIOUR", behaviour)
        server = VllmServer("none", log_path=self.folder / "server.log")
        server.port = 1
        load = client.Load(3, ["--num-prompts", "3"], {"PYTHONHASHSEED": "5"})
        return run_client(server, load, "name", "model", self.folder, limit, lambda: self.edges.append(time.time()))

    @property
    def seen(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "seen.json").read_text()))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(tmp_path, monkeypatch)


def make_workload(mode: str = "server", **content: Any) -> Workload:
    case = {"model": "none", "mode": mode, "workload": {"num_requests": 3, **content}}
    return parse_case(case, "trial").workload


def test_client_is_asked_and_its_result_is_read(stand_in: Client) -> None:
    assert stand_in.run("works") == {"completed": 3, "failed": 0, "duration": 2.0}
    argv = stand_in.seen["argv"]
    assert argv[:2] == ["bench", "serve"]
    pairs = dict(zip(argv[2::2], argv[3::2], strict=False))
    assert pairs["--base-url"] == "http://127.0.0.1:1"
    assert (pairs["--model"], pairs["--tokenizer"], pairs["--temperature"]) == ("name", "model", "0")
    assert argv[-2:] == ["--num-prompts", "3"]
    # The pack must not be in the client either, and the load's own environment counts.
    assert (stand_in.seen["plugins"], stand_in.seen["hash"]) == ("", "5")
    assert len(stand_in.edges) == 2
    assert list_group(stand_in.seen["group"]) == []


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("dies", r"ended with exit code 2:(?s:.)*no such tokenizer"),
        ("loses", "1 requests failed, 3 of 3 completed"),
        ("sends fewer", "0 requests failed, 2 of 3 completed"),
        ("silent", "did not say when it began"),
    ],
)
def test_failure_of_the_client_is_told(stand_in: Client, behaviour: str, message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        stand_in.run(behaviour)
    assert list_group(stand_in.seen["group"]) == []


def test_result_of_an_earlier_run_is_never_read(stand_in: Client) -> None:
    stand_in.run("works")
    with pytest.raises(RunFailed, match="exit code 2"):
        stand_in.run("dies")
    assert not (stand_in.folder / "client.json").exists()


def test_hanging_client_ends_with_its_children(stand_in: Client) -> None:
    with pytest.raises(RunFailed, match=r"longer than its limit of 1\.5 s(?s:.)*Starting main benchmark run"):
        stand_in.run("hangs", limit=1.5)
    assert list_group(stand_in.seen["group"]) == []


def test_interrupted_client_ends_with_its_children(stand_in: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHAVIOUR", "hangs")
    server = VllmServer("none", log_path=stand_in.folder / "server.log")
    server.port = 1

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_client(server, client.Load(1), "name", "model", stand_in.folder, 30, interrupt)
    assert list_group(stand_in.seen["group"]) == []


def test_client_ends_with_its_killed_caller(stand_in: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHAVIOUR", "hangs")
    code = f"""
from pathlib import Path
from bench import client
from bench.serve.server import VllmServer
folder = Path({str(stand_in.folder)!r})
client.find_vllm_script = lambda: folder / "vllm"
server = VllmServer("none", log_path=folder / "server.log")
server.port = 1
client.run_client(server, client.Load(1), "name", "model", folder, 60, lambda: (folder / "began").touch())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (stand_in.folder / "began").exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert len(list_group(stand_in.seen["group"])) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while list_group(stand_in.seen["group"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list_group(stand_in.seen["group"]) == []


def test_the_client_does_not_go_through_a_proxy() -> None:
    assert client.leave_proxy_out({})["no_proxy"] == "127.0.0.1,localhost"
    told = client.leave_proxy_out({"NO_PROXY": "intern,localhost", "no_proxy": ""})
    assert told == {"no_proxy": "intern,localhost,127.0.0.1", "NO_PROXY": "intern,localhost,127.0.0.1"}


@pytest.mark.parametrize("name", ["custom", "timed_trace"])
def test_a_file_with_too_few_requests_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    workload = make_workload(name=name, options={"path": str(path)})
    with pytest.raises(RunFailed, match=r"two\.jsonl has 2 requests, workload\.num_requests is 3"):
        client.prepare_load(workload, "none", 0, tmp_path)


def test_random_load(tmp_path: Path) -> None:
    workload = make_workload(
        name="random",
        options={"input_len": 5, "output_len": 6, "request_rate": 2.5, "max_concurrency": 4},
        goodput={"ttft": 300, "tpot": 50.5},
        client_args="--num-warmups 2",
    )
    assert list(prepare_load(workload, "none", 7, tmp_path).args) == [
        *("--dataset-name", "random", "--num-prompts", "3", "--seed", "7"),
        *("--random-input-len", "5", "--random-output-len", "6", "--request-rate", "2.5", "--max-concurrency", "4"),
        *("--ignore-eos", "--goodput", "ttft:300", "tpot:50.5", "--num-warmups", "2"),
    ]


def test_prefix_repetition_and_trace_loads(tmp_path: Path) -> None:
    workload = make_workload(name="prefix_repetition", options={"prefix_len": 8, "num_prefixes": 2})
    args = prepare_load(workload, "none", 0, tmp_path).args
    assert list(args[6:10]) == ["--prefix-repetition-prefix-len", "8", "--prefix-repetition-num-prefixes", "2"]
    path = tmp_path / "trace.jsonl"
    path.write_text("{}\n" * 3)
    args = prepare_load(make_workload(name="timed_trace", options={"path": str(path)}), "none", 0, tmp_path).args
    assert ["--dataset-path", str(path)] == list(args[6:8])


def test_custom_load_keeps_lengths_and_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "output_tokens": n + 1}) + "\n" for n in range(4)))
    workload = make_workload(name="custom", options={"path": str(path)}, extra_body={"structured_outputs": {"x": 1}})
    args = list(prepare_load(workload, "none", 0, tmp_path).args)
    assert args[args.index("--custom-output-len") :][:2] == ["--custom-output-len", "-1"]
    assert "--disable-shuffle" in args
    assert json.loads(args[args.index("--extra-body") + 1]) == {"structured_outputs": {"x": 1}}
    # A grammar may end before the asked length: the end of sequence then counts.
    assert "--ignore-eos" not in args
    offline = make_workload(mode="offline", name="custom", options={"path": str(path)})
    requests = prepare_requests(offline, "none", 0, tmp_path).requests
    assert [request["output_tokens"] for request in requests] == [1, 2, 3]
    short = make_workload(mode="offline", name="custom", options={"path": str(path)}, num_requests=9)
    with pytest.raises(RunFailed, match=r"has 4 requests, workload\.num_requests is 9"):
        prepare_requests(short, "none", 0, tmp_path)
    with pytest.raises(RunFailed, match="no file absent"):
        prepare_load(make_workload(name="custom", options={"path": "absent"}), "none", 0, tmp_path)


def test_made_workload_differs_by_seed_only(tmp_path: Path, tiny_moe: str) -> None:
    workload = make_workload(name="chat", options={"max_model_len": 256, "request_rate": 3.0})
    loads = [prepare_load(workload, tiny_moe, seed, tmp_path / str(number)) for number, seed in enumerate((1, 1, 2))]
    texts = [Path(load.args[load.args.index("--dataset-path") + 1]).read_text() for load in loads]
    assert texts[0] == texts[1] != texts[2]
    offline = make_workload(mode="offline", name="chat", options={"max_model_len": 256})
    requests = prepare_requests(offline, tiny_moe, 1, tmp_path).requests
    assert len(requests) == 3
    assert all(request["prompt"] and request["output_tokens"] >= 1 for request in requests)


def test_second_request_body_is_refused(tmp_path: Path, tiny_moe: str) -> None:
    workload = make_workload(name="tool_calls", extra_body={"x": 1})
    with pytest.raises(RunFailed, match="sends a request body of its own"):
        prepare_load(workload, tiny_moe, 0, tmp_path)


def test_usage_counts_a_group_with_its_ended_children() -> None:
    burn = "import time\nbegan = time.process_time()\nwhile time.process_time() - began < 0.5: pass"
    script = f"""
import subprocess, sys
data = bytearray(64 << 20)
print("ready", flush=True)
sys.stdin.readline()
{burn}
print("burnt", flush=True)
sys.stdin.readline()
subprocess.run([sys.executable, "-S", "-c", {burn!r}])
print("burnt again", flush=True)
sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    readings = []
    with process:
        while process.stdout.readline():
            readings.append(read_cpu(process.pid))
            assert read_resident_bytes(process.pid) >= 64 << 20
            process.stdin.write("\n")
            process.stdin.flush()
            if len(readings) == 3:
                break
    # Half a second of its own to the millisecond or so, and half a second and a start of an awaited child in ticks.
    assert readings[1].seconds_since(readings[0]) == pytest.approx(0.5, abs=0.01)
    assert 0.46 <= readings[2].seconds_since(readings[1]) < 1.0
    assert read_cpu(process.pid) == CpuReading({}, {})


def test_usage_of_ended_threads_is_not_lost_nor_counted_twice() -> None:
    before = CpuReading({1: 10.0, 2: 5.0}, {1: 1500})
    # Thread 2 used 0.3 s more and ended; thread 3 is new.
    after = CpuReading({1: 10.2, 3: 0.1}, {1: 1560})
    assert after.seconds_since(before) == pytest.approx(0.58)
    assert CpuReading({1: 10.2004, 2: 5.1}, {1: 1531}).seconds_since(before) == pytest.approx(0.3004)


#: Maps the file given, and more in a child of its process group with "fork"; says when all pages are resident.
MAPPER = """
import mmap, os, sys
def touch():
    with open(sys.argv[1], "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert sum(pages[place] for place in range(0, len(pages), 4096)) >= 0
    return pages
pages = touch()
own = bytearray(b"1") * (8 << 20)
reading, writing = os.pipe()
if sys.argv[2] == "fork" and not (child := os.fork()):
    pages = touch()
    os.write(writing, b"1")
    sys.stdin.readline()
    os._exit(0)
if sys.argv[2] == "fork":
    os.read(reading, 1)
print("ready", flush=True)
sys.stdin.readline()
"""


def test_memory_shared_in_a_group_counts_once_and_another_group_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(b"x" * (32 << 20))
    with ExitStack() as stack:
        groups = []
        values = []
        for kind in ("alone", "fork"):
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", MAPPER, str(path), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
            stack.callback(process.communicate)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            groups.append(process.pid)
            values.append([read_resident_bytes(group) for group in groups])
    alone, (still_alone, forked) = values[0][0], values[1]
    # The interpreter itself has about 10 MiB.
    assert 40 << 20 <= alone <= 60 << 20
    assert still_alone == pytest.approx(alone, abs=1 << 20)
    # Two processes share the file's pages, and those of their memory that neither has written to since the fork.
    assert forked == pytest.approx(alone, abs=6 << 20)
