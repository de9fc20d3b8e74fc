"""The Debian package on a clean machine with systemd as PID 1: installed, hardened, stopped, killed, wedged, upgraded,
rebooted, removed. In the order in which they are written; sandboxes live through what they should.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from sandboxd.v1 import volume_pb2 as volumes
from tests.conftest import IMAGES_DIR
from tests.support.client import MIB, Client
from tests.support.machine import Machine, machine
from tests.tools.reliability import Reliability

ROOT = Path(__file__).parents[2]
SERVICES = {"sandboxd": 4.0, "sandboxd-egress": 2.0, "sandboxd-gateway": 2.0}
UNITS = (
    "sandboxd.service", "sandboxd.socket", "sandboxd-egress.service", "sandboxd-egress.socket",
    "sandboxd-gateway.service", "sandboxd-vms.service", "sandboxes.slice",
)  # fmt: skip
SETTINGS = """
[images]
images_dir = "/images"
[sandbox]
default_memory_bytes = "128MiB"
default_disk_bytes = "64MiB"
"""
# What every system does by itself, and dpkg's own books.
OF_THE_SYSTEM = re.compile(
    r"^/(var/log|var/lib/dpkg|var/lib/systemd|var/cache|run|tmp|var/tmp|etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$"
    r"|etc/\.pwd\.lock|etc/machine-id|root|dev)"
)

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("systemd-nspawn") is None, reason="needs systemd-nspawn: systemd-container"),
    pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv, as `just` finds it"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deb")
    subprocess.run([sys.executable, ROOT / "systemd" / "build_deb.py", directory], check=True, capture_output=True)
    return next(directory.glob("*.deb"))


@pytest.fixture(scope="module")
def before() -> dict[str, set[str]]:
    """What there was before the package came."""
    return {}


@pytest.fixture(scope="module")
def host(package: Path, before: dict[str, set[str]]) -> Iterator[Machine]:
    with machine(f"{IMAGES_DIR}:/images", f"{package.parent}:/packages") as made:
        before["files"] = made.files()
        before["users"] = set(made("getent", "passwd").splitlines()) | set(made("getent", "group").splitlines())
        yield made


def ctl(host: Machine, *words: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in host("sandboxctl", "--json", *words).splitlines()]


def create(host: Machine, *words: str) -> str:
    return host("sandboxctl", "create", *words).strip()


@asynccontextmanager
async def connected(host: Machine) -> AsyncIterator[Client]:
    """A client from outside, through the machine's own file system."""
    async with grpc.aio.insecure_channel(f"unix:{host.path('/run/sandboxd/sandboxd.sock')}") as channel:
        yield Client(channel)


def run(host: Machine, sandbox_id: str, script: str) -> str:
    return host("sandboxctl", "exec", sandbox_id, "--", "sh", "-c", script)


def agent(host: Machine) -> int:
    return int(host.property("sandboxd.service", "MainPID"))


@pytest.fixture(scope="module")
def settled(host: Machine, package: Path) -> Machine:
    """The machine with the package installed."""
    host("mkdir", "-p", "/etc/sandboxd")
    host("sh", "-c", f"cat > /etc/sandboxd/config.toml <<'E'\n{SETTINGS}\nE")
    host("dpkg", "--force-confold", "--install", f"/packages/{package.name}")
    host.until(lambda: host.active("sandboxd.service"))
    return host


@pytest.fixture(scope="module")
def sandbox(settled: Machine) -> str:
    """A sandbox in which a process counts seconds from the first test to the last."""
    made = create(settled)
    run(settled, made, "(while :; do date +%s.%N >> /tmp/ticks; sleep 0.1; done) >/dev/null 2>&1 &")
    return made


def ticks(host: Machine, sandbox_id: str) -> int:
    """Returns how often the process has counted; checks that it has not been away for long."""
    times = [float(line) for line in run(host, sandbox_id, "cat /tmp/ticks").split()]
    assert max(after - before for before, after in itertools.pairwise(times)) < 3, "the process stood still"
    return len(times)


def test_the_units_are_right(settled: Machine) -> None:
    assert settled("systemd-analyze", "verify", "--no-pager", *UNITS) == ""
    for unit in UNITS[:4]:
        assert settled.active(unit), settled.journal()
    assert "enabled" in settled("systemctl", "is-enabled", "sandboxd.service")


@pytest.mark.parametrize("service", SERVICES)
def test_the_exposure(settled: Machine, service: str) -> None:
    told = settled("systemd-analyze", "security", "--no-pager", f"{service}.service").splitlines()[-1]
    found = re.search(r"level for \S+: ([0-9.]+)", told)
    assert found is not None, told
    assert float(found.group(1)) <= SERVICES[service]


