"""Addresses and routes of the uplink that lie in the ranges of sandboxes, as `doctor` finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.common.errors import HostError
from agent.daemon.network.kernel import pool_users
from agent.daemon.network.kernel.pool import AddressPool

POOL = AddressPool("100.64.0.0/10", "fd73:6279::/48")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, so it needs root")
# `find` must leave the namespace of its caller as it is, and start no process: gRPC does not survive a fork.
SCRIPT = """
import json, os, sys
os.fork = os.forkpty = lambda: sys.exit("it forked")
from agent.daemon.network.kernel import pool_users
from agent.daemon.network.kernel.pool import AddressPool
before = os.readlink("/proc/self/ns/net")
found = pool_users.find(sys.argv[1], AddressPool("100.64.0.0/10", "fd73:6279::/48"))
assert os.readlink("/proc/self/ns/net") == before
print(json.dumps(found))
"""


def ip(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words], check=True, capture_output=True)


@pytest.fixture
def uplink() -> Iterator[str]:
    name = f"egw-pools-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        ip(name, "link", "add", "sbx0", "type", "veth", "peer", "name", "vpn0")
        for link in ("lo", "sbx0", "vpn0"):
            ip(name, "link", "set", link, "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def found(namespace: str, *prefix: str) -> list[str]:
    command = [*prefix, sys.executable, "-c", SCRIPT, namespace]
    done = subprocess.run(command, cwd=Path(__file__).parents[4], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(json.loads(done.stdout))


@needs_root
def test_an_uplink_of_sandboxes_alone_is_free(uplink: str) -> None:
    ip(uplink, "address", "add", "100.64.0.1/31", "dev", "sbx0")
    ip(uplink, "address", "add", "fd73:6279::1/127", "dev", "sbx0", "nodad")
    ip(uplink, "address", "add", "192.0.2.2/24", "dev", "vpn0")
    ip(uplink, "route", "add", "default", "via", "192.0.2.1")
    ip(uplink, "route", "add", "100.0.0.0/8", "via", "192.0.2.1")  # wider than the pool
    assert found(uplink) == []


@needs_root
def test_others_in_the_ranges_are_named(uplink: str) -> None:
    ip(uplink, "address", "add", "100.100.1.2/24", "dev", "vpn0")
    ip(uplink, "address", "add", "fd73:6279:0:1::2/64", "dev", "vpn0", "nodad")
    ip(uplink, "route", "add", "100.64.0.0/10", "dev", "vpn0", "table", "52")
    ip(uplink, "route", "add", "unreachable", "100.127.0.0/16")
    expected = {
        "address 100.100.1.2/24 of vpn0", "address fd73:6279:0:1::2/64 of vpn0", "route to 100.100.1.0/24 of vpn0",
        "route to 100.64.0.0/10 of vpn0", "route to 100.127.0.0/16 of no link", "route to fd73:6279:0:1::/64 of vpn0",
    }  # fmt: skip
    assert set(found(uplink)) == expected
    assert set(found("", "ip", "netns", "exec", uplink)) == expected


def test_a_namespace_that_is_not_there() -> None:
    with pytest.raises(HostError, match="no network namespace egw-none"):
        pool_users.find("egw-none", POOL)
