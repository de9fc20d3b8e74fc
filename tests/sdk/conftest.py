"""The official SDKs against a gateway, a daemon and real VMs; the outside is the test internet."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandboxd.v1 import node_pb2
from tests.conftest import IMAGES_DIR
from tests.sdk.node_sdk import JS, install
from tests.support import gateway as gateways
from tests.support import leaks
from tests.support.client import MIB
from tests.support.daemon import Daemon, connected, start_daemon
from tests.support.gateway import Gateway
from tests.support.internet.internet import Internet
from tests.support.rawclient import RawClient, raw

MEMORY_MIB = 768  # of every sandbox, so that one template is made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = not (IMAGES_DIR / "default" / "manifest.json").exists()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.timeout(240))
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs the image default: just image default"))


@pytest.fixture(scope="session")
def sdk_daemon(internet: Internet) -> Iterator[Daemon]:
    path = leaks.make_directory()
    daemon = start_daemon(
        path, images__default_image="default", sandbox__default_vcpus="2", node__memory_overcommit="4",
        node__cpu_overcommit="64",
        node__region="loc", **internet.settings(),
    )  # fmt: skip
    asyncio.run(_prepare(daemon))
    yield daemon
    assert daemon.stop() == 0, daemon.log
    shutil.rmtree(path)


async def _prepare(daemon: Daemon) -> None:
    async with connected(daemon) as client:
        await client.templates.PrepareTemplate(
            node_pb2.PrepareTemplateRequest(image="default", vcpus=2, memory_bytes=MEMORY_MIB * MIB)
        )


@pytest.fixture(scope="session")
def gateway(sdk_daemon: Daemon, internet: Internet) -> Iterator[Gateway]:
    # Whom the gateway trusts for a fetch that nobody opens on its way.
    sdk_daemon.env["SSL_CERT_FILE"] = internet.ca_file
    with gateways.running(sdk_daemon, sdk_daemon.directory / "gateway") as running_gateway:
        yield running_gateway


@pytest.fixture(scope="session")
def node_modules() -> Path:
    install()
    return JS


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[RawClient]:
    async with raw(gateway) as made:
        yield made
