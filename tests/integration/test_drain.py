"""A node that is emptied: by a call, by the command line, by SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from sandboxd.v1 import node_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB
from tests.support.ctl import Ctl
from tests.support.daemon import connected, daemon_with, refused

pytestmark = pytest.mark.vm

SMALL = pb.CreateSandboxRequest(memory_bytes=256 * MIB)


async def test_a_drain_is_seen_outlives_the_agent_and_can_be_undone(directory: Path) -> None:
    with daemon_with(directory, keeps=True, sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            made = await client.sandboxes.CreateSandbox(SMALL)
            progress = client.nodes.DrainNode(node_pb2.DrainNodeRequest())
            assert [message.remaining async for message in only(progress)] == [1]
            with refused(grpc.StatusCode.UNAVAILABLE, "NODE_DRAINING"):
                await client.sandboxes.CreateSandbox(SMALL)
            node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
            assert (node.state, node.state_reason) == (node_pb2.Node.STATE_DRAINING, "it is drained")
        daemon.kill()
    with daemon_with(directory) as daemon:
        ctl = Ctl(daemon.env)
        async with connected(daemon) as client:
            with refused(grpc.StatusCode.UNAVAILABLE, "NODE_DRAINING"):
                await client.sandboxes.CreateSandbox(SMALL)
            assert (await client.run(made.id, "true")).code == 0
            assert b"1 sandboxes left" in await asyncio.to_thread(ctl, "drain", "--no-wait")
            assert b"ready" in await asyncio.to_thread(ctl, "undrain")
            another = await client.sandboxes.CreateSandbox(SMALL)
            drained = await asyncio.to_thread(ctl, "drain", "--evict-after", "1s")
            assert drained.splitlines()[-1] == b"0 sandboxes left"
            for one in (made, another):
                with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
                    await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=one.id))
            last = [message async for message in client.nodes.DrainNode(node_pb2.DrainNodeRequest())]
            assert [message.remaining for message in last] == [0]


async def only(messages: Any) -> AsyncIterator[node_pb2.DrainProgress]:
    """Yields the first message and leaves: that does not end a drain."""
    async for message in messages:
        yield message
        messages.cancel()
        return


async def test_sigterm_waits_for_what_runs(directory: Path) -> None:
    with daemon_with(directory, sandbox__on_stop="drain", sandbox__drain_timeout_s="60") as daemon:
        async with connected(daemon) as client:
            made = await client.sandboxes.CreateSandbox(SMALL)
            daemon.process.send_signal(signal.SIGTERM)
            async for _ in client.nodes.WatchNode(node_pb2.WatchNodeRequest(interval_seconds=1)):
                if "the agent is stopping" in _.state_reason:
                    break
            assert (await client.run(made.id, "true")).code == 0
            await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id))
        assert await asyncio.to_thread(daemon.process.wait, 20) == 0
    assert daemon.left() == []


async def test_sigterm_deletes_what_is_left_in_the_end(directory: Path) -> None:
    with daemon_with(directory, sandbox__on_stop="drain", sandbox__drain_timeout_s="0.5") as daemon:
        async with connected(daemon) as client:
            await client.sandboxes.CreateSandbox(SMALL)
            daemon.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.process.wait, 20) == 0
    assert daemon.left() == []


async def test_an_idle_sandbox_ends_and_one_in_use_does_not(directory: Path) -> None:
    with daemon_with(directory) as daemon:
        async with connected(daemon) as client:
            request = pb.CreateSandboxRequest(memory_bytes=256 * MIB)
            request.lifetime.idle_timeout.CopyFrom(Duration(seconds=2))
            made = await client.sandboxes.CreateSandbox(request)
            assert (await client.run(made.id, "sleep", "4")).code == 0
            events = client.sandboxes.WatchSandboxes(pb.WatchSandboxesRequest(id=made.id))
            async with asyncio.timeout(5):
                async for event in events:
                    if event.type == pb.SandboxEvent.TYPE_DELETED:
                        break
            assert event.reason == "idle"
