"""A real daemon per test session, a client to it, and a sandbox per module."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from sandboxd.v1 import sandbox_pb2, sandbox_pb2_grpc
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.ctl import Ctl
from tests.support.daemon import Daemon, connected, start_daemon
from tests.support.egress import Box
from tests.support.files import HOME, Files
from tests.support.internet.internet import Internet


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    path = leaks.make_directory()
    running = start_daemon(path)
    yield running
    assert running.stop() == 0, running.log
    shutil.rmtree(path)


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(daemon.address) as channel:
        yield Client(channel)
        # Cancelled calls end on the server a moment after they end here.
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    """What the module's sandbox is made with; a module that wants more overrides it."""
    return {"memory_bytes": 256 * MIB}


@pytest.fixture(scope="module")
def sandbox(daemon: Daemon, sandbox_fields: dict[str, Any]) -> Iterator[sandbox_pb2.Sandbox]:
    """One sandbox for all tests of a module that leave it as it was: a boot takes seconds under emulation."""
    with grpc.insecure_channel(daemon.address) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        created = stub.CreateSandbox(sandbox_pb2.CreateSandboxRequest(**sandbox_fields))
        try:
            yield created
        finally:
            stub.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=created.id, allow_missing=True))


@pytest.fixture(scope="session")
def net_daemon(internet: Internet) -> Iterator[Daemon]:
    """A daemon whose sandboxes lead to the test internet."""
    path = leaks.make_directory()
    running_daemon = start_daemon(path, **internet.settings())
    yield running_daemon
    assert running_daemon.stop() == 0, running_daemon.log
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def net_sandbox(net_daemon: Daemon) -> Iterator[sandbox_pb2.Sandbox]:
    """One sandbox for a module's tests of what it may reach."""
    with grpc.insecure_channel(net_daemon.address) as channel:
        stub = sandbox_pb2_grpc.SandboxServiceStub(channel)
        created = stub.CreateSandbox(sandbox_pb2.CreateSandboxRequest(memory_bytes=256 * MIB))
        try:
            yield created
        finally:
            stub.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=created.id, allow_missing=True))


@pytest.fixture
async def box(net_daemon: Daemon, net_sandbox: sandbox_pb2.Sandbox, internet: Internet) -> AsyncIterator[Box]:
    """The module's sandbox; each test says what it may reach."""
    async with connected(net_daemon) as client:
        made = Box(client, net_sandbox.id, internet)
        await made.prepare()
        yield made


@pytest.fixture
async def files(client: Client, sandbox: sandbox_pb2.Sandbox) -> AsyncIterator[Files]:
    """The files of a sandbox, in a home directory that is empty again for each test."""
    yield Files(client, sandbox)
    await client.run(sandbox.id, "sh", "-c", f"rm -rf {HOME} && mkdir {HOME} && chown 1000:1000 {HOME}", user="root")


@pytest.fixture(scope="module")
def ctl(daemon: Daemon) -> Ctl:
    return Ctl(daemon.env)


@pytest.fixture(scope="module")
def ctl_box(ctl: Ctl) -> Iterator[str]:
    """One sandbox for the module, by `create` and `rm`."""
    made = ctl("create", "--memory", "256MiB", "--label", "test=cli", "-e", "GREETING=hello").decode().strip()
    yield made
    assert ctl("rm", made).decode().strip() == made
