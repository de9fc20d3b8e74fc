"""Clones of a real template: their own identity, their own disk, the template as it was."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from sandboxd.v1 import node_pb2, process_pb2, sandbox_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, refused

pytestmark = pytest.mark.vm
CLONES = 50
AT_ONCE = 4
UNIQUE_WORDS = 12
# The first bytes that a TLS client sends hold 32 random ones (RFC 8446, 4.1.2): record head, message head, version.
# Entry 25 of the auxiliary vector, AT_RANDOM, is where the kernel puts 16 bytes that become a program's stack canary.
IDENTITY = """
import glob, os, secrets, socket, ssl, struct, time, uuid

def read(path):
    with open(path) as file:
        return file.read().strip()

def device(name):
    with open(f"/dev/{name}", "rb", buffering=0) as file:
        return file.read(16).hex()

def client_random():
    sent = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="host.test").do_handshake()
    except ssl.SSLWantReadError:
        return sent.read()[11:43].hex()

def at_random():
    with open("/proc/self/auxv", "rb") as file:
        address = dict(struct.iter_unpack("LL", file.read()))[25]
    with open("/proc/self/mem", "rb", buffering=0) as file:
        file.seek(address)
        return file.read(16).hex()

kernel = "/proc/sys/kernel/random"
print(read(f"{kernel}/boot_id"), read(f"{kernel}/uuid"), read("/etc/machine-id"), socket.gethostname())
print(uuid.uuid4(), secrets.token_hex(16), os.getrandom(16).hex(), device("urandom"), device("random"))
print(hash("seed"), at_random(), client_random())
print(time.time(), time.monotonic(), read("/proc/uptime").split()[0])
assert not glob.glob("/etc/ssh/ssh_host_*"), "of the image, so of all its sandboxes"
"""


@pytest.fixture
async def template(client: Client) -> node_pb2.Template:
    return await client.templates.PrepareTemplate(node_pb2.PrepareTemplateRequest(memory_bytes=160 * MIB))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def identity(client: Client, gate: asyncio.Semaphore) -> list[str]:
    """Returns the words of a fresh clone that no other may have, once its clocks were seen to be right."""
    async with gate, client.sandbox(memory_bytes=160 * MIB) as sandbox:
        assert "vmm.restore" in [phase.name for phase in sandbox.phases]
        sent = time.time()
        result = await client.run(sandbox.id, "python3", "-c", IDENTITY)
        received = time.time()
        assert result.code == 0, result.stderr
        *words, wall, monotonic, uptime = result.stdout.decode().split()
        assert sent - 1 <= float(wall) <= received  # not the template's; how exact it is has a test of its own
        assert 0 < float(monotonic) < 600
        assert float(uptime) == pytest.approx(float(monotonic), abs=1)
        assert words[3] == sandbox.id
        return words


@pytest.mark.timeout(400)
async def test_clones_share_no_random_byte_and_no_name(client: Client, template: node_pb2.Template) -> None:
    gate = asyncio.Semaphore(AT_ONCE)
    seen = await asyncio.gather(*(identity(client, gate) for _ in range(CLONES)))
    assert {len(words) for words in seen} == {UNIQUE_WORDS}
    assert all(len(words[-1]) == 64 for words in seen)
    everything = [word for words in seen for word in words]
    assert len(set(everything)) == CLONES * UNIQUE_WORDS


# Answers each line with the time, so that a clock is read between two moments of the host's, a few ms apart.
CLOCK = """
import sys, time
for _ in sys.stdin:
    print(time.time(), flush=True)
"""
CLOCK_TOLERANCE_S = 0.05


async def clock_offset(client: Client, sandbox_id: str) -> tuple[float, float]:
    """Returns how many seconds the guest's clock is ahead of the host's, and how far off this may be (RFC 5905, 8)."""
    asked: asyncio.Queue[bytes] = asyncio.Queue()
    spec = process_pb2.ProcessSpec(argv=["python3", "-c", CLOCK], stdin=process_pb2.ProcessSpec.STDIN_PIPE)

    async def messages() -> AsyncIterator[process_pb2.ExecRequest]:
        yield process_pb2.ExecRequest(start=process_pb2.ExecRequest.Start(sandbox_id=sandbox_id, spec=spec))
        while True:
            yield process_pb2.ExecRequest(stdin=await asked.get())

    call = client.processes.Exec(messages())
    found = []
    sent = time.time()
    asked.put_nowait(b"\n")
    async for response in call:
        if response.stdout:
            received = time.time()
            found.append(((received - sent) / 2, float(response.stdout) - (sent + received) / 2))
            if len(found) == 20:
                break
            sent = time.time()
            asked.put_nowait(b"\n")
    call.cancel()
    error_s, offset_s = min(found)
    return offset_s, error_s


async def test_a_clones_clock_is_the_hosts(client: Client, template: node_pb2.Template) -> None:
    async with client.sandbox(memory_bytes=160 * MIB) as sandbox:
        offset_s, error_s = await clock_offset(client, sandbox.id)
        assert abs(offset_s) + error_s <= CLOCK_TOLERANCE_S, (offset_s, error_s)


async def test_a_clone_has_its_own_memory_and_disk(client: Client, daemon: Daemon, template: node_pb2.Template) -> None:
    ram = daemon.directory / "state" / "templates" / template.name / "ram"
    before = digest(ram)
    async with client.sandbox(memory_bytes=160 * MIB, disk_bytes=64 * MIB) as sandbox:
        await client.run(sandbox.id, "true")
        memory = await client.run(sandbox.id, "sh", "-c", "grep MemTotal /proc/meminfo")
        assert 160 * 1024 <= int(memory.stdout.split()[1]) <= 160 * 1024 * 1.05
        room = await client.run(sandbox.id, "df", "--output=size", "-B1M", "/")
        assert 50 <= int(room.stdout.split()[-1]) <= 64
        written = await client.run(sandbox.id, "sh", "-c", "head -c 20M /dev/zero >~/x && wc -c <~/x")
        assert int(written.stdout) == 20 * MIB
    assert digest(ram) == before
    assert ram.stat().st_mode & 0o222 == 0


async def test_a_template_in_use_stays_and_an_idle_one_goes(client: Client) -> None:
    made = await client.templates.PrepareTemplate(node_pb2.PrepareTemplateRequest(memory_bytes=144 * MIB))
    async with client.sandbox(memory_bytes=144 * MIB):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "TEMPLATE_IN_USE"):
            await client.templates.DeleteTemplate(node_pb2.DeleteTemplateRequest(name=made.name))
    listed = await client.templates.ListTemplates(node_pb2.ListTemplatesRequest())
    assert made.name in {template.name for template in listed.templates}
    await client.templates.DeleteTemplate(node_pb2.DeleteTemplateRequest(name=made.name))
    with refused(grpc.StatusCode.NOT_FOUND, "TEMPLATE_NOT_FOUND"):
        await client.templates.DeleteTemplate(node_pb2.DeleteTemplateRequest(name=made.name))


async def test_a_truncated_ram_file_is_noticed_and_the_next_create_works(
    client: Client, daemon: Daemon, template: node_pb2.Template
) -> None:
    ram = daemon.directory / "state" / "templates" / template.name / "ram"
    ram.chmod(0o644)
    with ram.open("r+b") as file:
        file.truncate(ram.stat().st_size // 2)
    request = sandbox_pb2.CreateSandboxRequest(memory_bytes=160 * MIB)
    created = await client.sandboxes.CreateSandbox(request)
    try:
        assert (await client.run(created.id, "true")).code == 0
        assert "template.make" in [phase.name for phase in created.phases]
    finally:
        await client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=created.id))
