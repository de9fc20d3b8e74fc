"""A guest whose init is hostile, in a real VM: root takes PID 1's end of the link (pidfd_getfd(2)) and writes to it
what hypothesis makes up, between the frames of a session under way.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from guest import wire
from guest.yamux import HEADER
from sandboxd.v1 import sandbox_pb2 as pb
from tests.integration.test_attacks import agent_bytes
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon
from tests.tools.reliability import Reliability

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

EXAMPLES = 25
TAKE = """
import base64, ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(1)
link = next(int(fd) for fd in os.listdir("/proc/1/fd") if os.readlink(f"/proc/1/fd/{fd}").startswith("/dev/vport"))
taken = libc.syscall(438, pidfd, link, 0)
assert taken >= 0, os.strerror(ctypes.get_errno())
os.set_blocking(taken, False)
print("taken", flush=True)
data = base64.b64decode(sys.argv[1])
for attempt in range(1000):
    try:
        data = data[os.write(taken, data):]
    except BlockingIOError:
        time.sleep(0.01)
    if not data:
        break
"""


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    """The bystander's."""
    return {"memory_bytes": 128 * MIB}


def frame(kind: int, flags: int, stream: int, length: int, payload: bytes) -> bytes:
    return HEADER.pack(0, kind, flags, stream, length) + payload


frames = st.builds(
    frame,
    st.integers(0, 5),
    st.integers(0, 65535),
    st.one_of(st.integers(0, 64), st.integers(0, (1 << 32) - 1)),
    st.one_of(st.integers(0, 300), st.integers(0, (1 << 32) - 1)),
    st.binary(max_size=200),
)
# Whole frames, halves of them, the same ones again and again, plain noise, and the words of the handshake.
attacks = st.one_of(
    st.lists(frames, min_size=1, max_size=20).map(b"".join),
    frames.map(lambda one: one[:7]),
    st.tuples(frames, st.integers(2, 200)).map(lambda pair: pair[0] * pair[1]),
    st.binary(min_size=1, max_size=4096),
    st.sampled_from([wire.SYNC_REPLY, wire.SYNC_REPLY * 50, wire.SYNC_REQUEST * 50, bytes(65536), b"\xff" * 65536]),
)


async def attack(client: Client, victim: pb.Sandbox, data: bytes) -> bool:
    """Returns whether the link was taken: only then something has been tried."""
    call: Any = client.run(victim.id, "python3", "-c", TAKE, base64.b64encode(data).decode(), user="root")
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(20):
            result = await call
            assert b"taken" in result.stdout, result
    return True


async def test_frames_of_a_hostile_init(
    client: Client, daemon: Daemon, sandbox: pb.Sandbox, reliability: Reliability
) -> None:
    made: list[bytes] = []

    @settings(
        max_examples=EXAMPLES, phases=[Phase.generate], deadline=None, database=None,
        suppress_health_check=list(HealthCheck), derandomize=True,
    )  # fmt: skip
    @given(attacks)
    def collect(data: bytes) -> None:
        made.append(data)

    collect()
    before, survived, broken, slowest = agent_bytes(daemon), 0, 0, 0.0
    said = len(daemon.log)  # others use it, too
    victim = await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=128 * MIB))
    for data in made:
        attacking = asyncio.create_task(attack(client, victim, data))
        slowest = max(slowest, await client.slowest_beside(sandbox.id, attacking))
        assert attacking.result()
        try:
            assert (await client.run(victim.id, "true")).code == 0
            survived += 1
        except grpc.aio.AioRpcError:  # a guest that harms itself may: it is replaced
            broken += 1
            await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=victim.id))
            assert not any(victim.id in path for path in daemon.left())
            victim = await client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(memory_bytes=128 * MIB))
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=victim.id))
    grown = agent_bytes(daemon) - before
    assert grown < 64 * MIB
    assert slowest < 10
    assert "internal error" not in daemon.log[said:]
    assert psutil.pid_exists(daemon.process.pid)
    reliability.seen(
        f"guest: a hostile init sends {len(made)} things made up by hypothesis: frames, halves, repeated ones, noise",
        "the link is made anew or the sandbox is given up; nobody else notices anything; a delete leaves nothing",
        f"{survived} times it answered again, {broken} times not; another's exec took {slowest:.1f} s at most; "
        f"agent {max(0, grown) >> 20} MiB more",
    )
