"""What can happen to templates and to those who make them: a clear error, nothing left, and the next create works."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from sandboxd.v1 import node_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support import leaks
from tests.support.client import MIB, Client
from tests.support.daemon import AGENT, Daemon, connected, daemon_with, refused, start_daemon
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm
MEMORY_BYTES = 144 * MIB
# How far a maker is, by what its draft directory or the arguments of its VMM have, in the order in which this comes.
STEPS = ("ram", "share=on", "vmm/state", "manifest.json", "share=off")


def templates_of(directory: Path) -> Path:
    return directory / "state" / "templates"


@contextmanager
def tmpfs(path: Path, size_mib: int) -> Iterator[None]:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def remount(path: Path, options: str) -> None:
    await asyncio.to_thread(subprocess.run, ["mount", "-o", f"remount,{options}", str(path)], check=True)


async def create(client: Client, memory_bytes: int = MEMORY_BYTES) -> list[str]:
    """Creates, uses and deletes a sandbox; returns the names of the phases of its create."""
    async with client.sandbox(memory_bytes=memory_bytes) as sandbox:
        assert (await client.run(sandbox.id, "echo", "hi")).stdout == b"hi\n"
        return [phase.name for phase in sandbox.phases]


async def prepare(client: Client) -> node_pb2.Template:
    request = node_pb2.PrepareTemplateRequest(memory_bytes=MEMORY_BYTES)
    made: node_pb2.Template = await client.templates.PrepareTemplate(request)
    return made


@asynccontextmanager
async def daemon_and_client(directory: Path) -> AsyncIterator[tuple[Daemon, Client]]:
    with daemon_with(directory) as daemon:
        async with connected(daemon) as client:
            yield daemon, client


async def test_a_full_directory(directory: Path, reliability: Reliability) -> None:
    with tmpfs(templates_of(directory), size_mib=24):
        async with daemon_and_client(directory) as (daemon, client):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await create(client)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "templates.budget_bytes" in str(caught.value.details())
            assert list(templates_of(directory).iterdir()) == []
            assert daemon.left() == []
            await remount(templates_of(directory), "size=1g")
            assert "template.make" in await create(client)
    reliability.seen(
        "no room for a template",
        "creates say so and leave nothing; with room, the next one works",
        "so",
    )


async def test_a_read_only_directory(directory: Path, reliability: Reliability) -> None:
    with tmpfs(templates_of(directory), size_mib=1024):
        async with daemon_and_client(directory) as (daemon, client):
            await prepare(client)
            await remount(templates_of(directory), "ro")
            assert "template.make" not in await create(client)  # what is there serves on
            with pytest.raises(grpc.aio.AioRpcError, match="Read-only file system"):
                await create(client, 160 * MIB)
            assert daemon.left() == []
            await remount(templates_of(directory), "rw")
            assert "template.make" in await create(client, 160 * MIB)
    reliability.seen(
        "templates on a read-only disk",
        "what is there serves on; a new size says why not",
        "so",
    )


async def test_a_directory_that_is_removed_under_clones(directory: Path, reliability: Reliability) -> None:
    async with daemon_and_client(directory) as (_, client):
        await prepare(client)
        async with client.sandbox(memory_bytes=MEMORY_BYTES) as sandbox:
            shutil.rmtree(templates_of(directory))
            assert (await client.run(sandbox.id, "python3", "-c", "print(bytes(30 << 20).count(0))")).code == 0
            assert "template.make" in await create(client)
            assert (await client.run(sandbox.id, "echo", "hi")).stdout == b"hi\n"
    reliability.seen(
        "templates removed under running clones",
        "clones go on; the next create makes one anew",
        "so",
    )


async def test_bits_that_flipped(directory: Path, reliability: Reliability) -> None:
    """As long as an agent runs, a write is noticed by the file's times; at its start, the digests are compared."""
    async with daemon_and_client(directory) as (_, client):
        path = templates_of(directory) / (await prepare(client)).name
        flip(path / "vmm/state")
        assert "template.make" in await create(client)
        flip(path / "ram")
    async with daemon_and_client(directory) as (daemon, client):
        assert "template.make" in await create(client)
        assert "rebuilding a template" in daemon.log
        assert "template.make" not in await create(client)
    reliability.seen(
        "flipped bits in a template",
        "found by its times or its digests; it is made anew",
        "so, in device state and RAM",
    )


def flip(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))


