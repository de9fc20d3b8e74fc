"""Interception of TLS and plain HTTP: the egress process is the server of the guest's client, and a client upstream.

The upstream handshake comes first: the protocol that the server selects (ALPN, RFC 7301) is the only one offered to the
client, so HTTP versions need no translation, and the server's certificate is verified before the client's handshake.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import h11

from agent.common.policy.addresses import Address
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.egress.http.http1 import Http1Relay
from agent.egress.http.http2 import Http2Relay
from agent.egress.http.request_policy import RequestPolicy, answer_for, unreachable
from agent.egress.sandbox_state import Denied, SandboxState
from agent.egress.transport.byte_streams import Stream, TlsStream, handshake
from agent.egress.transport.dial import DialError
from agent.egress.transport.sockets import no_delay

_H2, _HTTP1 = "h2", "http/1.1"
_SUPPORTED = (_H2, _HTTP1)
Dial = Callable[[Policy, Sequence[Address], int], Awaitable[socket.socket]]


class HttpInterceptor:
    """Interceptor of connections of all sandboxes.

    :param dial: connects to servers, as `agent.egress.transport.dial.dial`.
    :param upstream_ca_file: CA certificates (PEM) to verify servers with, besides the host's.
    """

    def __init__(self, dial: Dial, upstream_ca_file: str | None = None) -> None:
        self._dial = dial
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {
            offered: _client_context(offered, upstream_ca_file) for offered in _OFFERS
        }

    async def run(
        self, sandbox: SandboxState, client: socket.socket, request_policy: RequestPolicy, *, http2: bool
    ) -> None:
        """Intercept a connection to its end; owns the socket, of which no byte may have been read.

        :raises OSError: the TLS handshake with the client failed.
        :raises Denied: the policy forbids it; no byte was sent to the client.
        """
        if request_policy.target.tls:
            await self._run_tls(sandbox, client, request_policy)
        else:
            relay = Http2Relay if http2 else Http1Relay
            await self._relay(relay, Stream(client), lambda: self._plain(sandbox, request_policy), request_policy)

    async def _relay(
        self,
        kind: type[Http1Relay | Http2Relay],
        stream: Stream,
        connect: Callable[[], Awaitable[Stream]],
        request_policy: RequestPolicy,
    ) -> None:
        try:
            await kind(stream, connect, request_policy).run()
        except (OSError, TimeoutError, ssl.SSLError):
            stream.abort()
        finally:
            stream.close()

    async def _plain(self, sandbox: SandboxState, request_policy: RequestPolicy) -> Stream:
        return Stream(await self._dial(sandbox.policy, (request_policy.target.address,), request_policy.target.port))

    async def _run_tls(self, sandbox: SandboxState, client: socket.socket, request_policy: RequestPolicy) -> None:
        target = request_policy.target
        assert sandbox.ca is not None
        offered = tuple(protocol for protocol in _SUPPORTED if protocol in target.alpn)
        if target.alpn and not offered:
            raise Denied(Reason.PROTOCOL_NOT_ALLOWED, target.name)
        try:
            upstream = await self._upstream(sandbox, request_policy, offered)
        except (DialError, OSError, TimeoutError) as error:
            await self._refuse(sandbox, client, request_policy, error)
            return
        try:
            chosen = upstream.protocol or (_HTTP1 if not offered or _HTTP1 in offered else "")
            if not chosen:  # the client only offers h2, and the server lacks it
                raise Denied(Reason.PROTOCOL_NOT_ALLOWED, target.name)
            context = sandbox.ca.context(target.name, (chosen,) if offered else ())
            stream = await handshake(client, context, server_side=True)
        except BaseException:
            upstream.abort()
            raise
        relay = Http2Relay if chosen == _H2 else Http1Relay
        no_delay(upstream.sock)

        async def connected() -> Stream:
            return upstream

        try:
            await self._relay(relay, stream, connected, request_policy)
        finally:
            upstream.close()

    async def _upstream(
        self, sandbox: SandboxState, request_policy: RequestPolicy, offered: tuple[str, ...]
    ) -> TlsStream:
        target = request_policy.target
        sock = await self._dial(sandbox.policy, (target.address,), target.port)
        return await handshake(sock, self._contexts[offered], server_side=False, server_hostname=target.name)

    async def _refuse(
        self, sandbox: SandboxState, client: socket.socket, request_policy: RequestPolicy, error: Exception
    ) -> None:
        """Tell a client that offers HTTP/1.1 why the server cannot be reached."""
        target = request_policy.target
        if isinstance(error, ssl.SSLCertVerificationError):
            request_policy.deny(Reason.UPSTREAM_UNVERIFIED, target.name)
            status, text = answer_for(Reason.UPSTREAM_UNVERIFIED, target.name, error.verify_message)
        else:
            if isinstance(error, DialError) and error.reason is not None:
                request_policy.deny(error.reason, target.name)
            status, text = unreachable(target.name, error)
        if target.alpn and _HTTP1 not in target.alpn:
            client.close()
            return
        assert sandbox.ca is not None
        context = sandbox.ca.context(target.name, (_HTTP1,) if target.alpn else ())
        stream = await handshake(client, context, server_side=True)
        with contextlib.suppress(OSError):
            await stream.read()
        await _send_error(stream, status, text)
        stream.close()


_OFFERS = ((), (_H2,), (_HTTP1,), (_H2, _HTTP1))


def _client_context(offered: tuple[str, ...], ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if offered:
        context.set_alpn_protocols(list(offered))
    return context


async def _send_error(stream: Stream, status: int, text: bytes) -> None:
    """Send an HTTP/1.1 response."""
    connection = h11.Connection(h11.SERVER)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text)),
               (b"connection", b"close")]  # fmt: skip
    data = (
        connection.send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()))
        or b""
    )
    with contextlib.suppress(OSError):
        await stream.write(data + text)
