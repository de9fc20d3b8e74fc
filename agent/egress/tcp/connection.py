"""One TCP connection of a guest: detect its protocol, then relay, intercept or reject it.

The rules are in docs/egress.md.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from agent.common.aio import cancel_and_wait
from agent.common.policy.addresses import Address
from agent.common.policy.reasons import Reason
from agent.egress.dns.resolver import Resolver
from agent.egress.http.intercept import HttpInterceptor
from agent.egress.http.request_policy import RequestPolicy, Target
from agent.egress.sandbox_state import Denied, SandboxState
from agent.egress.tcp import peek, sniff
from agent.egress.tcp.authorization import Authorization, ConnectionAuthorizer
from agent.egress.tcp.sniff import WireProtocol
from agent.egress.transport.dial import DialError, dial
from agent.egress.transport.sockets import reset, wait_readable
from agent.egress.transport.splice import RelayedPair, SpliceRelay

SERVER_FIRST_S = 0.3  # a client that is silent for so long may wait for the server to speak
HELLO_TIMEOUT_S = 15.0
_RELAY_BYTES = 64 << 10
_FULL_PAUSE_S = 0.01
# Clients retry after handshake_failure, not after access_denied (RFC 8446, 6.2).
_ALERT_ACCESS_DENIED = bytes([21, 3, 3, 0, 2, 2, 49])
_PROTOCOLS = {WireProtocol.TLS: "tls", WireProtocol.HTTP1: "http", WireProtocol.HTTP2: "http"}


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Services that all connections share."""

    resolver: Resolver
    splice_relay: SpliceRelay
    interceptor: HttpInterceptor


