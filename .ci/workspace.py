# SPDX-License-Identifier: Apache-2.0
"""The environment's folder: commands with their output in a log, stamped steps, the lock, the failure report."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from decisions import StepError, suggest_fix

HEARTBEAT_SECONDS = 15.0
LOG_LINES_SHOWN = 12


class CommandError(Exception):
    """A command ended with an error; its output is at the end of the log."""

    def __init__(self, command: Sequence[str], returncode: int, output: str) -> None:
        super().__init__(f"exit code {returncode} from: {' '.join(command)}")
        self.output = output


class Workspace:
    """Where the environment lives, and how commands run in it with their output in the log."""

    def __init__(self, root: Path, device: str, venv: str = ".venv") -> None:
        self.root = root
        self.device = device
        self.venv = root / venv
        self.log = self.venv / "bootstrap.log"
        self.stamps = self.venv / "stamps.json"
        self.lock = self.venv / "bootstrap.lock"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Where pip installs to. Raises StepError before `create_venv`."""
        found = sorted(self.venv.glob("lib/python3*/site-packages"))
        if not found:
            raise StepError(f"{self.venv} holds no site-packages", "make clean, then run make again")
        return found[-1]

    def has_distribution(self, name: str) -> bool:
        """Whether a distribution of this normalized name (`-` as `_`) is installed."""
        return any(self.venv.glob(f"lib/python3*/site-packages/{name}-*.dist-info"))

    def clear(self) -> None:
        """Remove the environment, but not what this script keeps in its folder."""
        kept = {self.log.name, self.stamps.name, self.lock.name}
        for entry in self.venv.iterdir():
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def run(self, command: Sequence[str | Path]) -> str:
        """Run to the end, output to the log; a line on screen every `HEARTBEAT_SECONDS`.

        Returns the output. Raises CommandError on a non-zero exit.
        """
        words = [str(word) for word in command]
        # Foreign modules and install places would make this environment differ from a fresh one.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
        }
        environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_PROGRESS_BAR="off")
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(words)}\n".encode())
            log.flush()
            start = log.tell()
            child = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.root, env=environment)
            try:
                self._wait(child, start)
            except BaseException:
                child.terminate()
                child.wait()
                raise
        output = self.log.read_bytes()[start:].decode(errors="replace")
        if child.returncode != 0:
            raise CommandError(words, child.returncode, output)
        return output

    def _wait(self, child: subprocess.Popen[bytes], start: int) -> None:
        began = time.monotonic()
        while True:
            try:
                child.wait(timeout=HEARTBEAT_SECONDS)
                return
            except subprocess.TimeoutExpired:
                lines = self.log.read_bytes()[start:].decode(errors="replace").split("\n")
                latest = next((line.strip() for line in reversed(lines) if line.strip()), "")
                packages = sum(1 for _ in self.venv.glob("lib/python3*/site-packages/*.dist-info"))
                print(f"      {time.monotonic() - began:4.0f} s, {packages} packages: {latest[:80]}", flush=True)

    def pip_install(self, *arguments: str | Path) -> None:
        """`pip install` into the environment."""
        # pip would compile every module of every package, one by one; Python compiles those that are imported.
        self.run([self.python, "-m", "pip", "install", "--no-compile", *arguments])


@dataclass(frozen=True)
class Step:
    """One piece of the environment.

    `inputs` is all that its outcome depends on, beside the steps before it; `stands` is a cheap look at whether
    the outcome is still there (someone may have removed it by hand).
    """

    name: str
    inputs: str
    run: Callable[[Workspace], None]
    stands: Callable[[Workspace], bool]


def run_steps(workspace: Workspace, steps: Sequence[Step]) -> int:
    """Run the steps whose stamp is missing or old; returns how many ran. A step's rerun reruns those after it."""
    stamps = read_stamps(workspace)
    digest, ran = "", 0
    for number, step in enumerate(steps, 1):
        digest = hashlib.sha256(f"{digest}\n{step.name}\n{step.inputs}".encode()).hexdigest()
        if ran == 0 and stamps.get(step.name) == digest and step.stands(workspace):
            continue
        ran += 1
        print(f"  {number}/{len(steps)} {step.name}", flush=True)
        # The stamp goes first: an interrupted step must not pass for the finished one before it.
        stamps = {name: stamp for name, stamp in stamps.items() if name in [done.name for done in steps[: number - 1]]}
        write_stamps(workspace, stamps)
        began = time.monotonic()
        try:
            step.run(workspace)
        except (StepError, CommandError, OSError) as error:
            report_failure(workspace, f"{number}/{len(steps)} {step.name}", error, time.monotonic() - began)
            raise SystemExit(1) from None
        stamps[step.name] = digest
        write_stamps(workspace, stamps)
        print(f"      done in {time.monotonic() - began:.1f} s", flush=True)
    return ran


def read_stamps(workspace: Workspace) -> dict[str, str]:
    """Stamps of the steps that finished; none where the file is missing or damaged."""
    try:
        stamps = json.loads(workspace.stamps.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def write_stamps(workspace: Workspace, stamps: Mapping[str, str]) -> None:
    """Replace the stamp file in one move."""
    unfinished = workspace.stamps.with_suffix(".new")
    unfinished.write_text(json.dumps(stamps, indent=1), encoding="utf-8")
    unfinished.replace(workspace.stamps)


def report_failure(workspace: Workspace, step: str, error: Exception, seconds: float) -> None:
    """Say which step failed, with what, and the likely fix."""
    print(f"\nFAILED at step {step} after {seconds:.1f} s: {error}", file=sys.stderr)
    if isinstance(error, CommandError):
        print(f"last lines of {workspace.log}:", file=sys.stderr)
        for line in error.output.rstrip().splitlines()[-LOG_LINES_SHOWN:]:
            print(f"    {line[:200]}", file=sys.stderr)
    fix = error.fix if isinstance(error, StepError) else suggest_fix(getattr(error, "output", str(error)))
    print(f"likely fix: {fix}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def hold_lock(workspace: Workspace) -> Iterator[None]:
    """Let one bootstrap at a time work on the environment; the kernel frees the lock of one that dies."""
    with workspace.lock.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(f"another bootstrap (process {lock.read().strip() or '?'}) is at work; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def prepare_folder(workspace: Workspace) -> None:
    """Make the environment's folder; a foreign environment of that name is left alone and refused."""
    if (workspace.venv / "pyvenv.cfg").exists() and not workspace.stamps.exists():
        raise StepError(f"{workspace.venv} was not made by this script", "move it away, then run make again")
    workspace.venv.mkdir(exist_ok=True)
    if not workspace.stamps.exists():
        write_stamps(workspace, {})
