"""A guest's server without a VM, one per module, and a link to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from agent.daemon.guestlink.channel import Channel
from tests.support.guest_child import Guest, guest


@pytest.fixture(scope="module")
def child() -> Iterator[Guest]:
    with guest() as child:
        yield child


@pytest.fixture
async def channel(child: Guest) -> AsyncIterator[Channel]:
    async with child.channel() as channel:
        yield channel
