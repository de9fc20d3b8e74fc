"""What a VMM may do on the host, should its guest take it over: seen from the host, in /proc."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from sandboxd.v1 import volume_pb2
from tests.integration.test_standing import pause, resume, vmm
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm


def status(pid: int, thread: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def uid_of(pid: int) -> int:
    """Returns the user that every thread is, having checked what none of them may."""
    users = set()
    for thread in threads(pid):
        facts = status(pid, thread)
        assert len(set(facts["Uid"].split())) == len(set(facts["Gid"].split())) == 1
        assert facts["Groups"].split() in ([], [facts["Gid"].split()[0]])
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2"), facts["Name"]
        assert [int(facts[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0] * 5
        users.add(int(facts["Uid"].split()[0]))
    (uid,) = users
    return uid


def sees(pid: int, path: Path) -> bool:
    """Whether the process has the path in its own root."""
    return os.path.lexists(f"/proc/{pid}/root{path}")


async def can(pid: int, uid: int, *argv: str) -> bool:
    """Whether a program can do something that has all that the process has."""
    words = [
        "nsenter",
        "-t",
        str(pid),
        "-m",
        "-r",
        "-n",
        "setpriv",
        f"--reuid={uid}",
        f"--regid={uid}",
        "--clear-groups",
    ]
    words += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *argv]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, check=False)
    return done.returncode == 0


async def test_a_vmm_has_its_own_files_and_nothing_else(
    client: Client, daemon: Daemon, reliability: Reliability
) -> None:
    volume = await client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(slug="mine", capacity_bytes=64 * MIB))
    disk_of_volume = daemon.directory / "state" / "volumes" / volume.id / "disk.img"
    async with client.sandbox(volumes={"/data": volume.id}) as one, client.sandbox() as two:
        pids = {sandbox.id: vmm(sandbox.id)[0].pid for sandbox in (one, two)}
        users = {sandbox_id: uid_of(pid) for sandbox_id, pid in pids.items()}
        assert len(set(users.values())) == 2
        assert min(users.values()) >= 1_900_000_000
        state, run = daemon.directory / "state", daemon.directory / "run"
        disks = {sandbox.id: state / "sandboxes" / sandbox.id / "data.img" for sandbox in (one, two)}
        for mine, other in ((one, two), (two, one)):
            pid, uid = pids[mine.id], users[mine.id]
            assert sees(pid, disks[mine.id])
            assert disks[mine.id].stat().st_uid == uid
            hidden = [disks[other.id], state / "state.db", state / "secrets", run, Path("/etc/passwd"), Path("/proc")]
            assert [path for path in hidden if sees(pid, path)] == []
            assert set(os.listdir(f"/proc/{pid}/root/dev")) <= {"null", "urandom", "kvm"}
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink(f"/proc/{pids[other.id]}/ns/net")
            assert await can(pid, uid, "test", "-w", str(disks[mine.id]))
            for forbidden in ("/", "/tmp", "/usr", str(disks[mine.id].parent)):
                assert not await can(pid, uid, "touch", f"{forbidden}/x"), forbidden
            assert not await can(pid, uid, "cat", str(disks[mine.id].parent / "record.json"))
            assert not await can(pid, uid, "ip", "link", "set", "lo", "down")
        assert [sees(pid, disk_of_volume) for pid in pids.values()] == [True, False]
        await pause(client, one.id, to_disk=True)
        memory = state / "sandboxes" / one.id / "memory"
        assert {path.stat().st_uid for path in (memory, *memory.iterdir())} == {0}
        await resume(client, one.id)
        assert uid_of(vmm(one.id)[0].pid) == users[one.id]
    assert disk_of_volume.stat().st_uid == 0
    await client.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(id_or_slug=volume.id))
    reliability.seen(
        "a VMM is taken over by its guest",
        "it is a user of its own without capabilities, under seccomp, and has the files of its own sandbox alone",
        "two VMMs: users of their own; no other disk, state, secret, socket or device; nothing writable but the disk",
    )