def test_a_vmm_has_its_place_among_the_units(settled: Machine, sandbox: str) -> None:
    processes = settled("cat", f"/sys/fs/cgroup/sandboxes.slice/sandboxd-vms.service/{sandbox}/cgroup.procs").split()
    assert len(processes) == 1
    status = settled("cat", f"/proc/{processes[0]}/status")
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)


def test_the_egress_process_is_nobody_else_s_and_serves(settled: Machine, sandbox: str) -> None:
    pid = settled.property("sandboxd-egress.service", "MainPID")
    status = settled("cat", f"/proc/{pid}/status")
    assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)
    assert settled("id", "--user", "sandboxd-egress").strip() in status.split("Uid:")[1].splitlines()[0].split()
    assert asked(settled, create(settled, "--allow", "example.com")) == "3"


def asked(host: Machine, sandbox_id: str) -> str:
    """Returns the code that the name server answers a sandbox for a name that it may not know (RFC 1035, 4.1.1)."""
    script = (
        "import socket, struct\n"
        "server = next(l.split()[1] for l in open('/etc/resolv.conf') if l.startswith('nameserver'))\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1)\n"
        "name = b''.join(bytes([len(w)]) + w for w in (b'secret', b'example', b'org')) + bytes(1)\n"
        "for attempt in range(20):\n"
        "    s.sendto(struct.pack('>6H', 7, 256, 1, 0, 0, 0) + name + struct.pack('>2H', 1, 1), (server, 53))\n"
        "    try:\n"
        "        print(s.recv(512)[3] & 15)\n"
        "        break\n"
        "    except (TimeoutError, ConnectionError):\n"
        "        pass"
    )
    return host("sandboxctl", "exec", sandbox_id, "--", "python3", "-c", script).strip()


def test_a_restart_and_a_stop_keep_sandboxes(settled: Machine, sandbox: str, reliability: Reliability) -> None:
    first = ticks(settled, sandbox)
    settled("systemctl", "restart", "sandboxd.service")
    second = ticks(settled, sandbox)
    settled("systemctl", "stop", "sandboxd.service")
    assert not settled.active("sandboxd.service")
    assert settled.active("sandboxd-vms.service")
    third = ticks(settled, sandbox)  # the socket starts the agent for it
    assert settled.active("sandboxd.service")
    assert first < second < third
    reliability.seen(
        "systemd restarts the agent, and stops it", "processes inside go on; a call starts it again, by its socket",
        f"a process that counts went on: {first}, {second}, {third} times",
    )  # fmt: skip


def test_a_killed_agent_and_a_killed_egress_come_back(settled: Machine, sandbox: str, reliability: Reliability) -> None:
    walled = create(settled, "--allow", "example.com")
    settled("sh", "-c", f"kill -KILL {agent(settled)}")
    first = ticks(settled, sandbox)
    settled("sh", "-c", f"kill -KILL {settled.property('sandboxd-egress.service', 'MainPID')}")
    assert asked(settled, walled) == "3"
    assert ticks(settled, sandbox) > first
    settled("sandboxctl", "rm", walled)
    reliability.seen(
        "SIGKILL of the agent and of sandboxd-egress under systemd",
        "both come back by themselves; sandboxes go on, and have their name server again",
        "an exec was answered, a process went on, the name server refused what it should",
    )


def test_a_wedged_agent_is_started_anew(settled: Machine, sandbox: str, reliability: Reliability) -> None:
    for service in ("sandboxd.service", "sandboxd-egress.service"):
        drop_in = f"/run/systemd/system/{service}.d/watchdog.conf"
        settled("mkdir", "-p", str(Path(drop_in).parent))
        settled("sh", "-c", f"printf '[Service]\\nWatchdogSec=2\\n' > {drop_in}")
        settled("systemctl", "daemon-reload")
        settled("systemctl", "restart", service)
        wedged = settled.property(service, "MainPID")
        settled("sh", "-c", f"kill -STOP {wedged}")
        settled.until(lambda: settled.property(service, "MainPID") not in ("0", wedged) and settled.active(service))  # noqa: B023  it is called at once
        assert ticks(settled, sandbox) > 0
        settled("rm", drop_in)
        settled("systemctl", "daemon-reload")
    reliability.seen(
        "SIGSTOP of the agent and of sandboxd-egress under systemd",
        "systemd's watchdog ends it and starts it anew; sandboxes go on",
        "all so (WatchdogSec=2)",
    )


