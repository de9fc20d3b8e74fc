"""What else there is in the test internet: ssh, mail, gRPC, a proxy, an echo, and a server with odd manners."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import asyncssh
import grpc

from tests.support.internet import zone
from tests.support.internet.log import Log

_ANY = ["0.0.0.0", "::"]
_EOL = b"\r\n"
Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


class _Ssh(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False  # everybody may


async def _shell(process: asyncssh.SSHServerProcess[str]) -> None:
    process.stdout.write(f"ran {process.command}\n")
    process.exit(0)


async def serve(log: Log, directory: Path) -> Any:
    """Begins to serve; returns the gRPC server, which must be kept."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    await asyncssh.create_server(
        _Ssh, "", zone.SSH_PORT, server_host_keys=[key], process_factory=_shell, family=socket.AF_UNSPEC
    )
    for port, handler in (
        (zone.SMTP_PORT, _smtp), (zone.ECHO_PORT, _echo), (zone.PROXY_PORT, _proxy),
    ):  # fmt: skip
        await asyncio.start_server(_noted(log, port, handler), _ANY, port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    await asyncio.start_server(_noted(log, zone.RAW_PORT, _raw), _ANY, zone.RAW_PORT, ssl=context)
    return await _grpc(directory)


def _noted(log: Log, port: int, handler: Any) -> Any:
    async def serve(reader: Reader, writer: Writer) -> None:
        log.note("tcp", port=port)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await handler(reader, writer)
        writer.close()

    return serve


async def _smtp(reader: Reader, writer: Writer) -> None:
    writer.write(b"220 smtp.example at your service\r\n")
    while line := await reader.readline():
        writer.write(b"221 bye\r\n" if line.startswith(b"QUIT") else b"250 " + line.strip() + _EOL)
        await writer.drain()


async def _echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def _proxy(reader: Reader, writer: Writer) -> None:
    """A proxy that connects wherever it is told to: what a guest must not get to use."""
    head = await reader.readuntil(_EOL * 2)
    host, _, port = head.split()[1].decode().rpartition(":")
    up_reader, up_writer = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async def pump(source: Reader, target: Writer) -> None:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.write_eof()

    await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))


async def _raw(reader: Reader, writer: Writer) -> None:
    """HTTP/1.1 by hand: trailers, interim responses, an answer before the request's end."""
    while True:
        head = await reader.readuntil(_EOL * 2)
        path = head.split()[1]
        if path == b"/trailers":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n")
            writer.write(b"0\r\nX-Sum: 42\r\n\r\n")
        elif path == b"/continue":
            if b"100-continue" not in head.lower():
                writer.write(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                size = int(head.lower().split(b"content-length:")[1].split()[0])
                body = await reader.readexactly(size)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)
        elif path == b"/hints":
            writer.write(
                b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
            )
        elif path == b"/refuse":
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n")
            await writer.drain()
            return
        elif path == b"/until-close":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
            await writer.drain()
            return
        elif path == b"/nonsense":
            writer.write(b"HTP/1.1 two hundred\r\n\r\n")
            await writer.drain()
            return
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(head) + head)
        await writer.drain()


async def _grpc(directory: Path) -> Any:
    async def unary(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-trailer", "yes"),))
        authorization = str(dict(context.invocation_metadata()).get("authorization", ""))
        return authorization.encode() + b"|" + request

    async def bidi(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    handlers = grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
        },
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers,))
    pair = ((directory / "server.key").read_bytes(), (directory / "server.pem").read_bytes())
    server.add_secure_port(f"[::]:{zone.GRPC_PORT}", grpc.ssl_server_credentials([pair]))
    await server.start()
    return server


def packets(interface: str) -> Iterator[dict[str, Any]]:
    """Yields what arrives on an interface: every connection's first packet, and all that is not TCP."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        sock.bind((interface, 0))
        while True:
            frame, (_, _, direction, _, _) = sock.recvfrom(65535)
            if direction != socket.PACKET_OUTGOING and (facts := _facts(frame)) is not None:
                yield facts


def _facts(frame: bytes) -> dict[str, Any] | None:
    kind, packet = int.from_bytes(frame[12:14], "big"), frame[14:]
    if kind == 0x0800:
        protocol, target = packet[9], socket.inet_ntop(socket.AF_INET, packet[16:20])
        source, rest = socket.inet_ntop(socket.AF_INET, packet[12:16]), packet[(packet[0] & 15) * 4 :]
    elif kind == 0x86DD:
        protocol, target, rest = packet[6], socket.inet_ntop(socket.AF_INET6, packet[24:40]), packet[40:]
        source = socket.inet_ntop(socket.AF_INET6, packet[8:24])
        if protocol == 58 and rest[0] in range(133, 138):
            return None  # neighbours of the uplink itself
        if protocol == 0:
            return None  # its multicast listener reports
    elif kind == 0x0806:
        return None
    else:
        return {"ethertype": hex(kind)}
    port = int.from_bytes(rest[2:4], "big") if protocol in (6, 17) else 0
    if protocol == 6 and rest[13] & 0x12 != 0x02:
        return None
    return {"protocol": protocol, "source": source, "target": target, "port": port}
