"""The life of a sandbox, from its create to its end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, refused, until

pytestmark = pytest.mark.vm

NOT_FOUND, EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
Event = pb.SandboxEvent
GUEST_PHASES = ("entropy", "clock", "root", "names", "resolver")
IDENTITY = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | base64; hostname"


@pytest.fixture(scope="module")
def sandbox_fields() -> dict[str, Any]:
    return {"memory_bytes": 256 * MIB, "labels": {"module": "lifecycle"}, "env": {"GREETING": "grüß dich"}}


async def gone(client: Client, sandbox_id: str) -> bool:
    try:
        await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=sandbox_id))
    except grpc.aio.AioRpcError as error:
        return error.code() is NOT_FOUND
    return False


async def listed(client: Client, **fields: Any) -> list[str]:
    response = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(**fields))
    return [found.id for found in response.sandboxes]


async def events_of(client: Client, label: str, into: list[pb.SandboxEvent]) -> None:
    request = pb.WatchSandboxesRequest(labels={label: ""})
    async for event in client.sandboxes.WatchSandboxes(request):
        into.append(event)


async def follow(client: Client, sandbox_id: str, into: bytearray) -> None:
    async for piece in client.sandboxes.GetConsole(pb.GetConsoleRequest(id=sandbox_id, follow=True)):
        into.extend(piece.data)


def seconds(message: Timestamp) -> float:
    return message.ToMicroseconds() / 1e6


async def test_a_create_says_what_was_made(client: Client, sandbox: pb.Sandbox) -> None:
    assert sandbox.state == pb.Sandbox.STATE_RUNNING
    times = {phase.name: phase.duration.ToMicroseconds() for phase in sandbox.phases}
    inside = {"template.make", "template.verify", *(f"guest.{name}" for name in GUEST_PHASES)}
    inside |= {"network.rules", "network.link", "network.egress"}
    assert [name for name in times if name not in inside] == [
        "intent", "directories", "cgroup", "netns", "network", "template", "disk", "vmm.restore", "token",
        "guest.answer", "guest.configure", "guest.clock_sync", "create",
    ]  # fmt: skip
    assert set(times) >= {f"guest.{name}" for name in GUEST_PHASES}
    assert sum(spent for name, spent in times.items() if name not in {*inside, "create"}) <= times["create"]
    assert (sandbox.image, sandbox.vcpus, sandbox.memory_bytes) == ("minimal", 1, 256 * MIB)
    assert sandbox.image_digest.startswith("sha256:")
    assert sandbox.vmm.startswith("qemu ")
    assert not sandbox.HasField("expire_time")
    assert await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=sandbox.id)) == sandbox
    result = await client.run(sandbox.id, "sh", "-c", "echo $GREETING; hostname")
    assert result.stdout.decode().splitlines() == ["grüß dich", sandbox.id]


async def test_one_request_id_makes_one_sandbox_with_an_identity_of_its_own(
    client: Client, sandbox: pb.Sandbox
) -> None:
    request = pb.CreateSandboxRequest(memory_bytes=256 * MIB, request_id="twice", labels={"module": "twice"})
    made, same = await asyncio.gather(*(client.sandboxes.CreateSandbox(request) for _ in range(2)))
    try:
        assert made == same
        assert await client.sandboxes.CreateSandbox(request) == made
        other = pb.CreateSandboxRequest(memory_bytes=192 * MIB, request_id="twice", labels={"module": "twice"})
        with refused(EXISTS, "REQUEST_ID_REUSED"):
            await client.sandboxes.CreateSandbox(other)
        first, second = [
            (await client.run(sandbox_id, "sh", "-c", IDENTITY)).stdout.splitlines()
            for sandbox_id in (sandbox.id, made.id)
        ]
        assert len(first) == 4
        assert not set(first) & set(second)

        assert await listed(client) == [sandbox.id, made.id]
        assert await listed(client, labels={"module": ""}, states=[pb.Sandbox.STATE_RUNNING]) == [sandbox.id, made.id]
        assert await listed(client, labels={"module": "twice"}) == [made.id]
        assert await listed(client, states=[pb.Sandbox.STATE_FAILED]) == []
        page = await client.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_size=1))
        assert [found.id for found in page.sandboxes] == [sandbox.id]
        assert await listed(client, page_size=1, page_token=page.next_page_token) == [made.id]
    finally:
        both = [client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id)) for _ in range(2)]
        await asyncio.gather(*both)
    with refused(NOT_FOUND, "SANDBOX_NOT_FOUND"):
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id))
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id, allow_missing=True))
    with refused(NOT_FOUND, "SANDBOX_NOT_FOUND"):
        await client.run(made.id, "true")


async def test_a_watch_sees_all_that_happens_and_an_expired_sandbox_is_deleted(
    client: Client, sandbox: pb.Sandbox, daemon: Daemon
) -> None:
    seen: list[pb.SandboxEvent] = []
    watch = asyncio.create_task(events_of(client, "module", seen))
    await until(lambda: had(seen, Event.TYPE_SYNCED))
    assert [(event.type, event.sandbox.id) for event in seen] == [
        (Event.TYPE_SNAPSHOT, sandbox.id), (Event.TYPE_SYNCED, ""),
    ]  # fmt: skip
    lifetime = pb.Lifetime(duration=Duration(seconds=3600))
    async with client.sandbox(labels={"module": "watch"}, lifetime=lifetime) as made:
        assert seconds(made.expire_time) - seconds(made.create_time) == pytest.approx(3600)
        update = pb.UpdateSandboxRequest(id=made.id, set_labels={"new": "x"}, remove_labels=["no such label"])
        update.expire_time.FromMicroseconds(round((time.time() + 1) * 1e6))
        changed = await client.sandboxes.UpdateSandbox(update)
        assert dict(changed.labels) == {"module": "watch", "new": "x"}
        await until(lambda: had(seen, Event.TYPE_DELETED))
        assert time.time() >= seconds(update.expire_time)
        assert await gone(client, made.id)
    watch.cancel()
    states = pb.Sandbox
    assert [(event.type, event.sandbox.state, event.reason) for event in seen if event.sandbox.id == made.id] == [
        (Event.TYPE_CREATED, states.STATE_CREATING, ""),
        (Event.TYPE_UPDATED, states.STATE_RUNNING, ""),
        (Event.TYPE_UPDATED, states.STATE_RUNNING, ""),
        (Event.TYPE_UPDATED, states.STATE_DELETING, "expired"),
        (Event.TYPE_DELETED, states.STATE_DELETED, "expired"),
    ]
    assert all(made.id not in path for path in daemon.left())


async def had(seen: list[pb.SandboxEvent], kind: int) -> bool:
    return any(event.type == kind for event in seen)


async def test_a_lease_is_renewed_and_lapses(client: Client) -> None:
    lease_s = 3
    async with client.sandbox(lifetime=pb.Lifetime(lease=Duration(seconds=lease_s))) as made:
        # A boot may take longer than the lease: it begins when the sandbox can be used.
        assert seconds(made.expire_time) > time.time() + lease_s - 2
        with refused(PRECONDITION, "INVALID_STATE"):
            await client.sandboxes.UpdateSandbox(pb.UpdateSandboxRequest(id=made.id, clear_expire_time=True))
        renewals = 5

        async def requests() -> AsyncIterator[pb.KeepAliveRequest]:
            for number in range(renewals):
                yield pb.KeepAliveRequest(id="" if number else made.id)
                await asyncio.sleep(1)

        times = [seconds(response.expire_time) async for response in client.sandboxes.KeepAlive(requests())]
        assert len(times) == renewals
        assert all(later > earlier for earlier, later in itertools.pairwise(times))
        assert times[-1] - times[0] > renewals - 2  # one of them may have been late
        renewed = times[-1]
        assert renewed > seconds(made.expire_time) + 1
        assert not await gone(client, made.id)  # the end of the stream is not the end of the lease
        await until(lambda: gone(client, made.id))
        assert time.time() >= renewed


async def test_keep_alive_needs_a_lease(client: Client, sandbox: pb.Sandbox) -> None:
    for sandbox_id, code, why in (
        (sandbox.id, PRECONDITION, "NO_LEASE"),
        ("sbx-0000000000000000", NOT_FOUND, "SANDBOX_NOT_FOUND"),
    ):
        with refused(code, why):
            async for _ in client.sandboxes.KeepAlive(iter([pb.KeepAliveRequest(id=sandbox_id)])):
                raise AssertionError("renewed")


async def test_a_delete_ends_a_create(client: Client, daemon: Daemon) -> None:
    creating = client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(labels={"module": "cut"}))
    seen: list[pb.SandboxEvent] = []
    watch = asyncio.create_task(events_of(client, "module", seen))
    await until(lambda: made(client, "cut", daemon), timeout_s=60)  # a template may be made first
    (sandbox_id,) = await listed(client, labels={"module": "cut"}, states=[pb.Sandbox.STATE_CREATING])
    await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox_id))
    with refused(PRECONDITION, "SANDBOX_DELETED"):
        await creating
    watch.cancel()
    assert all(sandbox_id not in path for path in daemon.left())
    assert await gone(client, sandbox_id)


async def made(client: Client, label: str, daemon: Daemon) -> bool:
    """Whether the sandbox with this label has a VM that boots."""
    found = await listed(client, labels={"module": label})
    return bool(found) and (daemon.run_dir / "vm" / found[0] / "console.log").exists()


async def test_a_create_goes_on_when_its_client_leaves(client: Client, daemon: Daemon) -> None:
    creating = client.sandboxes.CreateSandbox(pb.CreateSandboxRequest(labels={"module": "left"}))
    await until(lambda: made(client, "left", daemon), timeout_s=60)
    creating.cancel()
    (sandbox_id,) = await listed(client, labels={"module": "left"})
    followed = asyncio.create_task(follow(client, sandbox_id, console := bytearray()))
    running = {"labels": {"module": "left"}, "states": [pb.Sandbox.STATE_RUNNING]}

    async def is_running() -> bool:
        return await listed(client, **running) == [sandbox_id]

    try:
        await until(is_running, timeout_s=60)
        assert (await client.run(sandbox_id, "true")).code == 0

        async def has_console() -> bool:
            return b"sandboxd-init: configured" in console

        await until(has_console)
        assert not followed.done()
    finally:
        await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=sandbox_id))
    async with asyncio.timeout(5):
        await followed  # its end is the sandbox's end


async def test_the_console_is_read_and_followed(client: Client, sandbox: pb.Sandbox) -> None:
    async def read(**fields: Any) -> bytes:
        request = pb.GetConsoleRequest(id=sandbox.id, **fields)
        return b"".join([piece.data async for piece in client.sandboxes.GetConsole(request)])

    async def says_configured() -> bool:
        return b"sandboxd-init: configured" in await read()

    await until(says_configured)
    before = await read()
    assert await read(tail_bytes=10) == before[-10:]
    followed = bytearray()

    async def has(text: bytes) -> bool:
        return text in followed

    following = asyncio.create_task(follow(client, sandbox.id, followed))
    await until(lambda: has(before))
    result = await client.run(sandbox.id, "sh", "-c", "echo a line on the console >/dev/console", user="root")
    assert result.code == 0, result.stderr
    await until(lambda: has(b"a line on the console"))
    following.cancel()
