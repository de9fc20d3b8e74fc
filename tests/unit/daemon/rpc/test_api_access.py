"""Who may speak to the API: users of the unix socket, and certificates over TCP."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import pytest

from agent.common.config.daemon import ApiSettings
from agent.common.errors import ConfigError
from agent.daemon.rpc.auth.peercred import PeerSocket
from agent.daemon.rpc.server import ApiServer
from sandboxd.v1 import node_pb2
from tests.support.client import Client
from tests.support.daemon_fakes import bench


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what came, once the client has ended its side, and the name of the peer before it."""
    data = await reader.read()
    writer.write(writer.get_extra_info("peername") + b"\n" + data)
    writer.write_eof()
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_unix_socket_knows_its_peers(directory: Path, allowed: bool) -> None:
    inner = await asyncio.start_unix_server(echo, directory / "private")
    peers = PeerSocket(directory / "public", directory / "private", set(), {os.getgid()} if allowed else set())
    await peers.start()
    reader, writer = await asyncio.open_unix_connection(directory / "public")
    sent = os.urandom(4 << 20)
    try:
        writer.write(sent)
        writer.write_eof()
        received = await reader.read()
    except ConnectionError:
        received = b""
    if allowed:
        name, _, data = received.partition(b"\n")
        assert name.endswith(f"uid={os.getuid()},pid={os.getpid()}".encode())
        assert data == sent
    else:
        assert received == b""
    writer.close()
    await peers.aclose()
    inner.close()
    assert not (directory / "public").exists()


async def test_plain_tcp_only_on_loopback(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(directory, monkeypatch) as node:
        settings = dataclasses.replace(
            node.host.settings, api=ApiSettings(tcp_address="0.0.0.0:0", allow_insecure_loopback=True)
        )
        server = ApiServer(settings, node.sandboxes, node.supervisor)
        with pytest.raises(ConfigError, match="not loopback"):
            await server.start()
        await server.stop(0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_tcp_asks_for_a_clients_certificate(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(  # noqa: ASYNC221
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ApiSettings(tcp_address="127.0.0.1:0", tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(cert))
    async with bench(directory, monkeypatch) as node:
        server = ApiServer(dataclasses.replace(node.host.settings, api=tls), node.sandboxes, node.supervisor)
        await server.start()
        known = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        unknown = grpc.ssl_channel_credentials(cert.read_bytes())
        options = [("grpc.ssl_target_name_override", "localhost")]
        target = f"127.0.0.1:{server.tcp_port}"
        async with grpc.aio.secure_channel(target, known, options) as channel:
            assert (await Client(channel).nodes.GetNode(node_pb2.GetNodeRequest())).name == "node"
        async with grpc.aio.secure_channel(target, unknown, options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Client(channel).nodes.GetNode(node_pb2.GetNodeRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(0)


async def test_a_socket_file_left_behind_is_replaced(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(directory / "public"))
    peers = PeerSocket(directory / "public", directory / "private", {os.getuid()}, set())
    await peers.start()
    await peers.aclose()
    await peers.aclose()
    assert not (directory / "public").exists()
