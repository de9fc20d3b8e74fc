"""The agent's side of the egress process: keeps a link to it, and tells it what to do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agent.common.background import BackgroundLoop, Backoff, Supervisor
from agent.common.errors import HostError
from agent.common.telemetry import log
from agent.daemon.network.egress.supervisor import Peer, Reached
from agent.egress.control_protocol import Link, LinkClosed

_ANSWER_TIMEOUT_S = 10.0
_BACKOFF = Backoff(0.05, 5.0, settle_s=30.0)  # to find out that a process does not answer takes up to 20 s


class EgressProcess:
    """One `sandboxd-egress`, kept alive by its peer.

    :param on_report: takes each report (`agent.egress.report`).
    :param on_empty: called when a process has no sandboxes yet, after every start of one: hands them over.
    """

    def __init__(
        self,
        peer: Peer,
        on_report: Callable[[dict[str, Any]], None],
        on_empty: Callable[[], Awaitable[None]],
        supervisor: Supervisor,
    ) -> None:
        self._peer = peer
        self._on_report = on_report
        self._on_empty = on_empty
        self._link: Link | None = None
        self._ready = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._seq = 0
        self._supervisor = supervisor
        self._keeper: BackgroundLoop | None = None
        self.sandboxes: dict[str, str] = {}  # what the process had when it was found: id to digest

    async def start(self) -> None:
        """Reaches the process, and begins to watch over it. :raises HostError:"""
        self._take(await self._peer.reach())
        self._keeper = self._supervisor.start("egress-link", self._keep, _BACKOFF)

    def _take(self, reached: Reached) -> None:
        self._link, self.sandboxes = reached.link, reached.sandboxes

    async def aclose(self, *, stop: bool) -> None:
        """Ends the watch; with `stop`, the process as well."""
        if self._keeper is not None:
            await self._keeper.stop()
        if self._link is not None:
            self._link.close()
        await self._peer.aclose(stop=stop)

    async def _keep(self) -> None:
        """Reach the process if its link is gone, and serve it until it ends; while it is away, nothing passes.

        :raises HostError: always: it ended, or cannot be reached.
        """
        if self._link is None:
            self._take(await self._peer.reach())
        assert self._link is not None
        try:
            await self._serve(self._link)
        except asyncio.CancelledError:  # `aclose` decides whether the process goes on
            raise
        except BaseException:
            await self._give_up(self._link)
            raise
        await self._give_up(self._link)
        raise HostError(f"egress process ended: {self._peer.said()}", reason="EGRESS_NOT_RUNNING")

    async def _give_up(self, link: Link) -> None:
        self._link = None  # first: the next attempt reaches for the process even if this one cannot be ended
        link.close()
        await self._peer.give_up()

    async def _serve(self, link: Link) -> None:
        """Return when the process or its link is gone; raise what the tasks that notice it raised."""
        receiving = asyncio.create_task(self._receive(link))
        ending = asyncio.create_task(self._peer.ended())
        # Handing over needs the link to be read, and must not delay the notice that the process died.
        handing = asyncio.create_task(self._hand_over())
        try:
            done, _ = await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ready.clear()
            for task in (receiving, ending, handing):
                task.cancel()
            await asyncio.gather(receiving, ending, handing, return_exceptions=True)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LinkClosed("the egress process ended"))
        for task in done:
            task.result()

    async def _hand_over(self) -> None:
        try:
            await self._on_empty()
        except Exception:  # noqa: BLE001  what one sandbox lacks is its own affair: the others must work
            log.exception("handing sandboxes to the egress process failed")
        self._ready.set()

    async def _receive(self, link: Link) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                message, _ = await link.receive()
                if "event" in message:
                    self._on_report(message)
                elif (future := self._waiting.get(message["seq"])) is not None and not future.done():
                    future.set_result(message)

    # -- orders --------------------------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Returns once the process runs and knows what it must. :raises HostError: not within 10 s."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise HostError(
                f"the egress process does not run: {self._peer.said()}", reason="EGRESS_NOT_RUNNING"
            ) from None

    async def call(self, op: str, fds: Sequence[int] = (), /, **fields: Any) -> dict[str, Any]:
        """Has the process do something and returns its result. :raises HostError: it failed, or is gone."""
        link = self._link
        if link is None:
            raise HostError("the egress process does not run", reason="EGRESS_NOT_RUNNING")
        self._seq += 1
        seq = self._seq
        answer = self._waiting[seq] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await link.send({"seq": seq, "op": op, **fields}, fds)
                message = await answer
        except (LinkClosed, TimeoutError) as error:
            link.hang_up()  # what does not answer is given up, and reached for again
            raise HostError(f"the egress process did not answer: {error}", reason="EGRESS_NOT_RUNNING") from error
        finally:
            del self._waiting[seq]
        if "error" in message:
            raise HostError(f"the egress process refused: {message['error']}", reason="EGRESS_FAILED")
        result: dict[str, Any] = message["result"]
        return result


def identity_of(value: dict[str, Any]) -> str:
    """Returns a short digest of JSON values: the same for the same order to the process."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2s(text.encode(), key=os.fsencode("sandboxd"), digest_size=8).hexdigest()
