"""Client of the egress process: keeps one control link to it, reconnects, and sends it orders."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agent.common.aio import cancel_and_wait
from agent.common.background import BackgroundLoop, Backoff, Supervisor
from agent.common.errors import HostError
from agent.common.telemetry import log
from agent.daemon.network.egress.supervisor import EgressConnection, EgressProcess
from agent.egress.control_protocol import ControlLink, LinkClosed

_ANSWER_TIMEOUT_S = 10.0
_BACKOFF = Backoff(0.05, 5.0, settle_s=30.0)  # settles after more than the 20 s timeout of a hello


class EgressClient:
    """Control link to one `sandboxd-egress`, reconnected after any failure.

    :param process: starts or finds the egress process.
    :param on_report: called with each report (`agent.egress.report`).
    :param on_empty: called after each connect; must send every sandbox that is not in `sandboxes`.
    :param supervisor: restarts the loop that reconnects.
    """

    def __init__(
        self,
        process: EgressProcess,
        on_report: Callable[[dict[str, Any]], None],
        on_empty: Callable[[], Awaitable[None]],
        supervisor: Supervisor,
    ) -> None:
        self._process = process
        self._on_report = on_report
        self._on_empty = on_empty
        self._link: ControlLink | None = None
        self._ready = asyncio.Event()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._seq = 0
        self._supervisor = supervisor
        self._loop: BackgroundLoop | None = None
        self.sandboxes: dict[str, str] = {}  # that the process served when it was connected to: id to digest

    async def start(self) -> None:
        """Connect to the process, starting it if it is the agent's own, and keep the link connected.

        :raises HostError: the process cannot be started, or does not answer.
        """
        self._take(await self._process.connect())
        self._loop = self._supervisor.start("egress-link", self._run, _BACKOFF)

    def _take(self, connection: EgressConnection) -> None:
        self._link, self.sandboxes = connection.link, connection.sandboxes

    async def aclose(self, *, stop: bool) -> None:
        """Close the link; with `stop`, end the process as well."""
        if self._loop is not None:
            await self._loop.stop()
        if self._link is not None:
            self._link.close()
        await self._process.aclose(stop=stop)

    async def _run(self) -> None:
        """Connect unless connected, and serve the link until it closes. Without a process, no traffic passes.

        :raises HostError: always: the process ended, or cannot be connected to.
        """
        if self._link is None:
            self._take(await self._process.connect())
        assert self._link is not None
        try:
            await self._serve(self._link)
        except asyncio.CancelledError:  # `aclose` decides whether to end the process
            raise
        except BaseException:
            await self._disconnect(self._link)
            raise
        await self._disconnect(self._link)
        raise HostError(f"egress process ended: {self._process.last_output()}", reason="EGRESS_NOT_RUNNING")

    async def _disconnect(self, link: ControlLink) -> None:
        self._link = None  # first: the next attempt must connect anew even if ending the process fails
        link.close()
        await self._process.terminate()

    async def _serve(self, link: ControlLink) -> None:
        """Receive until the link closes or the process ends.

        Re-raise the exception of the task that noticed it, if any.
        """
        receiving = asyncio.create_task(self._receive(link))
        ending = asyncio.create_task(self._process.wait_ended())
        # A task of its own: its calls need `_receive`, and it must not delay noticing that the process died.
        handing = asyncio.create_task(self._hand_over())
        try:
            done, _ = await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ready.clear()
            await cancel_and_wait(receiving, ending, handing)
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(LinkClosed("the egress process ended"))
        for task in done:
            task.result()

    async def _hand_over(self) -> None:
        try:
            await self._on_empty()
        except Exception:  # noqa: BLE001  the sandboxes that were sent must work
            log.exception("sending the sandboxes to the egress process failed")
        self._ready.set()

    async def _receive(self, link: ControlLink) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                message, _ = await link.receive()
                if "event" in message:
                    self._on_report(message)
                elif (future := self._pending.get(message["seq"])) is not None and not future.done():
                    future.set_result(message)

    # -- orders --------------------------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Wait until the process has been sent all sandboxes.

        :raises HostError: that takes more than 10 s.
        """
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise HostError(
                f"the egress process is not running: {self._process.last_output()}", reason="EGRESS_NOT_RUNNING"
            ) from None

    async def call(self, op: str, fds: Sequence[int] = (), /, **fields: Any) -> dict[str, Any]:
        """Send an order, with copies of `fds`, and return its result.

        :raises HostError: the process refused the order, did not answer within 10 s, or is not running.
        """
        link = self._link
        if link is None:
            raise HostError("the egress process is not running", reason="EGRESS_NOT_RUNNING")
        self._seq += 1
        seq = self._seq
        answer = self._pending[seq] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await link.send({"seq": seq, "op": op, **fields}, fds)
                message = await answer
        except (LinkClosed, TimeoutError) as error:
            link.hang_up()  # the loop ends a process that does not answer, and connects anew
            raise HostError(f"the egress process did not answer: {error}", reason="EGRESS_NOT_RUNNING") from error
        finally:
            del self._pending[seq]
        if "error" in message:
            raise HostError(f"the egress process refused: {message['error']}", reason="EGRESS_FAILED")
        result: dict[str, Any] = message["result"]
        return result


def order_digest(value: dict[str, Any]) -> str:
    """Return a short digest of an order, by which a process that runs already shows that it has the same one."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2s(text.encode(), key=os.fsencode("sandboxd"), digest_size=8).hexdigest()
