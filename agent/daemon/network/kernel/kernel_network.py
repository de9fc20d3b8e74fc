"""Kernel part of all sandboxes' networks: nftables rules, routes, listening sockets, and links to the uplink."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from agent.common.config.egress import EgressSettings
from agent.common.errors import HostError
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import KERNEL_REASONS, Reason
from agent.common.telemetry import log, step
from agent.daemon.network.kernel import links, listeners, namespaces, nft, uplink
from agent.daemon.network.kernel.pool import AddressPool
from agent.daemon.network.kernel.ruleset import EGRESS, GUARD, Mode, mode_of, render

_T = TypeVar("_T")
_TABLES = (f"netdev {GUARD}", f"inet {EGRESS}")


@contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


class KernelNetwork:
    """Networks by sandbox id; the namespace with its tap must exist (`agent.daemon.network.kernel.namespaces`).

    :param marker: file that exists while the uplink may have our rules.
    """

    def __init__(self, settings: EgressSettings, marker: Path) -> None:
        self._marker = marker
        self._settings = settings
        self._pool = AddressPool(settings.pool_ipv4, settings.pool_ipv6)
        self._slots: dict[str, int] = {}
        self._uplink = asyncio.Lock()
        self._uplink_fd = -1
        self._uplink_ready = False

    async def aclose(self) -> None:
        """Remove the uplink's rules unless a sandbox needs them; networks of kept sandboxes stay.

        While the daemon runs the rules stay, since loading them takes ten times as long as a sandbox's own.
        """
        try:
            await self.tear_down_unused()
        except HostError as error:
            log.error("uplink rules not removed", error=error.message)
        if self._uplink_fd >= 0:
            os.close(self._uplink_fd)
            self._uplink_fd = -1

    def slot(self, sandbox_id: str) -> int | None:
        """Return the sandbox's slot in the address pool; None if it is not routed to the uplink."""
        return self._slots.get(sandbox_id)

    def restore(self, sandbox_id: str, slot: int | None) -> None:
        """Register the slot of a sandbox that an earlier daemon made."""
        if slot is not None:
            self._pool.reserve(slot)
            self._slots[sandbox_id] = slot

    async def setup(self, sandbox_id: str, policy: Policy, *, secrets: bool) -> list[socket.socket]:
        """Load the rules of a fresh namespace, then its routes and link; return its listening sockets.

        :param secrets: whether the sandbox has secrets, which makes its TCP go through the proxy.
        :raises ResourceExhausted: the address pool has no free slot.
        :raises HostError: the kernel refused.
        """
        mode = mode_of(policy, secrets=secrets)
        text = render(policy, mode, replace=False)

        sockets: list[socket.socket] = []

        def work() -> None:
            nft.run(text)
            links.route_marked()
            sockets.extend(listeners.make())

        try:
            with step("network.rules"):
                await self._inside(sandbox_id, work, "make the network of a sandbox")
            with step("network.link"):
                await self._route(sandbox_id, mode)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return sockets

    async def update(self, sandbox_id: str, policy: Policy, *, secrets: bool, present: str = "") -> None:
        """Put another policy into force; its rules are replaced in one transaction.

        :param present: `digest` of the loaded rules; equal rules are not loaded again.
        :raises ResourceExhausted: the address pool has no free slot.
        :raises HostError: the kernel refused.
        """
        mode = mode_of(policy, secrets=secrets)
        if present != self.digest(policy, secrets=secrets):
            text = render(policy, mode, replace=True)
            await self._inside(sandbox_id, lambda: nft.run(text), "change the rules of a sandbox")
        await self._route(sandbox_id, mode)

    @staticmethod
    def digest(policy: Policy, *, secrets: bool) -> str:
        """Return a digest of the rules of a policy."""
        text = render(policy, mode_of(policy, secrets=secrets), replace=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    async def listen(self, sandbox_id: str) -> list[socket.socket]:
        """Return new listening sockets, for a new egress process.

        :raises HostError: the kernel refused.
        """
        return await self._inside(sandbox_id, listeners.make, "listen in a sandbox's namespace")

    async def take_drops(self, sandbox_id: str) -> dict[Reason, int]:
        """Return the packets that the rules dropped since the last call, by reason; reasons without drops are left out.

        :raises HostError: the counters cannot be read.
        """
        counts = await self._inside(sandbox_id, lambda: nft.take_counters(*_TABLES), "read the counters of a sandbox")
        return {reason: counts[reason.value] for reason in KERNEL_REASONS if counts.get(reason.value)}

    async def remove(self, sandbox_id: str) -> None:
        """Remove the sandbox's link, then free its addresses for others. Idempotent.

        :raises HostError: the link cannot be removed; its addresses stay reserved.
        """
        slot = self._slots.pop(sandbox_id, None)
        if slot is not None:
            try:
                await self._in_uplink(lambda: links.remove_outer(slot), "remove the link of a sandbox")
            except BaseException:
                self._slots[sandbox_id] = slot
                raise
            self._pool.release(slot)

    # -- routing -------------------------------------------------------------------------------------------------------

    async def _route(self, sandbox_id: str, mode: Mode) -> None:
        """Make or remove the link to the uplink, as the mode needs it."""
        if mode.routed:
            await self._ensure_uplink()
        if mode.routed and sandbox_id not in self._slots:
            await self._connect(sandbox_id)
        elif not mode.routed and sandbox_id in self._slots:
            await self._inside(sandbox_id, links.remove_uplink, "remove the link of a sandbox")
            await self.remove(sandbox_id)

    async def _connect(self, sandbox_id: str) -> None:
        slot = self._slots[sandbox_id] = self._pool.allocate()
        pair, outer = self._pool.pair(slot), self._uplink_fd

        def connect() -> None:
            with _opened(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as inner:
                namespaces.enter(outer)
                links.remove_outer(slot)  # left by a daemon that died before it stored the slot
                namespaces.enter(inner)
                links.make_uplink(slot, pair, outer)
                namespaces.enter(outer)
                links.open_outer(slot, pair)
                namespaces.enter(inner)
                links.finish_uplink(pair)

        try:
            await self._inside(sandbox_id, connect, "connect a sandbox to the uplink")
        except BaseException:
            with contextlib.suppress(HostError):
                await asyncio.shield(self.remove(sandbox_id))
            raise

    async def _ensure_uplink(self) -> None:
        async with self._uplink:
            if not self._uplink_ready:
                self._marker.touch()
                await self._in_uplink(lambda: uplink.set_up(self._pool), "set the uplink up")
                self._uplink_ready = True

    async def tear_down_unused(self) -> None:
        """Remove the uplink's rules if no sandbox needs them, also those of an earlier daemon.

        :raises HostError: the kernel refused.
        """
        async with self._uplink:
            if self._marker.exists() and not self._slots:
                await self._in_uplink(uplink.tear_down, "remove the uplink's rules")
                self._marker.unlink(missing_ok=True)
                self._uplink_ready = False

    # -- threads -------------------------------------------------------------------------------------------------------

    async def _inside(self, sandbox_id: str, work: Callable[[], _T], what: str) -> _T:
        with _opened(namespaces.open_namespace(sandbox_id)) as fd:
            return await namespaces.run_in(fd, work, what)

    async def _in_uplink(self, work: Callable[[], _T], what: str) -> _T:
        if self._uplink_fd < 0:
            self._uplink_fd = uplink.open_namespace(self._settings.uplink)
        return await namespaces.run_in(self._uplink_fd, work, what)
