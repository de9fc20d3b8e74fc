"""Network namespaces of sandboxes, real ones."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import HostError
from agent.common.model import GATEWAY_IPV4, GATEWAY_IPV6, ID_PREFIX
from agent.daemon.host import process as host_process
from agent.daemon.network.kernel import namespaces

HAS_IPV6 = os.path.exists("/proc/sys/net/ipv6")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, so it needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="needs /dev/net/tun"),
    pytest.mark.timeout(30),
]


@pytest.fixture
def name() -> str:
    return f"{ID_PREFIX}netns{secrets.token_hex(4)}"


def path(name: str) -> Path:
    return Path("/run/netns") / name


def inside(name: str, *words: str) -> Any:
    command = ["nsenter", f"--net={path(name)}", "ip", "-j", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout or "[]")


async def test_loopback_and_a_tap_and_no_way_out(name: str) -> None:
    async with namespaces.namespace(name):
        links = {link["ifname"]: link for link in inside(name, "addr")}
        assert set(links) == {"lo", "tap0"}
        assert "UP" in links["lo"]["flags"]
        assert "UP" in links["tap0"]["flags"]
        assert links["tap0"]["address"] == "02:73:62:78:00:ff"
        addresses = [f"{info['local']}/{info['prefixlen']}" for info in links["tap0"]["addr_info"]]
        assert GATEWAY_IPV4 in addresses
        if HAS_IPV6:
            assert GATEWAY_IPV6 in addresses
            assert not [info for info in links["tap0"]["addr_info"] if info.get("tentative") or info.get("dadfailed")]
        assert not [route for route in inside(name, "route") if route["dst"] == "default"]
        assert path(name).exists()
    assert not path(name).exists()


async def test_our_own_namespace_stays(name: str) -> None:
    before = os.stat("/proc/self/ns/net").st_ino
    async with namespaces.namespace(name):
        assert path(name).stat().st_ino != before
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
    assert os.stat("/proc/self/ns/net").st_ino == before


async def test_two_namespaces_have_the_same_addresses_and_nothing_in_common(name: str) -> None:
    async with namespaces.namespace(name), namespaces.namespace(f"{name}x"):
        first, second = (inside(each, "addr", "show", "dev", "tap0")[0] for each in (name, f"{name}x"))
        assert first["address"] == second["address"]
        assert path(name).stat().st_ino != path(f"{name}x").stat().st_ino


async def test_removal_is_idempotent(name: str) -> None:
    await namespaces.remove(name)
    await namespaces.make(name)
    await namespaces.remove(name)
    await namespaces.remove(name)


async def test_a_file_that_is_no_namespace_any_more_is_removed(name: str) -> None:
    await namespaces.remove(name)
    path(name).parent.mkdir(exist_ok=True)
    path(name).touch()
    await namespaces.remove(name)
    assert not path(name).exists()


async def test_a_name_that_is_taken_keeps_what_is_there(name: str) -> None:
    async with namespaces.namespace(name):
        before = path(name).stat().st_ino
        with pytest.raises(HostError, match="exists already") as caught:
            await namespaces.make(name)
        assert caught.value.reason == "NETNS_FAILED"
        assert path(name).stat().st_ino == before
        assert inside(name, "link", "show", "tap0")


async def test_a_namespace_in_use_is_removed_by_name(name: str, tmp_path: Path) -> None:
    await namespaces.make(name)
    number = path(name).stat().st_ino
    process = await host_process.spawn(["sleep", "60"], netns=name, stderr_path=tmp_path / "log")
    assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == number
    await namespaces.remove(name)
    assert not path(name).exists()
    assert process.alive
    await process.kill()


@pytest.mark.parametrize("step", ["make_tap", "_set_ipv4", "_set_ipv6"])
async def test_nothing_is_left_when_a_step_fails(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if step == "_set_ipv6" and not HAS_IPV6:
        pytest.skip("this kernel has no IPv6")

    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted", "ioctl")

    monkeypatch.setattr(namespaces, step, fail)
    with pytest.raises(HostError, match="must run as root"):
        await namespaces.make(name)
    assert not path(name).exists()
    assert str(path(name)) not in Path("/proc/self/mountinfo").read_text()  # noqa: ASYNC240  procfs


async def test_a_tap_whose_kernel_module_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/dev/net/tun")

    monkeypatch.setattr(namespaces, "make_tap", fail)
    with pytest.raises(HostError, match="kernel module tun"):
        await namespaces.make(name)
