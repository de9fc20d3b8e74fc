"""HTTP from inside a sandbox: `httpcore` connections that begin in its network, so that its egress policy applies.

TLS ends in the gateway. Trusted CAs are those of the gateway's host (SSL_CERT_FILE is heeded) and the sandbox's own CA,
which signs the connections that its egress policy has decrypted.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import grpc
import httpcore

from agent.common.api_client import Api
from agent.gateway.nodes.guest_dns import resolve
from agent.gateway.nodes.guest_stream import GuestStream, describe_error
from sandboxd.v1 import network_pb2

_RECORD_BYTES = 64 << 10


class _PlainStream(httpcore.AsyncNetworkStream):
    """Network stream of `httpcore` over a `GuestStream`."""

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
                raise httpcore.ReadError(describe_error(error)) from error
        data, self._pending = self._pending[:max_bytes], self._pending[max_bytes:]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._stream.write(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise httpcore.WriteError(describe_error(error)) from error

    async def aclose(self) -> None:
        self._stream.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        stream = _TlsStream(self, ssl_context, server_hostname)
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


class _TlsStream(httpcore.AsyncNetworkStream):
    """TLS over a `_PlainStream`, with `ssl.MemoryBIO`."""

    def __init__(self, inner: _PlainStream, context: ssl.SSLContext, name: str | None) -> None:
        self._inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)

    async def handshake(self) -> None:
        """Complete the TLS handshake.

        :raises ssl.SSLError: it failed, for example because the certificate is not trusted.
        """
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


class _GuestBackend(httpcore.AsyncNetworkBackend):
    """Opens the TCP connections of an `httpcore` pool inside a sandbox.

    :param fixed: connect to this (address, port) whatever the URL says.
    """

    def __init__(self, api: Api, sandbox_id: str, fixed: tuple[str, int] | None) -> None:
        self._api = api
        self._id = sandbox_id
        self._fixed = fixed

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002  of the base class
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        try:
            async with asyncio.timeout(timeout):
                address = self._fixed or (await resolve(self._api, self._id, host), port)
                return _PlainStream(await GuestStream.dial(self._api, self._id, *address))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, LookupError) as error:
            raise httpcore.ConnectError(describe_error(error)) from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def connection_pool(
    api: Api, sandbox_id: str, fixed: tuple[str, int] | None = None
) -> httpcore.AsyncConnectionPool:
    """Return a pool whose connections begin inside a sandbox.

    :param fixed: connect to this (address, port) whatever the URL says.
    :raises grpc.aio.AioRpcError: the sandbox does not exist.
    """
    context = ssl.create_default_context()
    if fixed is None:
        request = network_pb2.GetCertificateAuthorityRequest(sandbox_id=sandbox_id)
        sandbox_ca = (await api.network.GetCertificateAuthority(request)).certificate_pem
        if sandbox_ca:
            context.load_verify_locations(cadata=sandbox_ca)
    return httpcore.AsyncConnectionPool(
        ssl_context=context, http2=True, network_backend=_GuestBackend(api, sandbox_id, fixed), keepalive_expiry=5.0
    )
