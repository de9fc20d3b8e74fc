"""Connections, statistics and network interfaces of the guest."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.common.errors import AgentError, InvalidSpec
from agent.daemon.guestlink.channel import Channel
from guest import interfaces
from guest.wire import Frame
from tests.support.guest_child import MIB, Guest, collect

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
async def test_dial_carries_both_ways_and_both_ends(channel: Channel, host: str) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data[::-1])
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(echo, host.strip("[]"), 0)
    except OSError:
        pytest.skip(f"this host has no {host}")
    async with server:
        port = server.sockets[0].getsockname()[1]
        data = os.urandom(2 * MIB)
        result, received, events = await collect(channel, "net.dial", data, host=host, port=port)
    assert (result, events) == ({}, [{"connected": True}])
    assert received == {Frame.DATA: data[::-1], Frame.EOF: b""}


async def test_dial_fails_as_connect_does(channel: Channel) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(AgentError, match="refused") as caught:
            await channel.call("net.dial", port=unused.getsockname()[1])
    assert caught.value.reason == "ECONNREFUSED"
    for wrong in ({"port": 0}, {"port": 65536}, {"port": "80"}, {}, {"port": 80, "host": "example.org"},
                  {"port": 80, "host": "1.2.3"}, {"port": 80, "host": "\0"}):  # fmt: skip
        with pytest.raises(InvalidSpec):
            await channel.call("net.dial", **wrong)


async def test_a_dial_that_is_given_up_closes_its_connection(channel: Channel) -> None:
    closed = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()
        writer.close()

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
        async with channel.stream("net.dial", port=server.sockets[0].getsockname()[1]) as stream:
            await stream.recv()
        await closed.wait()


async def test_stats(channel: Channel, child: Guest) -> None:
    stats = await channel.call("sys.stats")
    assert 0 < stats["memory_available"] <= stats["memory_total"]
    assert 0 < stats["disk_available"] <= stats["disk_total"]
    assert (len(stats["load"]), stats["uptime_s"] > 0, stats["processes"] > 1) == (3, True, True)
    _, _, events = await collect(channel, "sys.processes")
    found = {entry["pid"]: entry for event in events for entry in event["processes"]}
    server = found[child.process.pid]
    assert (server["ppid"], server["uid"]) == (os.getpid(), os.getuid())
    assert server["rss"] > MIB
    assert server["command"].split()[1:4] == ["-m", "tests.support.guest_server", "listener"]
    assert found[os.getpid()]["cpu_s"] > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, so it needs root")
def test_interfaces_get_addresses_and_routes() -> None:
    """On a veth pair in a namespace that ends with its one process."""
    script = """
import json, os, subprocess
from guest import interfaces
run = lambda *words: subprocess.run(words, check=True, capture_output=True, text=True).stdout
run("ip", "link", "add", "eth7", "type", "veth", "peer", "name", "eth8")
run("ip", "link", "set", "eth8", "up")
interfaces.bring_up("lo")
interfaces.configure_ipv4("eth7", "10.1.2.3/30", "10.1.2.2")
if os.path.exists("/proc/sys/net/ipv6"):
    interfaces.configure_ipv6("eth7", "fd00::2/64", "fd00::1")
print(json.dumps([json.loads(run("ip", "-j", *words) or "[]") for words in
    (["addr", "show", "dev", "eth7"], ["route"], ["-6", "route"], ["link", "show", "dev", "lo"])]))
"""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", script],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Operation not supported" in done.stderr or "Unknown device type" in done.stderr:
        pytest.skip("this kernel has no veth")
    assert done.returncode == 0, done.stderr

    addresses, routes, routes6, loopback = json.loads(done.stdout)
    found = {f"{info['local']}/{info['prefixlen']}" for info in addresses[0]["addr_info"]}
    assert "10.1.2.3/30" in found
    assert {(route["dst"], route.get("gateway")) for route in routes} >= {("default", "10.1.2.2")}
    assert "UP" in loopback[0]["flags"]
    if os.path.exists("/proc/sys/net/ipv6"):
        assert "fd00::2/64" in found
        assert ("default", "fd00::1") in {(route["dst"], route.get("gateway")) for route in routes6}


def test_malformed_addresses() -> None:
    for cidr in ("x/24", "10.0.0.1/x", "10.0.0.1", ""):
        with pytest.raises((ValueError, OSError)):
            interfaces.configure_ipv4("sbxnone", cidr, "")
    with pytest.raises(OSError, match="No such device"):
        interfaces.bring_up("sbxnone")
