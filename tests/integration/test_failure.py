"""What becomes of a sandbox whose VM dies, hangs, or never comes up."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from sandboxd.v1 import node_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.conftest import IMAGES_DIR
from tests.support import leaks
from tests.support.client import MIB, Client, reason
from tests.support.daemon import Daemon, connected, daemon_with, refused, until
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm

NOTICE_S = 2.0
STATE = pb.Sandbox
# An agent that gives up a silent guest within seconds; its own limits are for loaded hosts.
IMPATIENT = """
import agent.daemon.guestlink.channel as channel
channel._PING_INTERVAL_S, channel._PING_TIMEOUT_S = 0.25, 1.0
from agent.daemon.__main__ import main
main()
"""


def vmm_of(sandbox_id: str) -> psutil.Process:
    """Returns the sandbox's VMM: the program that carries its name."""
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"{sandbox_id},process={sandbox_id}" in (process.info["cmdline"] or [])
    ]
    return found


async def state(client: Client, sandbox_id: str) -> pb.Sandbox:
    found: pb.Sandbox = await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=sandbox_id))
    return found


async def failed_within(client: Client, sandbox_id: str, timeout_s: float) -> pb.Sandbox:
    """Waits for FAILED, and returns the sandbox as it is then."""

    async def has_failed() -> bool:
        return (await state(client, sandbox_id)).state == STATE.STATE_FAILED

    await until(has_failed, timeout_s)
    return await state(client, sandbox_id)


@asynccontextmanager
async def doomed(client: Client, daemon: Daemon) -> AsyncIterator[pb.Sandbox]:
    """A sandbox that will fail; what it held must be gone after its delete."""
    async with client.sandbox() as made:
        assert (await client.run(made.id, "true")).code == 0
        yield made
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "SANDBOX_NOT_RUNNING"):
            await client.run(made.id, "true")
        assert any(made.id in path for path in daemon.left())
    assert not any(made.id in path for path in daemon.left())
    assert made.id not in leaks.snapshot().namespaces


async def test_a_killed_vmm_is_noticed_at_once(client: Client, daemon: Daemon, reliability: Reliability) -> None:
    async with doomed(client, daemon) as made:
        waiting = asyncio.create_task(client.run(made.id, "sleep", "600"))
        said = "echo these are my last words >/dev/console"
        assert (await client.run(made.id, "sh", "-c", said, user="root")).code == 0
        vmm_of(made.id).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        failed = await failed_within(client, made.id, NOTICE_S)
        assert time.monotonic() - killed < NOTICE_S
        assert "killed by signal 9" in failed.error
        assert "these are my last words" in failed.error
        console = [piece.data async for piece in client.sandboxes.GetConsole(pb.GetConsoleRequest(id=made.id))]
        assert b"these are my last words" in b"".join(console)
    reliability.seen(
        "SIGKILL of a VMM",
        "the sandbox has FAILED at once, with its last console lines; a delete leaves nothing",
        "so, within 2 s",
    )


@pytest.mark.parametrize(
    ("trigger", "words"), [("c", "Kernel panic"), ("o", "")], ids=["kernel panic", "power-off inside"]
)
async def test_a_guest_that_ends_itself_has_failed(
    client: Client, daemon: Daemon, trigger: str, words: str, reliability: Reliability
) -> None:
    async with doomed(client, daemon) as made:
        command = f"echo {trigger} | sudo tee /proc/sysrq-trigger"
        ending = asyncio.create_task(client.run(made.id, "sh", "-c", command))
        failed = await failed_within(client, made.id, 10)
        with pytest.raises(grpc.aio.AioRpcError):
            await ending
        assert "the virtual machine is gone (exited with status 0)" in failed.error
        assert words in failed.error
    reliability.seen(
        "guest: kernel panic, power-off",
        "the sandbox has FAILED and says how; a delete leaves nothing",
        "so",
    )