def test_a_reload_changes_what_it_can(settled: Machine) -> None:
    before = agent(settled)
    settled("sh", "-c", "printf '[node]\\nmax_sandboxes = 1\\nname = \"other\"\\n' >> /etc/sandboxd/config.toml")
    settled("systemctl", "reload", "sandboxd.service")
    settled.until(lambda: "settings reloaded" in settled.journal())
    assert '"need_a_restart": ["node.name"]' in settled.journal()
    assert "NODE_FULL" in settled("sandboxctl", "create", check=False)
    assert agent(settled) == before
    settled("sh", "-c", "echo 'nonsense = 1' >> /etc/sandboxd/config.toml")
    settled("systemctl", "reload", "sandboxd.service")
    settled.until(lambda: "invalid settings: the present ones stay in force" in settled.journal())
    settled("sh", "-c", f"cat > /etc/sandboxd/config.toml <<'E'\n{SETTINGS}\nE")
    settled("systemctl", "reload", "sandboxd.service")
    settled("sandboxctl", "rm", create(settled))


def test_an_upgrade_keeps_sandboxes(
    settled: Machine, sandbox: str, package: Path, tmp_path: Path, reliability: Reliability
) -> None:
    tree, newer = tmp_path / "tree", package.with_name("newer.deb")
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", "Version: 99.0", control.read_text()))
    subprocess.run(["dpkg-deb", "--build", "-Znone", tree, newer], check=True, capture_output=True)
    walled, first = create(settled, "--allow", "example.com"), ticks(settled, sandbox)
    settled("dpkg", "--force-confold", "--install", f"/packages/{newer.name}")
    assert ticks(settled, sandbox) > first
    assert asked(settled, walled) == "3"
    settled("sandboxctl", "rm", walled)
    reliability.seen(
        "an upgrade of the package with sandboxes",
        "they go on, processes inside do not notice",
        "so, with their network",
    )


def test_the_gateway(settled: Machine) -> None:
    settled("systemctl", "start", "sandboxd-gateway.service")
    settled.until(lambda: settled.active("sandboxd-gateway.service"))
    token = json.loads(settled("sandboxctl", "--json", "token", "create", "--org=test"))["token"]
    script = (
        "import urllib.request as r\n"
        f"q = r.Request('http://127.0.0.1:8600/api/v3/sandboxes', headers={{'Authorization': 'Bearer {token}'}})\n"
        "print(r.urlopen(q, timeout=20).status)"
    )
    assert settled("python3", "-c", script).strip() == "200"


async def test_a_reboot_ends_sandboxes_and_keeps_volumes(
    settled: Machine, sandbox: str, reliability: Reliability
) -> None:
    async with connected(settled) as client:
        await client.volumes.CreateVolume(volumes.CreateVolumeRequest(slug="kept", capacity_bytes=64 * MIB))
    settled.reboot()
    found = {str(entry["id"]): entry for entry in ctl(settled, "ls")}
    assert found[sandbox]["state"] == "lost"
    assert found[sandbox]["error"]
    async with connected(settled) as client:
        listed = await client.volumes.ListVolumes(volumes.ListVolumesRequest())
    assert [volume.slug for volume in listed.volumes] == ["kept"]
    settled("sandboxctl", "rm", create(settled))
    reliability.seen(
        "the host is rebooted", "sandboxes are LOST and say so; volumes survive; new ones are made", "all so"
    )


def test_a_purge_leaves_nothing(settled: Machine, before: dict[str, set[str]], reliability: Reliability) -> None:
    create(settled)
    settled("dpkg", "--purge", "sandboxd")
    left = {path for path in settled.files() - before["files"] if not OF_THE_SYSTEM.match(path)}
    assert left == set()
    gone = {path for path in before["files"] - settled.files() if not OF_THE_SYSTEM.match(path)}
    assert gone == set()
    users = set(settled("getent", "passwd").splitlines()) | set(settled("getent", "group").splitlines())
    assert users == before["users"]
    processes = settled("sh", "-c", "cat /proc/[0-9]*/comm")
    assert "sandboxd" not in processes
    assert "sbx-" not in processes
    assert "sandbox" not in settled("ls", "/sys/fs/cgroup", "/run", "/run/netns")
    assert "sandbox" not in settled("systemctl", "list-units", "--all", "--plain", "--no-legend")
    reliability.seen(
        "the package is purged while a sandbox runs", "no file, user, process, cgroup, namespace or unit is left",
        "none, compared with before it was installed",
    )  # fmt: skip
