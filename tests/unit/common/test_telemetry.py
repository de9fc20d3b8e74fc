"""Logs, metrics and phases."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator

import pytest
import structlog

from agent.common import telemetry
from agent.common.config.daemon import LogSettings, MetricsSettings, TracingSettings
from agent.common.telemetry import collect_phases, log, registry, step


@pytest.fixture(autouse=True)
def fresh_structlog() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def samples(phase: str) -> float:
    return registry.get_sample_value("sandboxd_phase_seconds_count", {"phase": phase}) or 0.0


def test_a_step_is_a_sample_and_a_phase_even_if_it_fails() -> None:
    before = samples("test.step")
    with collect_phases() as phases:
        with step("test.step"):
            pass
        with pytest.raises(ValueError, match="x"), step("test.step"):
            raise ValueError("x")
    assert [name for name, _ in phases] == ["test.step", "test.step"]
    assert all(seconds >= 0 for _, seconds in phases)
    assert samples("test.step") == before + 2


async def test_creates_at_once_keep_their_phases_apart() -> None:
    async def create(name: str) -> list[tuple[str, float]]:
        with collect_phases() as phases, step(name):
            await asyncio.sleep(0)
        return phases

    one, two = await asyncio.gather(create("one"), create("two"))
    assert ([name for name, _ in one], [name for name, _ in two]) == (["one"], ["two"])


def test_logs_are_json_with_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.setup(LogSettings("info", "json"), MetricsSettings(), TracingSettings(), "node")
    with structlog.contextvars.bound_contextvars(rpc="GetNode"):
        log.debug("not shown")
        log.info("shown", sandbox_id="sbx-1")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["rpc"], entry["sandbox_id"], entry["level"]) == ("shown", "GetNode", "sbx-1", "info")


def test_console_logs_do_not_show_local_variables(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.setup(LogSettings("info", "console"), MetricsSettings(), TracingSettings(), "node")
    secret = "hunter2"
    try:
        raise ValueError(f"{len(secret)} letters")
    except ValueError as error:
        log.error("failed", exc_info=error)
    shown = capsys.readouterr().err
    assert "7 letters" in shown
    assert secret not in shown.replace('secret = "hunter2"', "")


def test_no_metric_has_a_label_per_sandbox() -> None:
    for metric in registry.collect():
        for sample in metric.samples:
            assert not {"sandbox", "sandbox_id", "id"} & sample.labels.keys()


def test_metrics_are_served_over_http() -> None:
    server, thread = telemetry.serve_metrics("127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5) as response:
            text = response.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "sandboxd_sandboxes" in text
    assert "sandboxd_phase_seconds" in text