async def test_a_silent_guest_is_given_up(directory: Path, reliability: Reliability) -> None:
    argv = (sys.executable, "-c", IMPATIENT)
    with daemon_with(directory, argv=argv, sandbox__relink_timeout_s="1s") as daemon:
        async with connected(daemon) as client, doomed(client, daemon) as made:
            vmm_of(made.id).suspend()
            failed = await failed_within(client, made.id, 10)
            assert "did not answer within 1 s" in failed.error
            assert "the guest has been silent for" in daemon.log
    reliability.seen(
        "a guest that is frozen for good",
        "it is given up as FAILED",
        "so, after the limit that was set to 1 s",
    )


async def test_a_vmm_that_refuses_to_start_says_why(directory: Path, reliability: Reliability) -> None:
    script = directory / "vmm"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "QEMU emulator version 10.0.0" && exit\n'
        "echo it is out of order >&2\nexit 1\n"
    )
    script.chmod(0o755)
    with daemon_with(directory, vmm__binary=str(script)) as daemon:
        async with connected(daemon) as client:
            with refused(grpc.StatusCode.INTERNAL, "VMM_NOT_STARTED") as caught:
                await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest())
            assert "exited with status 1 at once: it is out of order" in str(caught.value.details())
            assert daemon.left() == []
    reliability.seen(
        "a VMM that does not start",
        "the create fails with the VMM's own words, and leaves nothing",
        "so",
    )


async def test_a_guest_that_never_answers_is_given_up_with_its_console(
    directory: Path, reliability: Reliability
) -> None:
    hangs = "loglevel=7 rdinit=/bin/busybox -- sleep 1000"
    with daemon_with(directory, vmm__extra_kernel_args=hangs, sandbox__boot_timeout_s="8s") as daemon:
        async with connected(daemon) as client:
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "GUEST_BOOT_TIMEOUT") as caught:
                await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(request_id="again"))
            assert "Run /bin/busybox as init process" in str(caught.value.details())
            assert list((await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest())).sandboxes) == []
            assert daemon.left() == []
    reliability.seen(
        "a guest that never answers",
        "the create fails with its last console lines, and leaves nothing",
        "so",
    )


async def test_a_damaged_image_is_refused(directory: Path, reliability: Reliability) -> None:
    images = directory / "images"
    shutil.copytree(IMAGES_DIR / "minimal", images / "minimal", symlinks=False)
    kernel = images / "minimal" / json.loads((images / "minimal" / "manifest.json").read_text())["kernel"]["file"]
    with daemon_with(directory, images__images_dir=str(images), sandbox__boot_timeout_s="20s") as daemon:
        async with connected(daemon) as client:
            # Right size, wrong bytes: only the VMM can tell.
            kernel.write_bytes(bytes(kernel.stat().st_size))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest())
            assert reason(caught.value) in ("VMM_NOT_STARTED", "VMM_ENDED", "GUEST_BOOT_TIMEOUT")
            os.truncate(kernel, 1000)
            (images / "minimal" / "manifest.json").touch()
            for call in (
                client.sandboxes.CreateSandbox(pb.CreateSandboxRequest()),
                client.images.GetImage(node_pb2.GetImageRequest(name="minimal")),
            ):
                with refused(grpc.StatusCode.DATA_LOSS, "IMAGE_DAMAGED"):
                    await call
            assert list((await client.images.ListImages(node_pb2.ListImagesRequest())).images) == []
            assert daemon.left() == []
    reliability.seen(
        "an image that was damaged",
        "creates are refused with DATA_LOSS",
        "so",
    )


async def test_memory_that_the_node_lacks_is_refused(client: Client, daemon: Daemon) -> None:
    before = daemon.left()
    node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
    for wanted in (node.memory_bytes.allocatable // MIB + 1, node.memory_bytes.total // MIB * 2):
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_FULL"):
            await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=wanted * MIB))
    assert daemon.left() == before
