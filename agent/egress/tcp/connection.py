"""One TCP connection of a guest's: finds out what it is for, and has it carried, opened or turned away.

What is decided, and on what grounds, is in docs/egress.md.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from agent.common.policy.addresses import Address
from agent.common.policy.reasons import Reason
from agent.egress.dns.resolver import Resolver
from agent.egress.http.intercept import Interceptor
from agent.egress.http.request_policy import Gate, Target
from agent.egress.sandbox_state import Denied, Sandbox
from agent.egress.tcp import peek, sniff
from agent.egress.tcp.authorization import Grounds, Judge
from agent.egress.tcp.sniff import Kind
from agent.egress.transport.dial import DialError, dial
from agent.egress.transport.sockets import readable, reset
from agent.egress.transport.splice import Carried, Mover

SERVER_FIRST_S = 0.3  # a client that has said nothing for so long waits for its server
HELLO_TIMEOUT_S = 15.0
_RELAY_BYTES = 64 << 10
_FULL_PAUSE_S = 0.01
# handshake_failure would be tried again; access_denied says that it is of no use (RFC 8446, 6.2).
_ALERT_ACCESS_DENIED = bytes([21, 3, 3, 0, 2, 2, 49])
_PROTOCOLS = {Kind.TLS: "tls", Kind.HTTP1: "http", Kind.HTTP2: "http"}


@dataclass(frozen=True, slots=True)
class Means:
    """What connections are served with."""

    resolver: Resolver
    mover: Mover
    interceptor: Interceptor


class TcpConnection:
    """A connection from its accept to its end; one of `Sandbox.connections`."""

    def __init__(self, sandbox: Sandbox, means: Means, client: socket.socket, address: Address, port: int) -> None:
        self._sandbox = sandbox
        self._means = means
        self._client = client
        self._judge = Judge(sandbox, means.resolver, address, port)
        self._grounds: set[Grounds] = set()
        self._carried: Carried | None = None
        self._upstream: socket.socket | None = None
        self.task: asyncio.Task[None] | None = None

    # -- what a policy change asks -------------------------------------------------------------------------------------

    def recheck(self) -> Reason | None:
        """See `agent.egress.sandbox_state.Connection`."""
        # Without grounds, it decides by the policy as it is when it decides.
        refusals = (grounds.refusal(self._sandbox) for grounds in self._grounds)
        return next((reason for reason in refusals if reason is not None), None)

    def abort(self) -> None:
        """See `agent.egress.sandbox_state.Connection`."""
        if self._carried is not None:
            self._carried.abort()
        elif self.task is not None:
            self.task.cancel()

    # -- from accept to end --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the connection to its end."""
        kind = None
        address, port = self._judge.address, self._judge.port
        try:
            if (reason := self._sandbox.policy.check_dialled(address, port)) is not None:
                raise Denied(reason, str(address))
            kind = await self._first_bytes()
            await self._serve(kind)
        except Denied as denied:
            self._deny(denied.reason, denied.host, kind)
            self._turn_away(kind)
        except (OSError, DialError) as error:
            if isinstance(error, DialError) and error.reason is not None:
                self._deny(error.reason, str(address), kind)
        finally:
            if self._carried is None:
                reset(self._client)
                if self._upstream is not None:
                    reset(self._upstream)

    def _deny(self, reason: Reason, host: str, kind: Kind | None) -> None:
        protocol = "tcp" if kind is None else _PROTOCOLS.get(kind, "tcp")
        self._sandbox.deny(reason, host, self._judge.port, protocol)

    def _turn_away(self, kind: Kind | None) -> None:
        """Says that it was denied, in the protocols that can."""
        if kind is Kind.TLS:
            try:
                self._client.send(_ALERT_ACCESS_DENIED)
                self._client.shutdown(socket.SHUT_WR)
                self._client.recv(sniff.MAX_HELLO_BYTES)  # what is unread would make a reset of this end
            except OSError:
                return
            self._client.close()

    # -- finding out ---------------------------------------------------------------------------------------------------

    async def _first_bytes(self) -> Kind:
        """Returns what the client speaks; OPAQUE without a look where that makes no difference."""
        if self._judge.direct():
            return Kind.OPAQUE
        try:
            async with asyncio.timeout(SERVER_FIRST_S):
                return await self._kind()
        except TimeoutError:
            pass
        try:
            # The server may have to speak first. It may, if whatever the client then says could pass.
            self._upstream = await self._dial(self._judge.opaque())
        except Denied as denied:
            if denied.reason is not Reason.PROTOCOL_NOT_ALLOWED:
                raise
        return await self._patiently()

    async def _kind(self) -> Kind:
        try:
            kind = await peek.kind_of(self._client)
        except sniff.TooLarge:
            raise Denied(Reason.TOO_LARGE, self._judge.likely_name()) from None
        if kind is not None:
            return kind
        try:  # a client that ended without a word may wait for its server's
            self._judge.opaque()
        except Denied:
            raise ConnectionResetError("the client left") from None  # it asked for nothing
        return Kind.OPAQUE

    async def _patiently(self) -> Kind:
        relaying = asyncio.ensure_future(self._relay_server_first())
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S if self._upstream is None else None):
                return await self._kind()
        except TimeoutError:
            raise Denied(Reason.TIMEOUT, self._judge.likely_name()) from None
        finally:
            relaying.cancel()
            await asyncio.gather(relaying, return_exceptions=True)

    async def _relay_server_first(self) -> None:
        """Carries what the server says, while the client is silent."""
        upstream = self._upstream
        if upstream is None:
            return
        while True:
            await readable(upstream)
            try:
                data = upstream.recv(_RELAY_BYTES, socket.MSG_PEEK)
                if not data:
                    return  # the mover will see it again
                sent = self._client.send(data)
            except BlockingIOError:
                await asyncio.sleep(_FULL_PAUSE_S)
                continue
            upstream.recv(sent)

    # -- serving -------------------------------------------------------------------------------------------------------

    async def _serve(self, kind: Kind) -> None:
        if kind is Kind.TLS:
            await self._serve_tls()
        elif kind in (Kind.HTTP1, Kind.HTTP2) and not self._judge.direct():
            await self._open(Target("", self._judge.port, self._judge.address, (), tls=False), kind)
        else:
            await self._carry(self._judge.opaque())

    async def _serve_tls(self) -> None:
        reasons = {sniff.Malformed: Reason.MALFORMED, sniff.TooLarge: Reason.TOO_LARGE, TimeoutError: Reason.TIMEOUT}
        try:
            hello = await peek.hello_of(self._client, HELLO_TIMEOUT_S)
        except tuple(reasons) as error:
            raise Denied(reasons[type(error)], self._judge.likely_name()) from None
        grounds = await self._judge.named(hello.server_name) if hello.server_name else self._judge.unnamed()
        self._grounds.add(grounds)
        sandbox, port = self._sandbox, self._judge.port
        wanted = sandbox.policy.inspect or sandbox.secrets_for(grounds.name, port)
        if grounds.name and sandbox.ca is not None and wanted:
            await self._open(Target(grounds.name, port, grounds.address, hello.alpn, tls=True), Kind.TLS)
        else:
            await self._carry(grounds)

    async def _open(self, target: Target, kind: Kind) -> None:
        if self._upstream is not None:  # a silent client of a server that might have spoken first: it begins anew
            reset(self._upstream)
            self._upstream = None
        gate = Gate(self._sandbox, target, self._authorise)
        await self._means.interceptor.run(self._sandbox, self._client, gate, http2=kind is Kind.HTTP2)

    async def _authorise(self, host: str) -> None:
        """Lets a request of an opened connection name this host. :raises Denied:"""
        self._grounds.add(await self._judge.named(host))

    async def _dial(self, grounds: Grounds) -> socket.socket:
        self._grounds = {grounds}
        return await dial(self._sandbox.policy, (grounds.address,), grounds.port)

    async def _carry(self, grounds: Grounds) -> None:
        self._grounds = {grounds}
        if self._upstream is None:
            self._upstream = await self._dial(grounds)
        if (reason := self.recheck()) is not None:  # it changed while we connected
            raise Denied(reason, grounds.name or str(grounds.address))
        self._carried = self._means.mover.carry(self._client, self._upstream)
        await asyncio.shield(self._carried.done)