class TcpConnection:
    """A connection from accept to close; see `agent.egress.sandbox_state.OpenConnection`."""

    def __init__(
        self, sandbox: SandboxState, dependencies: Dependencies, client: socket.socket, address: Address, port: int
    ) -> None:
        self._sandbox = sandbox
        self._dependencies = dependencies
        self._client = client
        self._authorizer = ConnectionAuthorizer(sandbox, dependencies.resolver, address, port)
        self._authorizations: set[Authorization] = set()
        self._relayed: RelayedPair | None = None
        self._upstream: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    # -- changes of the policy -----------------------------------------------------------------------------------------

    def recheck(self) -> Reason | None:
        """See `agent.egress.sandbox_state.OpenConnection`."""
        # A connection without authorizations has not evaluated the policy yet.
        refusals = (authorization.denial_reason(self._sandbox) for authorization in self._authorizations)
        return next((reason for reason in refusals if reason is not None), None)

    def abort(self) -> None:
        """See `agent.egress.sandbox_state.OpenConnection`."""
        if self._relayed is not None:
            self._relayed.abort()
        elif self._task is not None:
            self._task.cancel()

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def start(self) -> asyncio.Task[None]:
        """Serve the connection to its end in a task, which is returned; `abort` cancels it."""
        self._task = asyncio.create_task(self._run())
        return self._task

    async def _run(self) -> None:
        kind = None
        address, port = self._authorizer.address, self._authorizer.port
        try:
            if (reason := self._sandbox.policy.check_dialled(address, port)) is not None:
                raise Denied(reason, str(address))
            kind = await self._identify()
            await self._serve(kind)
        except Denied as denied:
            self._deny(denied.reason, denied.host, kind)
            self._reject(kind)
        except (OSError, DialError) as error:
            if isinstance(error, DialError) and error.reason is not None:
                self._deny(error.reason, str(address), kind)
        finally:
            if self._relayed is None:
                reset(self._client)
                if self._upstream is not None:
                    reset(self._upstream)

    def _deny(self, reason: Reason, host: str, kind: WireProtocol | None) -> None:
        protocol = "tcp" if kind is None else _PROTOCOLS.get(kind, "tcp")
        self._sandbox.deny(reason, host, self._authorizer.port, protocol)

    def _reject(self, kind: WireProtocol | None) -> None:
        """Send a TLS alert; other protocols have no message for a denial here."""
        if kind is WireProtocol.TLS:
            try:
                self._client.send(_ALERT_ACCESS_DENIED)
                self._client.shutdown(socket.SHUT_WR)
                self._client.recv(sniff.MAX_HELLO_BYTES)  # close with unread bytes would send a reset
            except OSError:
                return
            self._client.close()

    # -- protocol detection --------------------------------------------------------------------------------------------

    async def _identify(self) -> WireProtocol:
        """Return the client's protocol; OPAQUE without detection if the connection is allowed anyway."""
        if self._authorizer.is_unconditional():
            return WireProtocol.OPAQUE
        try:
            async with asyncio.timeout(SERVER_FIRST_S):
                return await self._protocol()
        except TimeoutError:
            pass
        try:
            # The server may have to speak first: connect to it, if opaque protocols are allowed there.
            self._upstream = await self._dial(self._authorizer.authorize_opaque())
        except Denied as denied:
            if denied.reason is not Reason.PROTOCOL_NOT_ALLOWED:
                raise
        return await self._wait_for_client()

    async def _protocol(self) -> WireProtocol:
        try:
            kind = await peek.detect_protocol(self._client)
        except sniff.TooLarge:
            raise Denied(Reason.TOO_LARGE, self._authorizer.likely_name()) from None
        if kind is not None:
            return kind
        try:  # a client that shut down without sending may wait for the server
            self._authorizer.authorize_opaque()
        except Denied:
            raise ConnectionResetError("the client left") from None  # not a denial: it sent nothing
        return WireProtocol.OPAQUE

    async def _wait_for_client(self) -> WireProtocol:
        relaying = asyncio.ensure_future(self._relay_server_first())
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S if self._upstream is None else None):
                return await self._protocol()
        except TimeoutError:
            raise Denied(Reason.TIMEOUT, self._authorizer.likely_name()) from None
        finally:
            await cancel_and_wait(relaying)

    async def _relay_server_first(self) -> None:
        """Relay from the server while the client is silent."""
        upstream = self._upstream
        if upstream is None:
            return
        while True:
            await wait_readable(upstream)
            try:
                data = upstream.recv(_RELAY_BYTES, socket.MSG_PEEK)
                if not data:
                    return  # `SpliceRelay` will read the end again
                sent = self._client.send(data)
            except BlockingIOError:
                await asyncio.sleep(_FULL_PAUSE_S)
                continue
            upstream.recv(sent)

    # -- relaying and intercepting -------------------------------------------------------------------------------------

    async def _serve(self, kind: WireProtocol) -> None:
        if kind is WireProtocol.TLS:
            await self._serve_tls()
        elif kind in (WireProtocol.HTTP1, WireProtocol.HTTP2) and not self._authorizer.is_unconditional():
            await self._intercept(Target("", self._authorizer.port, self._authorizer.address, (), tls=False), kind)
        else:
            await self._relay(self._authorizer.authorize_opaque())

    async def _serve_tls(self) -> None:
        reasons = {sniff.Malformed: Reason.MALFORMED, sniff.TooLarge: Reason.TOO_LARGE, TimeoutError: Reason.TIMEOUT}
        try:
            hello = await peek.read_client_hello(self._client, HELLO_TIMEOUT_S)
        except tuple(reasons) as error:
            raise Denied(reasons[type(error)], self._authorizer.likely_name()) from None
        authorization = (
            await self._authorizer.authorize_name(hello.server_name)
            if hello.server_name
            else self._authorizer.authorize_unnamed_tls()
        )
        self._authorizations.add(authorization)
        sandbox, port = self._sandbox, self._authorizer.port
        wanted = sandbox.policy.inspect or sandbox.secrets_for(authorization.name, port)
        if authorization.name and sandbox.ca is not None and wanted:
            await self._intercept(
                Target(authorization.name, port, authorization.address, hello.alpn, tls=True), WireProtocol.TLS
            )
        else:
            await self._relay(authorization)

    async def _intercept(self, target: Target, kind: WireProtocol) -> None:
        if self._upstream is not None:  # opened for a server that might have spoken first
            reset(self._upstream)
            self._upstream = None
        request_policy = RequestPolicy(self._sandbox, target, self._authorize)
        await self._dependencies.interceptor.run(
            self._sandbox, self._client, request_policy, http2=kind is WireProtocol.HTTP2
        )

    async def _authorize(self, host: str) -> None:
        """Authorize the host of a request on an intercepted connection.

        :raises Denied: the policy forbids it.
        """
        self._authorizations.add(await self._authorizer.authorize_name(host))

    async def _dial(self, authorization: Authorization) -> socket.socket:
        self._authorizations = {authorization}
        return await dial(self._sandbox.policy, (authorization.address,), authorization.port)

    async def _relay(self, authorization: Authorization) -> None:
        self._authorizations = {authorization}
        if self._upstream is None:
            self._upstream = await self._dial(authorization)
        if (reason := self.recheck()) is not None:  # the policy changed while connecting
            raise Denied(reason, authorization.name or str(authorization.address))
        self._relayed = self._dependencies.splice_relay.relay(self._client, self._upstream)
        await asyncio.shield(self._relayed.done)
