"""What the gateway needs of the API besides files: environment, channels, listeners, tenants, leases, volumes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.common.api_client import opened
from sandboxd.v1 import file_pb2, network_pb2, process_pb2, sandbox_pb2, volume_pb2
from tests.support.client import MIB, Client
from tests.support.daemon import Daemon, connected, daemon_with, refused

pytestmark = pytest.mark.vm

NOT_FOUND, PRECONDITION = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def start(client: Client, sandbox_id: str, *argv: str, **fields: Any) -> process_pb2.Process:
    request = process_pb2.StartProcessRequest(sandbox_id=sandbox_id, spec=process_pb2.ProcessSpec(argv=argv, **fields))
    started: process_pb2.Process = await client.processes.StartProcess(request)
    return started


async def test_environment(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    async def variables(**fields: Any) -> dict[str, str]:
        request = process_pb2.GetEnvironmentRequest(sandbox_id=sandbox.id, **fields)
        return dict((await client.processes.GetEnvironment(request)).variables)

    async def update(**fields: Any) -> None:
        await client.processes.UpdateEnvironment(process_pb2.UpdateEnvironmentRequest(sandbox_id=sandbox.id, **fields))

    assert (await variables())["HOME"] == "/home/sandbox"
    assert (await variables(user="root"))["HOME"] == "/root"
    await update(set={"A": "1", "B": "2"})
    assert (await client.run(sandbox.id, "sh", "-c", "echo $A$B")).stdout == b"12\n"
    await update(set={"A": "3"}, remove=["B", "LANG"])
    assert (await client.run(sandbox.id, "sh", "-c", "echo $A$B$LANG")).stdout == b"3\n"
    await update(set={"LANG": "C.UTF-8"}, remove=["A"])
    assert (await variables())["LANG"] == "C.UTF-8"
    for wrong in ({"set": {"A=B": "x"}}, {"remove": [""]}, {"set": {"A": "\0"}}):
        with refused(INVALID, "INVALID_SPEC"):
            await update(**wrong)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "E2BIG"):
        for number in range(3):
            await update(set={f"BIG{number}": "x" * 60_000})
    await update(remove=[f"BIG{number}" for number in range(3)])
    cleared = await client.run(sandbox.id, "/usr/bin/env", clear_env=True, env={"ONLY": "1"})
    assert cleared.stdout == b"ONLY=1\n"


async def test_a_channel_is_descriptor_3(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    script = "import os\nwhile d := os.read(3, 100): os.write(3, d.upper())\nprint('ended')"
    process = await start(client, sandbox.id, "python3", "-c", script, channel=True)

    def dial() -> Any:
        return opened(client.network.Dial)

    target = network_pb2.DialRequest.Open(sandbox_id=sandbox.id, process_id=process.process_id)
    call = dial()
    await call.write(network_pb2.DialRequest(open=target))
    await call.read()
    second = dial()
    await second.write(network_pb2.DialRequest(open=target))
    with refused(PRECONDITION, "NO_CHANNEL"):
        await second.read()
    await call.write(network_pb2.DialRequest(data=b"hello"))
    assert (await call.read()).data == b"HELLO"
    await call.done_writing()
    request = process_pb2.WaitRequest(sandbox_id=sandbox.id, process_id=process.process_id)
    assert (await client.processes.Wait(request)).exit.exit_code == 0
    plain = await start(client, sandbox.id, "sleep", "5")
    third = dial()
    opening = network_pb2.DialRequest.Open(sandbox_id=sandbox.id, process_id=plain.process_id)
    await third.write(network_pb2.DialRequest(open=opening))
    with refused(PRECONDITION, "NO_CHANNEL"):
        await third.read()


async def test_a_listener_is_found(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    async def listener(process: process_pb2.Process) -> network_pb2.Listener:
        request = network_pb2.WaitForListenerRequest(sandbox_id=sandbox.id, process_id=process.process_id)
        found: network_pb2.Listener = await client.network.WaitForListener(request)
        return found

    server = "import socket, time; time.sleep(0.3); s = socket.create_server(({!r}, {}), family={}); time.sleep(60)"
    four = await start(client, sandbox.id, "sh", "-c", f'python3 -c "{server.format("127.0.0.1", 7101, 2)}" & wait')
    six = await start(client, sandbox.id, "python3", "-c", server.format("::1", 7102, 10))
    assert [(found.host, found.port) for found in await asyncio.gather(listener(four), listener(six))] == [
        ("127.0.0.1", 7101), ("::1", 7102),
    ]  # fmt: skip
    with refused(PRECONDITION, "PROCESS_EXITED"):
        await listener(await start(client, sandbox.id, "true"))
    for process in (four, six):
        await client.processes.SendSignal(
            process_pb2.SendSignalRequest(sandbox_id=sandbox.id, process_id=process.process_id, signal="KILL")
        )


async def test_tenants_and_ends_of_leases(client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
    lease = sandbox_pb2.Lifetime(lease=Duration(seconds=2))
    async with client.sandbox(tenant="acme", lifetime=lease) as made:
        listed = await client.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(tenant="acme"))
        assert [found.id for found in listed.sandboxes] == [made.id]
        until = Timestamp(seconds=int(time.time()) + 60)
        with refused(INVALID, "INVALID_SPEC"):
            await client.sandboxes.UpdateSandbox(sandbox_pb2.UpdateSandboxRequest(id=made.id, end_lease=True))
        with refused(PRECONDITION, "INVALID_STATE"):
            await client.sandboxes.UpdateSandbox(sandbox_pb2.UpdateSandboxRequest(id=made.id, expire_time=until))
        updated = await client.sandboxes.UpdateSandbox(
            sandbox_pb2.UpdateSandboxRequest(id=made.id, expire_time=until, end_lease=True)
        )
        assert not updated.lifetime.HasField("lease")
        await asyncio.sleep(2.5)  # longer than the lease
        await client.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=made.id))
    certificate = await client.network.GetCertificateAuthority(
        network_pb2.GetCertificateAuthorityRequest(sandbox_id=sandbox.id)
    )
    assert certificate.certificate_pem == ""
    secret = sandbox_pb2.Secret(value="a-secret-value", hosts=["api.example"])
    async with client.sandbox(secrets={"KEY": secret}) as made:
        request = network_pb2.GetCertificateAuthorityRequest(sandbox_id=made.id)
        found = (await client.network.GetCertificateAuthority(request)).certificate_pem
        assert found.startswith("-----BEGIN CERTIFICATE-----")
        assert "PRIVATE" not in found


# -- volumes -----------------------------------------------------------------------------------------------------------


async def create(client: Client, slug: str, **fields: Any) -> volume_pb2.Volume:
    request = volume_pb2.CreateVolumeRequest(**{"slug": slug, "capacity_bytes": 64 * MIB, "tenant": "t", **fields})
    made: volume_pb2.Volume = await client.volumes.CreateVolume(request)
    return made


async def delete(client: Client, slug: str) -> None:
    await client.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(tenant="t", id_or_slug=slug))


async def read(client: Client, sandbox_id: str, path: str) -> bytes:
    request = file_pb2.ReadFileRequest(sandbox_id=sandbox_id, path=path)
    return b"".join([piece.data async for piece in client.files.ReadFile(request)])


async def test_volumes_by_tenant_page_and_search(client: Client) -> None:
    made = [await create(client, f"vol{number}") for number in range(3)]
    assert all(volume.id.startswith("vol-") and volume.used_bytes < 8 * MIB for volume in made)
    with refused(NOT_FOUND, "VOLUME_NOT_FOUND"):
        await client.volumes.GetVolume(volume_pb2.GetVolumeRequest(tenant="other", id_or_slug="vol1"))
    page = await client.volumes.ListVolumes(volume_pb2.ListVolumesRequest(tenant="t", page_size=2))
    assert [volume.slug for volume in page.volumes] == ["vol0", "vol1"]
    rest = await client.volumes.ListVolumes(
        volume_pb2.ListVolumesRequest(tenant="t", page_size=2, page_token=page.next_page_token)
    )
    assert ([volume.slug for volume in rest.volumes], rest.next_page_token) == (["vol2"], "")
    found = await client.volumes.ListVolumes(volume_pb2.ListVolumesRequest(tenant="t", search="ol1"))
    assert [volume.slug for volume in found.volumes] == ["vol1"]
    with refused(INVALID, "INVALID_PAGE_TOKEN"):
        await client.volumes.ListVolumes(volume_pb2.ListVolumesRequest(tenant="t", page_token="vol-none"))
    with refused(grpc.StatusCode.ALREADY_EXISTS, "SLUG_IN_USE"):
        await create(client, "vol1")
    with refused(INVALID, "INVALID_SLUG"):
        await create(client, "No")
    with refused(INVALID, "INVALID_CAPACITY"):
        await create(client, "small", capacity_bytes=1)
    with refused(NOT_FOUND, "IMAGE_NOT_FOUND"):
        await create(client, "strange", image="none")
    for volume in made:
        await delete(client, volume.id)


async def test_eight_volumes_in_one_sandbox(client: Client) -> None:
    names = [f"v{number}x" for number in range(8)]
    for name in names:
        await create(client, name)
    paths = {f"/mnt/{name}": name for name in names}
    async with client.sandbox(tenant="t", volumes=paths) as made:
        assert len(made.volumes) == 8
        script = "for p in /mnt/*; do echo ${p#/mnt/} > $p/name; done"
        assert (await client.run(made.id, "sh", "-c", script)).code == 0
    async with client.sandbox(tenant="t", volumes={"/data": "v5x"}) as made:
        assert await read(client, made.id, "/data/name") == b"v5x\n"
    with refused(INVALID, "INVALID_SPEC"):
        async with client.sandbox(tenant="t", volumes={f"/mnt/{n}": names[0] for n in range(9)}):
            pass
    for name in names:
        await delete(client, name)


async def test_volumes_survive_agents(directory: Any) -> None:
    """A sandbox that holds a volume is adopted, and holds it still; volumes are there without any state but theirs."""
    from tests.support.daemon import start_daemon

    running: Daemon = start_daemon(directory, sandbox__on_stop="keep")
    async with connected(running) as client:
        volume = await create(client, "lasting")
        request = sandbox_pb2.CreateSandboxRequest(memory_bytes=256 * MIB, tenant="t", volumes={"/data": "lasting"})
        made = await client.sandboxes.CreateSandbox(request)
        assert (await client.run(made.id, "sh", "-c", "echo kept > /data/file")).code == 0
    running.kill()
    draft = directory / "state/volumes/.draft-vol-0123456789abcdef"
    draft.mkdir()
    with daemon_with(directory) as again:
        assert not draft.exists()
        async with connected(again) as client:
            found = await client.volumes.GetVolume(volume_pb2.GetVolumeRequest(tenant="t", id_or_slug=volume.id))
            assert found.sandbox_id == made.id
            with refused(PRECONDITION, "VOLUME_IN_USE"):
                await delete(client, "lasting")
            await client.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=made.id))
    (directory / "state/state.db").unlink()
    with daemon_with(directory) as third:
        async with connected(third) as client, client.sandbox(tenant="t", volumes={"/data": "lasting"}) as last:
            assert await read(client, last.id, "/data/file") == b"kept\n"
