"""What a guest has and sees: memory, processors, disk, addresses, and no way out."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from agent.common import model
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB, Client
from tests.support.daemon import until

pytestmark = pytest.mark.vm

MEMORY_BYTES = 320 * MIB
DISK_BYTES = 1024 * MIB
CONNECT = """
import socket, sys
for address in sys.argv[1:]:
    host, _, port = address.rpartition(" ")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        print("connected", address)
    except OSError as error:
        print("failed", address, error)
"""


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    return {"memory_bytes": MEMORY_BYTES, "vcpus": 2, "disk_bytes": DISK_BYTES}


async def stats(client: Client, sandbox: pb.Sandbox) -> pb.SandboxStats:
    result: pb.SandboxStats = await client.sandboxes.GetSandboxStats(pb.GetSandboxStatsRequest(id=sandbox.id))
    return result


async def test_it_has_what_was_asked_for(client: Client, sandbox: pb.Sandbox) -> None:
    assert (sandbox.memory_bytes, sandbox.disk_bytes, sandbox.vcpus) == (MEMORY_BYTES, DISK_BYTES, 2)
    assert (await client.run(sandbox.id, "nproc")).stdout == b"2\n"
    now = await stats(client, sandbox)
    assert MEMORY_BYTES <= now.memory_total_bytes <= MEMORY_BYTES * 1.05
    # ext4 keeps a few percent for its own tables.
    assert now.disk_total_bytes == pytest.approx(DISK_BYTES, rel=0.1)
    assert now.disk_available_bytes <= now.disk_total_bytes
    size = int((await client.run(sandbox.id, "df", "-B1", "--output=size", "/")).stdout.split()[-1])
    assert size == now.disk_total_bytes


async def test_stats_follow_what_the_guest_does(client: Client, sandbox: pb.Sandbox) -> None:
    before = await stats(client, sandbox)
    assert before.process_count > 10
    assert before.uptime.ToMilliseconds() > 0
    assert before.vmm_cpu.ToMilliseconds() > 0
    assert 64 * MIB < before.vmm_pss_bytes < 4 * MEMORY_BYTES
    write = "head -c 64M /dev/zero >/tmp/taken; head -c 64M /dev/urandom >/home/sandbox/taken; sync"
    assert (await client.run(sandbox.id, "sh", "-c", write)).code == 0
    after = await stats(client, sandbox)
    assert after.memory_available_bytes < before.memory_available_bytes - 48 * MIB  # /tmp is memory
    assert after.disk_available_bytes < before.disk_available_bytes - 48 * MIB
    assert after.uptime.ToMilliseconds() > before.uptime.ToMilliseconds()
    assert after.vmm_cpu.ToMilliseconds() > before.vmm_cpu.ToMilliseconds()
    await client.run(sandbox.id, "rm", "/tmp/taken", "/home/sandbox/taken")


async def test_its_card_has_the_addresses_of_the_model(client: Client, sandbox: pb.Sandbox) -> None:
    card = (await client.run(sandbox.id, "ip", "-o", "addr", "show", "dev", "eth0")).stdout.decode()
    assert f"inet {model.GUEST_IPV4} " in card
    assert f"inet6 {model.GUEST_IPV6} " in card
    assert model.GUEST_MAC.encode() in (await client.run(sandbox.id, "ip", "link", "show", "dev", "eth0")).stdout
    routes = (await client.run(sandbox.id, "ip", "route")).stdout.decode()
    assert f"default via {model.GATEWAY_IPV4.partition('/')[0]}" in routes


async def test_there_is_no_way_out(client: Client, sandbox: pb.Sandbox) -> None:
    """The host listens on every address: none of them, nor anything beyond, may be reached."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9)) if _has_route() else None
            own = probe.getsockname()[0]
        gateway = model.GATEWAY_IPV4.partition("/")[0]
        targets = [f"{host} {port}" for host in {own, gateway, "169.254.169.254", "192.0.2.1"} - {"0.0.0.0"}]
        result = await client.run(sandbox.id, "python3", "-c", CONNECT, *targets)
        assert len(result.stdout.splitlines()) == len(targets), result.stderr
        assert b"connected" not in result.stdout
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        # The same program connects where somebody listens: the test can fail.
        serve = "import socket, subprocess, sys; s = socket.create_server(('', 7777)); subprocess.run(sys.argv[1:])"
        address = f"{model.GUEST_IPV4.partition('/')[0]} 7777"
        result = await client.run(sandbox.id, "python3", "-c", serve, "python3", "-c", CONNECT, address)
        assert result.stdout.startswith(b"connected"), result.stderr


def _has_route() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(("192.0.2.1", 9)) == 0


async def test_the_program_that_was_run_ahead_is_gone(client: Client) -> None:
    """In a guest of two CPUs a child of PID 1 does so (`guest/prewarm.py`); nobody is to see it."""
    async with client.sandbox(memory_bytes=MEMORY_BYTES, vcpus=2) as sandbox:

        async def only_the_asker() -> bool:
            asked = await client.run(sandbox.id, "sh", "-c", "echo $$; cat /proc/1/task/1/children", user="root")
            own, *children = asked.stdout.split()
            return children == [own]

        await until(only_the_asker)
