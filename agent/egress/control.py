"""Server of the control socket: executes the agent's orders, which add, change and remove sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.common.accepting import Acceptor
from agent.common.aio import TaskSet
from agent.common.background import QUICK, Supervisor
from agent.common.ca import LocalCa
from agent.common.errors import AgentError
from agent.common.policy.policy import Policy
from agent.common.policy.secret import Secret
from agent.egress.control_protocol import SOCKETS, ControlLink, LinkClosed, close_all
from agent.egress.dns.server import DnsServer
from agent.egress.report import Reporter
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import log_accept_failure
from agent.egress.tcp.proxy import TcpProxy

_REPORT_EVERY_S = 0.25
_PEER_CREDENTIALS = struct.Struct("iii")  # struct ucred, unix(7)


@dataclass(slots=True)
class ServedSandbox:
    """A sandbox with its DNS server and TCP proxy. `digest` identifies the order that it was assigned by."""

    sandbox: SandboxState
    digest: str
    dns: DnsServer
    tcp: TcpProxy

    async def aclose(self) -> None:
        """Stop both servers and end all connections of the sandbox."""
        await self.dns.aclose()
        await self.tcp.aclose()
        self.sandbox.close()


class Control:
    """Control socket and table of sandboxes. A new link replaces the previous one, as after a restart of the agent.

    :param make_servers: constructor of a sandbox's DNS server and TCP proxy.
    :param identity: fields that "hello" is answered with, besides PID and sandboxes.
    :param owner_uid: user whose links are accepted; others are closed at once.
    :param supervisor: runs the loop that sends reports.
    """

    def __init__(
        self,
        make_servers: Callable[[SandboxState], tuple[DnsServer, TcpProxy]],
        identity: dict[str, Any],
        owner_uid: int,
        supervisor: Supervisor,
    ) -> None:
        self._make_servers = make_servers
        self._identity = identity
        self._owner_uid = owner_uid
        self._served: dict[str, ServedSandbox] = {}
        self._supervisor = supervisor
        self._reporter = Reporter()
        self._link: ControlLink | None = None
        self._serving = TaskSet()
        self._done = asyncio.Event()

    async def run(self, listener: socket.socket) -> None:
        """Serve until the link is closed while no sandbox is assigned."""
        reporting = self._supervisor.start("report", self._report, QUICK)
        acceptor = Acceptor(listener, self._accepted, log_accept_failure)
        try:
            await self._done.wait()
        finally:
            acceptor.close()
            await reporting.stop()
            for served in list(self._served.values()):
                await served.aclose()

    def _accepted(self, sock: socket.socket) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        if _PEER_CREDENTIALS.unpack(raw)[1] != self._owner_uid:
            sock.close()
            return
        if self._link is not None:
            self._link.hang_up()  # the task that receives from it closes it
        self._link = ControlLink(sock)
        self._serving.spawn(self._serve(self._link))

    async def _serve(self, link: ControlLink) -> None:
        try:
            while True:
                message, fds = await link.receive()
                answer: dict[str, Any] = {"seq": message.get("seq")}
                try:
                    answer["result"] = await self._execute(message, fds)
                except AgentError as error:
                    answer["error"] = error.message
                except (KeyError, ValueError, TypeError, OSError) as error:
                    answer["error"] = f"{type(error).__name__}: {error}"
                finally:
                    close_all(fds)
                await link.send(answer)
        except LinkClosed:
            pass
        finally:
            link.close()
            if self._link is link:
                self._link = None
                if not self._served:
                    self._done.set()

    async def _execute(self, message: dict[str, Any], fds: list[int]) -> Any:
        match message["op"]:
            case "hello":
                sandboxes = {served.sandbox.id: served.digest for served in self._served.values()}
                return {**self._identity, "pid": os.getpid(), "sandboxes": sandboxes}
            case "assign":
                return await self._assign(message, fds)
            case "remove":
                served = self._served.pop(message["sandbox"], None)
                if served is not None:
                    await served.aclose()
                return {}
            case _:
                raise ValueError(f"unknown operation {message['op']!r}: the egress process is older than the agent")

    async def _assign(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        policy = Policy.from_json(message["policy"])
        secrets = tuple(Secret.from_json(value) for value in message["secrets"])
        ca = LocalCa.load(**message["ca"]) if message["ca"] else None
        served = self._served.get(message["sandbox"])
        if served is not None and not message["sockets"]:
            served.digest = message["digest"]
            return {"ended": served.sandbox.update(policy, secrets, ca)}
        if served is not None:  # the network namespace of the previous sockets is gone
            await self._served.pop(message["sandbox"]).aclose()
        if len(message["sockets"]) != len(fds) or not set(message["sockets"]) <= set(SOCKETS):
            raise ValueError("names of sockets and descriptors do not match")
        sandbox = SandboxState(message["sandbox"], policy, self._reporter, secrets, ca)
        dns, tcp = self._make_servers(sandbox)
        sockets = {kind: socket.socket(fileno=os.dup(fd)) for kind, fd in zip(message["sockets"], fds, strict=True)}
        for sock in sockets.values():
            sock.setblocking(False)
        dns.start(_of(sockets, "dns-udp"), _of(sockets, "dns-tcp"))
        tcp.start(_of(sockets, "tcp"))
        self._served[sandbox.id] = ServedSandbox(sandbox, message["digest"], dns, tcp)
        return {"ended": 0}

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            link = self._link
            report = self._reporter.take() if link is not None else None
            if link is not None and report is not None:
                with contextlib.suppress(LinkClosed):
                    await link.send(report)


def _of(sockets: dict[str, socket.socket], kind: str) -> list[socket.socket]:
    return [sock for name, sock in sockets.items() if name in (f"{kind}4", f"{kind}6")]
