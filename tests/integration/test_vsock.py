"""The same API over AF_VSOCK instead of a virtio-serial port."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import psutil
import pytest

from agent.config import PathSettings
from agent.errors import VmmError
from agent.vmm import vsock_backend
from sandboxd.v1 import process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.client import MIB, Client
from tests.daemon import connected, daemon_with
from tests.files import Files
from tests.integration.test_network import PORT, SERVER, dial


def _why_not() -> str:
    if os.path.exists("/dev/vhost-vsock"):
        return ""
    try:
        vsock_backend.find_binary(PathSettings().tools_dir)
    except VmmError as error:
        return f"no /dev/vhost-vsock, and {error.message}"
    return ""


pytestmark = [pytest.mark.vm, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


async def conforms(client: Client, sandbox: pb.Sandbox) -> None:
    """Exec, input, files and connections do what they do over the other link."""
    result = await client.run(sandbox.id, "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in")
    assert (result.stdout, result.stderr, result.code) == (b"in", b"err\n", 3)
    data = os.urandom(MIB) * 8
    digest = hashlib.sha256(data).hexdigest()
    result = await client.run(sandbox.id, "sha256sum", stdin=data)
    assert result.stdout.split()[0].decode() == digest
    files = Files(client, sandbox)
    pieces = [data[start : start + MIB] for start in range(0, len(data), MIB)]
    assert await files.write("/tmp/data", *pieces) == len(data)
    assert await files.read("/tmp/data") == data
    result = await client.run(sandbox.id, "head", "-c", str(32 * MIB), "/dev/zero")
    assert len(result.stdout) == 32 * MIB
    codes = await asyncio.gather(*(client.run(sandbox.id, "sh", "-c", f"exit {number}") for number in range(50)))
    assert [result.code for result in codes] == list(range(50))


async def test_the_link_over_vsock(directory: Path) -> None:
    with daemon_with(directory, keeps=True, vmm__link="vsock", sandbox__on_stop="keep") as daemon:
        async with connected(daemon) as client:
            sandbox = await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=256 * MIB))
            assert b"serving on vsock" in await console(client, sandbox)
            await conforms(client, sandbox)
            spec = process_pb2.ProcessSpec(argv=["python3", "-c", SERVER])
            started = await client.processes.StartProcess(
                process_pb2.StartProcessRequest(sandbox_id=sandbox.id, spec=spec)
            )
            opened = process_pb2.AttachRequest.Open(sandbox_id=sandbox.id, process_id=started.process_id)
            async for response in client.processes.Attach(iter([process_pb2.AttachRequest(open=opened)])):
                if response.stdout:
                    break
            assert await dial(client, sandbox.id, b"over vsock", port=PORT) == b"over vsockEND 10"
    backends = [process for process in psutil.process_iter(["cmdline"]) if names(process, sandbox.id)]
    assert backends  # kept: the VM, and what carries its link
    with daemon_with(directory, vmm__link="vsock") as daemon:
        async with connected(daemon) as client:
            await conforms(client, sandbox)
            assert await dial(client, sandbox.id, b"again", port=PORT) == b"againEND 5"
    assert not [process for process in psutil.process_iter(["cmdline"]) if names(process, sandbox.id)]


def names(process: psutil.Process, sandbox_id: str) -> bool:
    return any(sandbox_id in word for word in process.info["cmdline"] or [])


async def console(client: Client, sandbox: pb.Sandbox) -> bytes:
    return b"".join([piece.data async for piece in client.sandboxes.GetConsole(pb.GetConsoleRequest(id=sandbox.id))])
