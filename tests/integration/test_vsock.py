"""The same API over AF_VSOCK instead of a virtio-serial port."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import psutil
import pytest

from agent.common.config.daemon import PathSettings
from agent.common.errors import VmmError
from agent.daemon.vmm.qemu import vsock_backend
from sandboxd.v1 import process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.integration.test_failure import failed_within
from tests.integration.test_network import PORT, SERVER, dial
from tests.support.client import MIB, Client
from tests.support.daemon import connected, daemon_with
from tests.support.files import Files
from tests.tools.reliability import Reliability


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


WRONG_PEER = """
import socket
for cid in (1, 3, 2):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(5)
    try:
        s.connect((cid, 1024))
        s.sendall(b"x" * 4096)
        print(cid, "closed" if not s.recv(1) else "answered")
    except OSError as error:
        print(cid, "refused")
    s.close()
"""
FLOOD = """
import socket
open_, tried = [], 0
for port in range(1, 5001):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.setblocking(False)
    try:
        s.connect((2, port))
    except OSError:
        pass
    tried += 1
    open_.append(s)
    if len(open_) > 500:
        open_.pop(0).close()
print(tried)
"""


async def test_attacks_over_vsock(directory: Path, reliability: Reliability) -> None:
    """By processes of the guest, against the guest's init and against what carries the link on the host."""
    with daemon_with(directory, vmm__link="vsock", sandbox__relink_timeout_s="4s") as daemon:
        async with connected(daemon) as client, client.sandbox() as attacked:
            told = (await client.run(attacked.id, "python3", "-c", WRONG_PEER)).stdout.decode()
            assert "answered" not in told
            before = psutil.Process(daemon.process.pid).memory_info().rss
            flooding = asyncio.create_task(client.run(attacked.id, "python3", "-c", FLOOD))
            during = 0
            while not flooding.done():
                assert (await client.run(attacked.id, "true")).code == 0
                during += 1
            assert flooding.result().stdout == b"5000\n"
            grown = psutil.Process(daemon.process.pid).memory_info().rss - before
            assert grown < 32 * MIB
            backend = backend_of(attacked)
            await _stop_and_go_on(client, attacked, backend)
            backend.kill()
            failed = await failed_within(client, attacked.id, 40)
            assert failed.error
    reliability.seen(
        "guest: hello from a wrong peer over vsock", "its init takes the host alone for the host",
        ", ".join(told.split("\n")[:-1]),
    )  # fmt: skip
    reliability.seen(
        "guest: 5,000 vsock connections to the host", "none is taken; the sandbox itself answers on",
        f"{during} execs meanwhile; agent {max(0, grown) >> 20} MiB more",
    )  # fmt: skip
    reliability.seen(
        "SIGSTOP and SIGKILL of the vsock backend", "a sandbox goes on after SIGCONT; without it, it has FAILED",
        f"both; {failed.error.splitlines()[0]}",
    )  # fmt: skip


def backend_of(sandbox: pb.Sandbox) -> psutil.Process:
    found = [
        process for process in psutil.process_iter(["cmdline", "name"])
        if names(process, sandbox.id) and process.info["name"].startswith("vhost-device")
    ]  # fmt: skip
    if not found:
        pytest.skip("the kernel itself carries vsock here")
    return found[0]


async def _stop_and_go_on(client: Client, sandbox: pb.Sandbox, backend: psutil.Process) -> None:
    backend.suspend()
    waiting = asyncio.create_task(client.run(sandbox.id, "echo", "late"))
    await asyncio.sleep(1)
    assert not waiting.done()
    backend.resume()
    assert (await asyncio.wait_for(waiting, 20)).stdout == b"late\n"
