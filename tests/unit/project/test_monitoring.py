"""Alerts and dashboard ask for metrics that there are, and each alert says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent.common import telemetry
from agent.gateway import metrics

DOCS = Path(__file__).parents[3] / "docs"
RULES = yaml.safe_load((DOCS / "monitoring/alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = json.loads((DOCS / "monitoring/dashboard.json").read_text())["panels"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [panel["targets"][0]["expr"] for panel in PANELS]


def series(registry: CollectorRegistry) -> set[str]:
    """Returns the names of all series, with their labels' names not among them."""
    names = set()
    for family in registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_there(expression: str) -> None:
    known = series(telemetry.registry) | series(metrics.registry) | {"up"}
    asked = set(re.findall(r"\b(?:sandboxd_\w+|up)\b(?=[{\[ ]|$)", expression))
    assert asked, expression
    assert asked <= known, expression


def test_each_alert_has_its_entry_and_no_entry_lacks_its_alert() -> None:
    names = [rule["alert"] for rule in RULES]
    entries = re.findall(r"^### (\w+)$", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert entries == names
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels_lie_side_by_side() -> None:
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS}
    assert len(places) == len({panel["id"] for panel in PANELS}) == len(PANELS)