async def test_makers_that_are_killed(directory: Path, reliability: Reliability) -> None:
    before = leaks.snapshot()
    for step in STEPS:
        daemon = start_daemon(directory)
        try:
            await nothing_left(daemon, before)
            await die_at(daemon, step)
        finally:
            daemon.kill()
        assert [path.name[:4] for path in templates_of(directory).iterdir()] == ["tmp-"], step
    async with daemon_and_client(directory) as (daemon, client):
        await nothing_left(daemon, before)
        assert "template.make" in await create(client)
    reliability.seen(
        "SIGKILL of an agent that makes a template",
        "the next one removes what is half made",
        "so, at each of 5 steps",
    )


async def nothing_left(daemon: Daemon, before: leaks.Snapshot) -> None:
    """Fails unless a daemon that has just started has removed all that the one before it left.

    `before` is what was there before any of them.
    """
    templates = templates_of(daemon.directory)
    assert not templates.exists() or list(templates.iterdir()) == []
    assert daemon.left() == []
    assert vmms_of(daemon.directory) == []
    assert leaks.wait_for_leaks(before, grace_s=0).namespaces == frozenset()
    async with connected(daemon) as client:
        listed = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest())
        assert list(listed.sandboxes) == []


async def die_at(daemon: Daemon, step: str) -> None:
    """Has the daemon make a template for a sandbox, and kills it at a step of that."""
    async with connected(daemon) as client:
        making = asyncio.ensure_future(create(client))
        await asyncio.to_thread(wait_for, daemon.directory, step)
        daemon.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await making


def wait_for(directory: Path, step: str) -> None:
    """Returns once a maker's draft has this file, or its VMM has this in its arguments."""
    deadline = time.monotonic() + 60
    while not any(templates_of(directory).glob(f"tmp-*/{step}")) and not any(
        step in arguments for arguments in vmms_of(directory)
    ):
        assert time.monotonic() < deadline, step
        time.sleep(0.001)


def vmms_of(directory: Path) -> list[str]:
    """Returns the arguments of the VMMs that run with files of this directory."""
    processes = psutil.process_iter(["name", "cmdline"])
    found = [(process.info["name"] or "", " ".join(process.info["cmdline"] or [])) for process in processes]
    return [arguments for name, arguments in found if name.startswith(leaks.PREFIX) and str(directory) in arguments]


async def test_another_agent_leaves_a_maker_alone(directory: Path) -> None:
    async with daemon_and_client(directory) as (daemon, client):
        making = asyncio.ensure_future(create(client))
        await asyncio.to_thread(wait_for, directory, "ram")
        env = {**daemon.env, "SANDBOXD_PATHS__RUN_DIR": str(directory / "run2")}
        other = await asyncio.to_thread(subprocess.run, AGENT, env=env, capture_output=True, text=True, timeout=30)
        assert other.returncode == 1
        assert "another sandboxd owns" in other.stdout + other.stderr
        assert "template.make" in await making
        assert daemon.left() == []


async def test_more_memory_than_the_node_has(directory: Path, reliability: Reliability) -> None:
    async with daemon_and_client(directory) as (daemon, client):
        node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
        request = node_pb2.PrepareTemplateRequest(memory_bytes=(node.memory_bytes.allocatable // MIB + 1) * MIB)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_FULL"):
            await client.templates.PrepareTemplate(request)
        assert not templates_of(directory).exists()
        assert daemon.left() == []
    reliability.seen(
        "a template larger than the node",
        "refused by what lacks",
        "so",
    )


async def test_a_vmm_that_is_gone_comes_back(directory: Path, reliability: Reliability) -> None:
    qemu = directory / "qemu"
    found = shutil.which("qemu-system-x86_64")
    assert found is not None
    qemu.symlink_to(found)
    with daemon_with(directory, vmm__binary=str(qemu)) as daemon:
        async with connected(daemon) as client:
            await prepare(client)
            qemu.unlink()
            with refused(grpc.StatusCode.INTERNAL, "VMM_NOT_STARTED"):
                await create(client)
            qemu.write_text("#!/bin/sh\necho 'no room for you' >&2\nexit 3\n")
            qemu.chmod(0o755)
            with pytest.raises(grpc.aio.AioRpcError, match="no room for you"):
                await create(client)
            assert daemon.left() == []
            qemu.unlink()
            qemu.symlink_to(found)
            assert "template.make" not in await create(client)  # it was not the template that was to blame
    qemu.unlink()
    qemu.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.0'\n")
    qemu.chmod(0o755)
    with pytest.raises(AssertionError, match=r"is QEMU 7\.2; 8\.2 or newer is needed"):
        start_daemon(directory, vmm__binary=str(qemu))
    reliability.seen(
        "the VMM's program is gone, and comes back",
        "creates say so, and work again",
        "so",
    )
