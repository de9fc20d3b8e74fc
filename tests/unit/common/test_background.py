"""Background loops are restarted after any failure, and tell about it until they have recovered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from agent.common.background import DEFAULT, Backoff, Supervisor, describe
from agent.common.errors import HostError
from agent.common.telemetry import LoopTelemetry
from tests.support.daemon_fakes import SilentObserver

FAST = Backoff(first_s=0.001, last_s=0.004, settle_s=0.1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


class Loop:
    """A loop that raises `faults`, one per start, and then runs until it is cancelled."""

    def __init__(self, *faults: BaseException) -> None:
        self.faults = list(faults)
        self.starts = 0
        self.stopped = False

    async def run(self) -> None:
        self.starts += 1
        if self.faults:
            raise self.faults.pop(0)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # cleaning up
            self.stopped = True


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("no thread"), HostError("no luck"), asyncio.CancelledError(), ExceptionGroup("x", [OSError()])],
)
async def test_a_loop_is_restarted_after_any_failure(fault: BaseException) -> None:
    observer, loop = SilentObserver(), Loop(fault, fault, fault)
    async with Supervisor(observer) as supervisor:
        supervisor.start("x", loop.run, FAST)
        await until(lambda: loop.starts == 4)
        assert observer.failures == [("x", fault)] * 3
        assert supervisor.failing == {"x": describe(fault)}
        assert supervisor.sentences() == (f"background loop x fails and is restarted: {describe(fault)}",)
        await until(lambda: not supervisor.failing)
        assert observer.states == [("x", False), ("x", True), ("x", True), ("x", True), ("x", False)]
    assert loop.stopped


async def test_a_failure_and_the_recovery_notify() -> None:
    seen: list[dict[str, str]] = []
    async with Supervisor(SilentObserver()) as supervisor:
        supervisor.on_change.add(lambda: seen.append(dict(supervisor.failing)))
        supervisor.start("x", Loop(OSError("y")).run, FAST)
        await until(lambda: len(seen) == 2)
    assert seen[:2] == [{"x": "OSError: y"}, {}]


async def test_an_observer_that_fails_ends_no_loop() -> None:
    class Broken(SilentObserver):
        def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
            raise OSError(28, "No space left on device")

    loop = Loop(RuntimeError("x"))
    async with Supervisor(Broken()) as supervisor:
        supervisor.start("x", loop.run, FAST)
        await until(lambda: loop.starts == 2)


async def test_a_loop_that_returns_has_ended() -> None:
    starts = []

    async def once() -> None:
        starts.append(1)

    observer = SilentObserver()
    async with Supervisor(observer) as supervisor:
        supervisor.start("x", once, FAST)
        await asyncio.sleep(0.05)
        assert starts == [1]
        assert observer.failures == []
        supervisor.start("x", once, FAST)  # the name is free again


async def test_a_name_runs_once() -> None:
    async with Supervisor(SilentObserver()) as supervisor:
        supervisor.start("x", Loop().run)
        with pytest.raises(ValueError, match="runs already"):
            supervisor.start("x", Loop().run)


async def test_loops_stop_in_reverse_order_and_are_awaited() -> None:
    order: list[str] = []

    def loop(name: str) -> Callable[[], object]:
        async def run() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                order.append(name)

        return run

    async with Supervisor(SilentObserver()) as supervisor:
        for name in ("a", "b", "c"):
            supervisor.start(name, loop(name))  # type: ignore[arg-type]
        await asyncio.sleep(0)
    assert order == ["c", "b", "a"]


async def test_a_failure_while_it_is_stopped_is_reported_and_ends_it() -> None:
    async def run() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("cannot clean up")

    observer = SilentObserver()
    async with Supervisor(observer) as supervisor:
        loop = supervisor.start("x", run, FAST)
        await asyncio.sleep(0.01)
        await loop.stop()
        await loop.stop()
        assert supervisor.failing == {}
    assert [str(error) for _, error in observer.failures] == ["cannot clean up"]


async def test_a_loop_is_stopped_during_its_pause_and_before_its_first_step() -> None:
    async with Supervisor(SilentObserver()) as supervisor:
        waiting = supervisor.start("x", Loop(OSError("x")).run, Backoff(60.0, 60.0))
        await until(lambda: supervisor.failing)
        begun = time.monotonic()
        await waiting.stop()
        await supervisor.start("y", Loop().run).stop()
        assert time.monotonic() - begun < 5
        assert supervisor.failing == {}
        supervisor.start("y", Loop().run)  # the name is free again


def test_pauses_double_with_jitter_up_to_the_last() -> None:
    for failures, longest_s in [(1, 0.1), (2, 0.2), (3, 0.4), (9, 25.6), (10, 30.0), (10_000, 30.0)]:
        pauses = [DEFAULT.pause_s(failures) for _ in range(100)]
        assert longest_s / 2 <= min(pauses) < max(pauses) <= longest_s


async def test_a_recovery_resets_the_pause() -> None:
    pauses: list[float] = []

    class Observer(SilentObserver):
        def on_failure(self, loop: str, error: BaseException, retry_in_s: float | None) -> None:
            assert retry_in_s is not None
            pauses.append(retry_in_s)

    runs = iter([0.0, 0.0, 0.0, 0.3, 0.0])

    async def run() -> None:
        await asyncio.sleep(next(runs, 60))
        raise OSError("x")

    async with Supervisor(Observer()) as supervisor:
        supervisor.start("x", run, Backoff(first_s=0.01, last_s=1.0, settle_s=0.1))
        await until(lambda: len(pauses) == 5)
    assert all(least <= pause <= most for pause, least, most in zip(
        pauses, (0.005, 0.01, 0.02, 0.005, 0.01), (0.01, 0.02, 0.04, 0.01, 0.02), strict=True
    ))  # fmt: skip


def test_telemetry_counts_and_logs_unexpected_errors_with_their_traceback() -> None:
    registry = CollectorRegistry()
    observer = LoopTelemetry(
        Counter("failures", "x", ["loop"], registry=registry), Gauge("failing", "x", ["loop"], registry=registry)
    )
    try:
        raise RuntimeError("defect")
    except RuntimeError as caught:
        defect = caught
    with structlog.testing.capture_logs() as lines:
        observer.on_state("x", failing=False)
        observer.on_failure("x", defect, 0.1)
        observer.on_failure("x", HostError("no luck"), None)
        observer.on_state("x", failing=True)
    assert [(line["event"], line["loop"], line["error"], line["exc_info"]) for line in lines] == [
        ("background loop failed", "x", "defect", defect), ("background loop failed", "x", "no luck", None),
    ]  # fmt: skip
    assert registry.get_sample_value("failures_total", {"loop": "x"}) == 2
    assert registry.get_sample_value("failing", {"loop": "x"}) == 1


def test_an_error_is_one_bounded_line() -> None:
    assert describe(OSError("a\nb " + "c" * 1000)) == "OSError: a b " + "c" * 187
