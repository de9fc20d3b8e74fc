"""Byte streams, and errors in the form of the SDKs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agent.gateway.errors import CallError
from agent.gateway.jsonrpc.messages import zod_error
from agent.gateway.jsonrpc.streams import InboundStream, OutboundStream


def test_validation_errors_as_the_python_sdk_reads_them() -> None:
    (item,) = json.loads(str(zod_error("Expected `str`, got `int` - at `$.options[0].mode`")["message"]))
    assert (item["expected"], item["path"]) == ("str", ["options", "0", "mode"])
    (item,) = json.loads(str(zod_error("Object missing required field `path`")["message"]))
    assert item["path"] == ["path"]


async def test_what_does_not_fit_into_memory_waits_on_the_disk() -> None:
    waiting: list[int] = []
    stream = InboundStream(waiting.append)
    pieces = [bytes([number]) * 300_000 for number in range(20)]
    for piece in pieces:
        stream.feed(piece)
    assert sum(waiting) >= 4_000_000
    stream.end()
    read = b""
    while data := await stream.read():
        read += data
    assert read == b"".join(pieces)
    assert sum(waiting) == 0
    stream.discard()
    stream.feed(b"late")
    assert await stream.read() == b""


async def drained(stream: InboundStream) -> int:
    total = 0
    while data := await stream.read():
        total += len(data)
    return total


async def test_reading_and_feeding_in_turns() -> None:
    stream = InboundStream()
    for number in range(200):
        stream.feed(bytes([number]) * 20_000)
        if number % 3 == 0:
            assert len(await stream.read()) > 0
    stream.end(CallError("Error", "given up"))
    with pytest.raises(CallError, match="given up"):
        await drained(stream)
    stream.discard()


async def test_nothing_is_sent_after_a_cancel_and_nothing_empty() -> None:
    sent: list[Any] = []

    async def send(message: object) -> None:
        sent.append(message)

    announced = asyncio.Event()
    announced.set()
    stream = OutboundStream(send, announced)
    await stream.write(b"")
    assert sent == []
    await stream.write(bytes(100_000))
    assert [message["method"].rpartition(".")[2] for message in sent] == ["start", "enqueue", "enqueue"]
    stream.cancel()
    await stream.write(b"more")
    await stream.end()
    assert len(sent) == 3
    other = OutboundStream(send, announced, ends_after_error=True)
    assert other.id == stream.id + 1
    await other.fail(CallError("Error", "x"))
    await other.end()
    assert [message["method"].rpartition(".")[2] for message in sent[3:]] == ["start", "error", "end"]


async def test_a_stream_begins_once_its_call_is_answered() -> None:
    sent: list[Any] = []

    async def send(message: object) -> None:
        sent.append(message)

    announced = asyncio.Event()
    writing = asyncio.create_task(OutboundStream(send, announced).write(b"early"))
    await asyncio.sleep(0.01)
    assert sent == []
    announced.set()
    await writing
    assert [message["method"].rpartition(".")[2] for message in sent] == ["start", "enqueue"]
