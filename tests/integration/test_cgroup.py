"""Each VMM in a control group of its own. What the groups limit is tried with the agent's own code inside a sandbox,
whose kernel has all of cgroup v2: a host may be a hybrid one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import tenacity

from agent.daemon.host import cgroup
from sandboxd.v1 import node_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.integration.test_failure import failed_within, vmm_of
from tests.support.client import MIB, Client
from tests.support.files import Files
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

CODE = Path(cgroup.__file__).parents[2]
MODULES = (
    "__init__", "common/__init__", "common/errors", "daemon/__init__", "daemon/host/__init__", "daemon/host/cgroup",
)  # fmt: skip
PLACE = "/home/sandbox/agent"
RETRYING = Path(tenacity.__file__).parent  # a library that cgroup imports
SETUP = f"mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup && mkdir -p {PLACE}"
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, "/home/sandbox")
from agent.daemon.host.cgroup import Cgroups, CgroupLimits
groups = Cgroups.open("/sandboxd")
assert groups.controllers == {"cpu", "memory", "pids", "io"}, groups
assert not groups.degraded

def run(limits, *argv):
    group = groups.make("one", limits)
    process = subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', group, *argv])
    return group, process

def end():
    groups.remove("one")
    assert not group.exists()
    print("done")
"""
LIMITED = {}
LIMITED["CPU"] = """
group, busy = run(CgroupLimits(0.25, 100, 1 << 30, 64), "sh", "-c", "while :; do :; done")
time.sleep(1)
def used(): return int(dict(l.split() for l in (group / "cpu.stat").read_text().splitlines())["usage_usec"])
began, before = time.monotonic(), used()
time.sleep(2)
share = (used() - before) / 1e6 / (time.monotonic() - began)
assert 0.15 < share < 0.35, share
end()
assert busy.wait() == -signal.SIGKILL
"""
LIMITED["memory"] = """
group, hungry = run(CgroupLimits(1, 100, 24 << 20, 64), sys.executable, "-c", "x = bytearray(64 << 20)")
assert hungry.wait() == -signal.SIGKILL
assert groups.out_of_memory("one")
end()
group, fine = run(CgroupLimits(1, 100, 64 << 20, 64), "true")
assert fine.wait() == 0
assert not groups.out_of_memory("one")
end()
"""
LIMITED["tasks"] = """
group, many = run(CgroupLimits(1, 100, 1 << 30, 8), "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 9 & done")
many.wait()
assert "max 0" not in (group / "pids.events").read_text().splitlines()
assert int((group / "pids.current").read_text()) <= 8
end()
"""
LIMITED["I/O"] = """
disk = next(path for path in Path("/sys/block").iterdir() if path.name.startswith("vd"))
limits = CgroupLimits(1, 100, 1 << 30, 64, (disk / "dev").read_text().strip(), io_bytes=2 << 20)
words = ["dd", f"if=/dev/{disk.name}", "of=/dev/null", "bs=1M", "count=6", "iflag=direct"]
group, reader = run(limits, *words)
began = time.monotonic()
assert reader.wait() == 0
assert time.monotonic() - began > 1.5
end()
"""


@pytest.fixture
async def guest(client: Client, files: Files, sandbox: pb.Sandbox) -> Client:
    result = await client.run(sandbox.id, "sh", "-c", f"mountpoint -q /sys/fs/cgroup || ({SETUP})", user="root")
    assert result.code == 0, result
    code = {f"{PLACE}/{name}.py": CODE / f"{name}.py" for name in MODULES}
    code |= {f"/home/sandbox/tenacity/{path.relative_to(RETRYING)}": path for path in RETRYING.rglob("*.py")}
    folders = sorted({str(Path(target).parent) for target in code})
    await client.run(sandbox.id, "mkdir", "-p", *folders, user="root")
    for target, source in code.items():
        await files.write(target, source.read_bytes())
    return client


@pytest.mark.parametrize("what", LIMITED)
async def test_what_a_group_limits(what: str, guest: Client, sandbox: pb.Sandbox) -> None:
    result = await guest.run(sandbox.id, "python3", "-c", HEAD + LIMITED[what], user="root")
    assert (result.code, result.stdout.splitlines()[-1:]) == (0, [b"done"]), result


# -- on the host -------------------------------------------------------------------------------------------------------


def group_of(sandbox_id: str) -> Path:
    root = cgroup.hierarchy()
    if root is None:
        pytest.skip("this host has no cgroup v2")
    return root / "sandboxd" / sandbox_id


async def test_each_vmm_has_a_group_and_a_delete_removes_it(client: Client) -> None:
    async with client.sandbox() as one, client.sandbox() as other:
        for sandbox in (one, other):
            assert (group_of(sandbox.id) / "cgroup.procs").read_text().split() == [str(vmm_of(sandbox.id).pid)]
        await client.sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=one.id, to_disk=True))
        assert not group_of(one.id).exists()
        await client.sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(id=one.id))
        assert (group_of(one.id) / "cgroup.procs").read_text().split() == [str(vmm_of(one.id).pid)]
    assert not group_of(one.id).exists()
    assert not group_of(other.id).exists()


async def test_a_hybrid_host_is_said_to_be_degraded(client: Client) -> None:
    node = await client.nodes.GetNode(node_pb2.GetNodeRequest())
    assert bool(node.degraded) == (len(cgroup.available()) < len(cgroup.CONTROLLERS))
    assert all(name in " ".join(node.degraded) for name in set(cgroup.CONTROLLERS) - set(cgroup.available()))


# -- a VMM without memory ----------------------------------------------------------------------------------------------


SPARE = 16 * MIB


@pytest.fixture
def narrow(sandbox: pb.Sandbox) -> Iterator[None]:
    """Holds the VMM of the module's sandbox to the memory that it has now, by whichever cgroup this host has."""
    vmm, group = vmm_of(sandbox.id), group_of(sandbox.id)
    if (group / "memory.max").exists():
        (group / "memory.max").write_text(str(int((group / "memory.current").read_text()) + SPARE))
        yield
        return
    first = Path("/sys/fs/cgroup/memory") / f"sandboxd-test-{os.getpid()}"
    try:
        first.mkdir()
    except OSError as error:
        pytest.skip(f"neither version of cgroup can limit memory here: {error}")
    (first / "memory.limit_in_bytes").write_text(str(SPARE))  # what it has already is not counted there
    (first / "cgroup.procs").write_text(str(vmm.pid))
    yield
    if vmm.is_running():
        (first.parent / "cgroup.procs").write_text(str(vmm.pid))
    first.rmdir()


@pytest.mark.usefixtures("narrow")
async def test_a_vmm_out_of_memory_is_told_from_a_guest(
    client: Client, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    """The last of the module: its sandbox is gone then."""
    with pytest.raises(grpc.aio.AioRpcError):
        await client.run(sandbox.id, "python3", "-c", "kept = bytearray(150 << 20)")
    failed = await failed_within(client, sandbox.id, 30)
    assert "for lack of memory" in failed.error
    reliability.seen(
        "the host ends a VMM for lack of memory", "the sandbox has FAILED and says so; what a guest ends is told apart",
        "FAILED with what to raise",
    )  # fmt: skip
