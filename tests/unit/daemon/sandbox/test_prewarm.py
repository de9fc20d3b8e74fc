"""Templates of the configured sizes follow the default image."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.common.background import Backoff, Supervisor
from agent.common.config.daemon import TemplateSettings
from agent.common.config.settings import Settings
from agent.common.errors import AgentError, NotFound
from agent.daemon.sandbox.templates import prewarm
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.sandbox.templates.prewarm import keep_prepared
from agent.daemon.storage.images import ImageStore
from tests.support.daemon_fakes import SilentObserver

SIZES = (128 << 20, 256 << 20)
SETTINGS = dataclasses.replace(Settings(), templates=TemplateSettings(prepare=SIZES))


class World:
    """An image that changes, and what was made of it."""

    def __init__(self) -> None:
        self.digest = "first"
        self.made: list[tuple[str, int]] = []
        self.broken = False
        self.unexpected: list[Exception] = []
        self.looks = 0

    def get_image(self, _name: str) -> Any:
        self.looks += 1
        if not self.digest:
            raise NotFound("no image")
        return SimpleNamespace(digest=self.digest)

    async def get_template(self, image: Any, _vcpus: int, memory_bytes: int) -> None:
        self.made.append((image.digest, memory_bytes))
        if self.unexpected:
            raise self.unexpected.pop(0)
        if self.broken:
            raise AgentError("out of order")

    async def looked(self) -> None:
        """Returns once the image was looked at twice more: what the first look led to is done then."""
        wanted = self.looks + 2
        while self.looks < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(prewarm, "_POLL_INTERVAL_S", 0.001)
    return World()


@asynccontextmanager
async def keeping(world: World, settings: Settings = SETTINGS) -> AsyncIterator[None]:
    images = cast(ImageStore, SimpleNamespace(get=world.get_image))
    templates = cast(Templates, SimpleNamespace(get=world.get_template))
    task = asyncio.create_task(keep_prepared(settings, images, templates))
    try:
        await asyncio.wait_for(world.looked(), 10)
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def all_of(digest: str) -> list[tuple[str, int]]:
    return [(digest, size) for size in SIZES]


async def test_each_image_once(world: World) -> None:
    async with keeping(world):
        assert world.made == all_of("first")
        world.digest = "second"
        await world.looked()
        assert world.made == all_of("first") + all_of("second")


async def test_an_image_that_comes_later(world: World) -> None:
    world.digest = ""
    async with keeping(world):
        assert world.made == []
        world.digest = "first"
        await world.looked()
        assert world.made == all_of("first")


async def test_what_fails_is_left_to_the_first_create(world: World) -> None:
    world.broken = True
    async with keeping(world):
        await world.looked()
        assert world.made == all_of("first")


async def test_an_unexpected_error_costs_no_other_size_and_reaches_the_supervisor(world: World) -> None:
    world.unexpected = [RuntimeError("can't start new thread")]
    images = cast(ImageStore, SimpleNamespace(get=world.get_image))
    templates = cast(Templates, SimpleNamespace(get=world.get_template))
    async with asyncio.timeout(5), Supervisor(SilentObserver()) as supervisor:
        supervisor.start("x", lambda: keep_prepared(SETTINGS, images, templates), Backoff(0.001))
        await world.looked()
        await world.looked()
    assert world.made == all_of("first") + all_of("first")


async def test_nothing_to_do(world: World) -> None:
    images = cast(ImageStore, SimpleNamespace(get=world.get_image))
    async with asyncio.timeout(5):
        await keep_prepared(Settings(), images, cast(Templates, None))
    assert world.looks == 0
