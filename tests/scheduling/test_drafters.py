# SPDX-License-Identifier: Apache-2.0
"""What drafters do with a smaller number of drafts: a table made by reading, held against what was read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import vllm
from vllm.config import speculative

from tests.scheduling.configurations import K, describe_engine
from vllm_ext.scheduling.drafters import REFUSED_METHOD, Drafter, describe_drafter

SOURCES = Path(vllm.__file__).parent / "v1"
NONE, ONE, ALL, GROWING = (0,) * 7, (1,) * 7, (K,) * 7, (1, 1, 2, 3, 4, 5, 6)


def test_drafters_that_insist_on_their_number_are_known() -> None:
    """An assertion that is not in the table would end the worker at the first step with fewer drafts."""
    folders = [SOURCES / "spec_decode", SOURCES / "worker" / "gpu" / "spec_decode"]
    pattern = re.compile(r"assert\s+\(?\s*num_speculative_tokens\s*==\s*self\.")
    found = {
        path.relative_to(SOURCES).as_posix()
        for folder in folders
        for path in folder.rglob("*.py")
        if pattern.search(path.read_text())
    }
    insisting = {
        "spec_decode/medusa.py": "medusa",
        "spec_decode/ngram_proposer_gpu.py": "ngram_gpu",
        "spec_decode/suffix_decoding.py": "suffix",
        "spec_decode/extract_hidden_states.py": REFUSED_METHOD,
    }
    assert found == set(insisting)
    for method in insisting.values():
        assert not describe_drafter(describe_engine(method)).takes_number


@pytest.mark.parametrize(
    ("engine", "drafter"),
    [
        (describe_engine("ngram"), Drafter(NONE, True, True)),
        (describe_engine("ngram_gpu"), Drafter(NONE, False, True)),
        (describe_engine("suffix"), Drafter(NONE, False, True)),
        (describe_engine("custom_class"), Drafter(NONE, False, True)),
        (describe_engine("medusa"), Drafter(ONE, False, False)),
        (describe_engine("dflash", is_parallel=True), Drafter(ONE, True, False)),
        (describe_engine("draft_model"), Drafter(GROWING, True, False)),
        (describe_engine("draft_model", is_parallel=True), Drafter(ONE, False, False)),
        (describe_engine("eagle3"), Drafter(GROWING, True, False)),
        (describe_engine("eagle3", is_parallel=True), Drafter(ONE, False, False)),
        (describe_engine("mtp"), Drafter(GROWING, True, False)),
        (describe_engine("mtp", mtp="step3p5"), Drafter(ALL, False, False)),
        (describe_engine("a new one"), Drafter(ALL, False, False)),
        (describe_engine("ngram", uses_v2=True), Drafter(NONE, True, False)),
        (describe_engine("ngram_gpu", uses_v2=True), Drafter(NONE, True, False)),
        (describe_engine("draft_model", uses_v2=True), Drafter(ALL, True, False)),
        (describe_engine("mtp", uses_v2=True), Drafter(GROWING, True, False)),
        (describe_engine("mtp", uses_v2=True, mtp="multi_module"), Drafter(ALL, True, False)),
        (describe_engine("eagle", uses_v2=True), Drafter(GROWING, True, False)),
        (describe_engine("dflash", uses_v2=True, is_parallel=True), Drafter(ONE, True, False)),
        (describe_engine("dspark", uses_v2=True, is_parallel=True), Drafter(ONE, True, False)),
    ],
)
def test_every_method(engine: Any, drafter: Drafter) -> None:
    assert describe_drafter(engine) == drafter


def test_methods_that_vllm_has_are_those_that_were_read() -> None:
    methods = {name for name in _flatten(speculative.SpeculativeMethod) if not name.endswith("_mtp")}
    lookups = {"ngram", "ngram_gpu", "suffix", "custom_class"}
    models = {"medusa", "mlp_speculator", "draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark"}
    assert methods == lookups | models | {REFUSED_METHOD}


def _flatten(annotation: Any) -> set[str]:
    if isinstance(annotation, str):
        return {annotation}
    return set().union(*map(_flatten, get_args(annotation)))
