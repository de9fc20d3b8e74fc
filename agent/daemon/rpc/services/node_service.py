"""Serve NodeService and ImageService (node.proto)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.errors import InvalidSpec, InvalidState
from agent.daemon.rpc.convert.node_messages import image_message, node_message
from agent.daemon.rpc.convert.times import duration_s, timestamp
from agent.daemon.sandbox.service import SandboxService
from sandboxd.v1 import node_pb2 as pb
from sandboxd.v1 import node_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_MAX_INTERVAL_S = 3600
_SETTLE_S = 0.05  # changes within this time share one message
_VERSION = version("sandboxd")


class NodeServicer(node_pb2_grpc.NodeServiceServicer):
    """Servicer of NodeService."""

    def __init__(self, sandboxes: SandboxService) -> None:
        self._sandboxes = sandboxes

    async def _node(self) -> pb.Node:
        images = await asyncio.to_thread(self._sandboxes.images.list)
        return node_message(self._sandboxes.describe_node(), images, _VERSION)

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.Node:  # noqa: N802
        """See node.proto."""
        return await self._node()

    async def WatchNode(self, request: pb.WatchNodeRequest, context: Context) -> AsyncIterator[pb.Node]:  # noqa: N802
        """See node.proto. Sends the node after each event of a sandbox, and every `interval_seconds` without one."""
        interval = request.interval_seconds or 10
        if not 1 <= interval <= _MAX_INTERVAL_S:
            raise InvalidSpec(f"interval_seconds is {interval}; it must be from 1 to {_MAX_INTERVAL_S}")
        changed = asyncio.Event()

        async def listen() -> None:
            async for _ in self._sandboxes.watch(lambda _record: True):
                changed.set()

        listener = asyncio.create_task(listen())
        self._sandboxes.node.on_change.add(changed.set)
        try:
            while True:
                changed.clear()
                yield await self._node()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), interval)
                await asyncio.sleep(_SETTLE_S)
        finally:
            self._sandboxes.node.on_change.discard(changed.set)
            await cancel_and_wait(listener)

    async def DrainNode(  # noqa: N802
        self, request: pb.DrainNodeRequest, context: Context
    ) -> AsyncIterator[pb.DrainProgress]:
        """See node.proto."""
        evict_after_s = None
        if request.HasField("evict_after"):
            evict_after_s = duration_s(request.evict_after)
            if evict_after_s < 0:
                raise InvalidSpec("evict_after must not be negative")
        await self._sandboxes.drain.begin(evict_after_s)
        async for progress in self._sandboxes.drain.progress():
            message = pb.DrainProgress(remaining=progress.remaining)
            if progress.evict_in_s is not None:
                message.evict_time.CopyFrom(timestamp(time.time() + progress.evict_in_s))
            yield message

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: Context) -> pb.Node:  # noqa: N802
        """See node.proto."""
        await self._sandboxes.drain.end()
        return await self._node()


class ImageServicer(node_pb2_grpc.ImageServiceServicer):
    """Servicer of ImageService."""

    def __init__(self, sandboxes: SandboxService) -> None:
        self._sandboxes = sandboxes

    async def ListImages(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:  # noqa: N802
        """See node.proto."""
        images = await asyncio.to_thread(self._sandboxes.images.list)
        return pb.ListImagesResponse(images=[image_message(value) for value in images])

    async def GetImage(self, request: pb.GetImageRequest, context: Context) -> pb.Image:  # noqa: N802
        """See node.proto."""
        return image_message(await asyncio.to_thread(self._sandboxes.images.get, request.name), packages=True)

    async def DeleteImage(self, request: pb.DeleteImageRequest, context: Context) -> pb.DeleteImageResponse:  # noqa: N802
        """See node.proto."""
        users = [record.id for record in self._sandboxes.list() if record.spec.image == request.name]
        if users:
            raise InvalidState(
                f"image {request.name} is in use by {len(users)} sandboxes ({users[0]} ...); delete them first",
                reason="IMAGE_IN_USE",
            )
        await asyncio.to_thread(self._sandboxes.images.remove, request.name)
        return pb.DeleteImageResponse()
