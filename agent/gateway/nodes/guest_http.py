"""HTTP from inside a sandbox: connections of `httpcore` that begin in its network, so that its egress policy applies.

Names are looked up by the sandbox's own resolver, which answers for what may be reached. TLS ends here: whom we trust
is whom the gateway's machine trusts (SSL_CERT_FILE is heeded), and the CA of the sandbox's own opened connections.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import dns.exception
import dns.message
import dns.rdatatype
import grpc
import httpcore

from agent.common.model import GATEWAY_IPV4
from agent.gateway.nodes.guest_tcp import GuestStream, why
from sandboxd.v1 import network_pb2

_RESOLVER = GATEWAY_IPV4.partition("/")[0]
_RECORD_BYTES = 64 << 10
_DNS_S = 10.0


async def resolve(api: Any, sandbox_id: str, host: str) -> str:
    """Returns an address of a host as the sandbox sees it. :raises httpcore.ConnectError: there is none for it."""
    try:
        return str(ip_address(host.strip("[]")))
    except ValueError:
        pass
    if host == "localhost":
        return "127.0.0.1"
    try:
        async with asyncio.timeout(_DNS_S):
            for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
                answer = await _ask(api, sandbox_id, dns.message.make_query(host, kind))
                for records in answer.answer:
                    if records.rdtype == kind and len(records):
                        return str(records[0])
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError, dns.exception.DNSException) as error:
        raise httpcore.ConnectError(f"cannot look up {host}: {error}") from error
    raise httpcore.ConnectError(f"{host} has no address, or the sandbox may not reach it")


async def _ask(api: Any, sandbox_id: str, query: dns.message.Message) -> dns.message.Message:
    """Asks over TCP (RFC 7766). :raises dns.exception.DNSException: the answer is none."""
    stream = await GuestStream.dial(api, sandbox_id, _RESOLVER, 53)
    try:
        wire = query.to_wire()
        await stream.write(len(wire).to_bytes(2, "big") + wire)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            more = await stream.read()
            if not more:
                raise dns.exception.FormError  # it closed the connection
            data += more
        answer = dns.message.from_wire(data[2 : 2 + int.from_bytes(data[:2], "big")])
        if not query.is_response(answer):
            raise dns.exception.FormError  # an answer to another question
        return answer
    finally:
        stream.close()


class _Plain(httpcore.AsyncNetworkStream):
    """A connection of `httpcore` over a stream into the sandbox."""

    def __init__(self, stream: GuestStream) -> None:
        self._stream = stream
        self._pending = b""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._pending:
            try:
                async with asyncio.timeout(timeout):
                    self._pending = await self._stream.read()
            except TimeoutError as error:
                raise httpcore.ReadTimeout from error
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise httpcore.ReadError(why(error)) from error
        data, self._pending = self._pending[:max_bytes], self._pending[max_bytes:]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._stream.write(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise httpcore.WriteError(why(error)) from error

    async def aclose(self) -> None:
        self._stream.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        stream = _Tls(self, ssl_context, server_hostname)
        try:
            async with asyncio.timeout(timeout):
                await stream.handshake()
        except (ssl.SSLError, httpcore.ReadError, httpcore.WriteError) as error:
            self._stream.close()
            raise httpcore.ConnectError(str(error)) from error
        except TimeoutError as error:
            self._stream.close()
            raise httpcore.ConnectTimeout from error
        return stream

    def get_extra_info(self, info: str) -> Any:
        return bool(self._pending) if info == "is_readable" else None


class _Tls(httpcore.AsyncNetworkStream):
    """TLS over another stream, by `ssl.MemoryBIO`."""

    def __init__(self, inner: _Plain, context: ssl.SSLContext, name: str | None) -> None:
        self._inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)

    async def handshake(self) -> None:
        """:raises ssl.SSLError: the certificate is not trusted, or the like."""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush(None)
                await self._fill(None)
            else:
                await self._flush(None)
                return

    async def _flush(self, timeout: float | None) -> None:
        data = self._outgoing.read()
        if data:
            await self._inner.write(data, timeout)

    async def _fill(self, timeout: float | None) -> None:
        data = await self._inner.read(_RECORD_BYTES, timeout)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            try:
                return self._object.read(max_bytes)
            except ssl.SSLWantReadError:
                await self._flush(timeout)
                await self._fill(timeout)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as error:
                raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            self._object.write(buffer)
            await self._flush(timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._object if info == "ssl_object" else self._inner.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, api: Any, sandbox_id: str, fixed: tuple[str, int] | None) -> None:
        self._api = api
        self._id = sandbox_id
        self._fixed = fixed

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002  the base class has them
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        try:
            async with asyncio.timeout(timeout):
                address = self._fixed or (await resolve(self._api, self._id, host), port)
                return _Plain(await GuestStream.dial(self._api, self._id, *address))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise httpcore.ConnectError(why(error)) from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def pool(api: Any, sandbox_id: str, fixed: tuple[str, int] | None = None) -> httpcore.AsyncConnectionPool:
    """Returns connections from inside a sandbox. :raises grpc.aio.AioRpcError: there is no such sandbox.

    :param fixed: the address that all connections go to, whatever the URL says.
    """
    context = ssl.create_default_context()
    if fixed is None:
        request = network_pb2.GetCertificateAuthorityRequest(sandbox_id=sandbox_id)
        own = (await api.network.GetCertificateAuthority(request)).certificate_pem
        if own:
            context.load_verify_locations(cadata=own)
    return httpcore.AsyncConnectionPool(
        ssl_context=context, http2=True, network_backend=_Backend(api, sandbox_id, fixed), keepalive_expiry=5.0
    )
