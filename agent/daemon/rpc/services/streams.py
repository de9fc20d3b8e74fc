"""Parts that the streaming calls share: first messages of clients, frames of guests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from google.protobuf.message import Message

from agent.common.errors import GuestUnreachable, InvalidSpec
from agent.daemon.guestlink.stream import CallStream
from guest.wire import Frame

_Request = TypeVar("_Request", bound=Message)


async def first_message(requests: AsyncIterator[_Request], part: str) -> _Request:
    """Return the first message of a client's stream, which must carry `part` of its oneof `message`.

    :raises InvalidSpec: the stream ended before a message, or the message carries another part.
    """
    first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != part:
        raise InvalidSpec(f"the first message must carry {part}")
    return first


async def recv_or_fail(stream: CallStream, feeder: asyncio.Task[None]) -> tuple[Frame, Any] | None:
    """Return the next frame of the guest; None after the last one.

    :param feeder: task that sends the client's messages to the guest. It must call `stream.end()` before it fails.
    :raises AgentError: the feeder's error if it has failed, otherwise that of the link or the guest.
    """
    try:
        return await stream.recv()
    except GuestUnreachable:
        if feeder.done() and not feeder.cancelled() and (error := feeder.exception()) is not None:
            raise error from None
        raise


async def events(opened: AbstractAsyncContextManager[CallStream]) -> AsyncIterator[dict[str, Any]]:
    """Yield the values of a call's EVENT frames until its result."""
    async with opened as stream:
        while (frame := await stream.recv()) is not None:
            if frame[0] is Frame.EVENT:
                yield frame[1]
