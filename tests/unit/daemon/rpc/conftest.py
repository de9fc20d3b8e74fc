"""Fixtures of tests of the API."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from agent.daemon.rpc.server import ApiServer
from tests.support import leaks
from tests.support.client import Client
from tests.support.daemon_fakes import bench
from tests.support.rpc_api import Api


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix sockets lie below it."""
    path = leaks.make_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def api(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    async with bench(directory, monkeypatch) as node:
        server = ApiServer(node.host.settings, node.sandboxes, node.supervisor)
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{server.socket_path}") as channel:
            yield Api(node, server, Client(channel), channel)
        await server.stop(0)
