"""The egress client reconnects after any failure."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent.common.background import Supervisor
from agent.common.errors import HostError
from agent.daemon.network.egress.client import EgressClient
from agent.daemon.network.egress.supervisor import EgressConnection
from agent.egress.control_protocol import ControlLink, LinkClosed
from tests.support.daemon_fakes import SilentObserver


class FakeProcess:
    """A process that answers "remove"; `faults` are raised by `connect`."""

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self.end_faults: list[Exception] = []
        self.terminated = 0
        self.received = 0
        self.silent = False
        self.ends: list[ControlLink] = []
        self._serving: set[asyncio.Task[None]] = set()

    async def connect(self) -> EgressConnection:
        if self.faults:
            raise self.faults.pop(0)
        ours, theirs = socket.socketpair()
        self.ends.append(ControlLink(theirs))
        task = asyncio.create_task(self._serve(self.ends[-1]))
        self._serving.add(task)
        return EgressConnection(ControlLink(ours), {}, "x")

    async def _serve(self, link: ControlLink) -> None:
        try:
            while True:
                message, _ = await link.receive()
                self.received += 1
                if not self.silent:
                    await link.send({"seq": message["seq"], "result": {}})
        except LinkClosed:
            link.close()

    async def wait_ended(self) -> None:
        if self.end_faults:
            raise self.end_faults.pop(0)
        await asyncio.Event().wait()

    async def terminate(self) -> None:
        self.terminated += 1

    async def aclose(self, *, stop: bool) -> None:
        for link in self.ends:
            link.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def last_output(self) -> str:
        return "last words"


class Client:
    def __init__(self) -> None:
        self.process, self.observer = FakeProcess(), SilentObserver()
        self.supervisor = Supervisor(self.observer)
        self.reports: list[dict[str, Any]] = []
        self.report_faults: list[Exception] = []
        self.egress = EgressClient(self.process, self.on_report, self.on_empty, self.supervisor)

    def on_report(self, report: dict[str, Any]) -> None:
        if self.report_faults:
            raise self.report_faults.pop(0)
        self.reports.append(report)

    async def on_empty(self) -> None:
        pass

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def connected_client() -> AsyncIterator[Client]:
    made = Client()
    async with made.supervisor:
        await made.egress.start()
        await made.egress.wait_ready()
        try:
            yield made
        finally:
            await made.egress.aclose(stop=True)


async def test_a_call_under_way_fails_when_the_process_ends() -> None:
    async with connected_client() as made:
        made.process.silent = True
        calling = asyncio.create_task(made.egress.call("remove", sandbox="x"))
        await made.until(lambda: made.process.received)
        made.process.faults = [HostError("no luck")] * 100
        made.process.ends[0].hang_up()
        with pytest.raises(HostError, match="did not answer: the egress process ended"):
            await calling


@pytest.mark.parametrize("fault", [RuntimeError("can't start new thread"), HostError("no luck"), OSError(24, "x")])
async def test_it_is_reached_again_after_any_failure_to_reach_it(fault: Exception) -> None:
    async with connected_client() as made:
        made.process.faults = [fault]
        made.process.ends[0].hang_up()
        await made.until(lambda: len(made.process.ends) == 2)
        await made.egress.wait_ready()
        assert await made.egress.call("remove", sandbox="x") == {}
        first, second = (error for _, error in made.observer.failures)
        assert str(first) == "egress process ended: last words"
        assert second is fault
        assert "egress-link" in made.supervisor.failing  # until it has lasted
        assert made.process.terminated == 1


async def test_calls_are_refused_while_it_is_away() -> None:
    async with connected_client() as made:
        made.process.faults = [HostError("no luck")] * 100
        made.process.ends[0].hang_up()
        await made.until(lambda: made.supervisor.failing)
        with pytest.raises(HostError) as caught:
            await made.egress.call("remove", sandbox="x")
        assert caught.value.reason == "EGRESS_NOT_RUNNING"


async def test_a_report_that_cannot_be_understood_ends_the_link_and_is_logged() -> None:
    async with connected_client() as made:
        made.report_faults = [KeyError("counts")]
        await made.process.ends[0].send({"event": "report"})
        await made.until(lambda: len(made.process.ends) == 2)
        assert made.process.terminated == 1
        assert isinstance(made.observer.failures[0][1], KeyError)
        await made.egress.wait_ready()
        await made.process.ends[1].send({"event": "report"})
        await made.until(lambda: made.reports)


async def test_a_watch_over_the_process_that_fails_is_logged_and_begins_again() -> None:
    made = Client()
    made.process.end_faults = [RuntimeError("can't start new thread")]
    async with made.supervisor:
        await made.egress.start()
        await made.until(lambda: len(made.process.ends) == 2)
        assert [str(error) for _, error in made.observer.failures] == ["can't start new thread"]
        await made.egress.aclose(stop=True)
        assert made.supervisor.failing == {}
