# SPDX-License-Identifier: Apache-2.0
"""The dashboard: every metric of the pack is in it, and nothing that does not exist."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.observability import METRICS


@pytest.fixture(scope="module")
def dashboard(repository: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((repository / "docs" / "grafana" / "vllm_ext.json").read_text())
    return content


def list_expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_it_shows_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    shown = {name for text in list_expressions(dashboard) for name in re.findall(r"vllm_ext:\w+", text)}
    assert shown == {metric.name for metric in METRICS}


def test_counters_are_shown_as_rates_and_gauges_as_they_are(dashboard: dict[str, Any]) -> None:
    kinds = {metric.name: metric.kind for metric in METRICS}
    for text in list_expressions(dashboard):
        for before, name, after in re.findall(r'(\w*)\(?(vllm_ext:\w+)\{engine=~"\$engine"\}(\S?)', text):
            is_rate = before in ("rate", "increase") and after == "["
            assert is_rate == (kinds[name] == "counter"), (name, text)
        # Each selects the engines that are chosen.
        assert len(re.findall(r"vllm(?:_ext)?:\w+", text)) == text.count('{engine=~"$engine"}')


def test_metrics_of_vllm_exist(dashboard: dict[str, Any]) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "v1" / "metrics"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    names = {name for text in list_expressions(dashboard) for name in re.findall(r"\bvllm:\w+", text)}
    assert names
    for name in names:
        assert f'"{name.removesuffix("_bucket")}"' in source


def test_panels_do_not_overlap_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        ), (one, other)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["description"]
            # Whoever imports it chooses where the numbers are.
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            assert all(target["legendFormat"] for target in panel["targets"])
