"""Serve SandboxService (sandbox.proto)."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.config.settings import Settings
from agent.common.errors import InvalidSpec, InvalidState, NotFound
from agent.common.model import State
from agent.daemon.rpc.convert.guest_values import guest_float, guest_int
from agent.daemon.rpc.convert.sandbox_messages import (
    STATE_OF,
    event_message,
    lifetime_from,
    net_spec_from,
    sandbox_message,
    secrets_from,
)
from agent.daemon.rpc.convert.times import duration, timestamp, unix_time_s
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.validation import check_lifetime, check_request_id, complete
from agent.daemon.storage.volumes import SNAPSHOT, VOLUME, Volume
from sandboxd.v1 import sandbox_pb2 as pb
from sandboxd.v1 import sandbox_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_MAX_PAGE = 1000
_DEFAULT_PAGE = 100
_CONSOLE_CHUNK_BYTES = 256 << 10
_CONSOLE_POLL_S = 0.2


def _matches(record: Record, labels: dict[str, str]) -> bool:
    return all(key in record.labels and value in ("", record.labels[key]) for key, value in labels.items())


class SandboxServicer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Servicer of SandboxService."""

    def __init__(self, sandboxes: SandboxService, settings: Settings) -> None:
        self._sandboxes = sandboxes
        self._settings = settings

    def _message(self, record: Record) -> pb.Sandbox:
        return sandbox_message(record, self._settings.node.region)

    async def CreateSandbox(self, request: pb.CreateSandboxRequest, context: Context) -> pb.Sandbox:  # noqa: N802
        """See sandbox.proto."""
        secrets = secrets_from(request.secrets)
        root, mounts, image = self._volumes(request)
        disk_bytes = request.disk_bytes if root is None else root.capacity_bytes
        spec = complete(
            self._settings.sandbox,
            image=image,
            vcpu_count=request.vcpus,
            memory_bytes=request.memory_bytes,
            disk_bytes=disk_bytes,
            env=request.env,
            labels=request.labels,
            lifetime=lifetime_from(request.lifetime),
            request_id=request.request_id,
            net=net_spec_from(request.network, request.tenant),
            secrets=tuple(secret for secret, _ in secrets.values()),
            root="" if root is None else root.id,
            volumes=mounts,
        )
        values = {name: value for name, (_, value) in secrets.items()}
        return self._message(await self._sandboxes.create(spec, values))

    def _volumes(self, request: pb.CreateSandboxRequest) -> tuple[Volume | None, tuple[tuple[str, str], ...], str]:
        """Return the root volume, the (path, volume id) of each mount, and the image of a create request.

        :raises NotFound: a volume or snapshot does not exist.
        :raises InvalidSpec: an image or a disk size is given besides a root.
        :raises InvalidState: the root was not made from an image.
        """
        find, tenant = self._sandboxes.volumes.find, request.tenant
        mounts = tuple((path, find(tenant, name, VOLUME).id) for path, name in sorted(request.volumes.items()))
        image = request.image or self._settings.images.default_image
        if not request.root:
            return None, mounts, image
        root = find(tenant, request.root, VOLUME, SNAPSHOT)
        if not root.image:
            raise InvalidState(
                f"{root.slug} cannot be booted: it was not made from an image", reason="VOLUME_NOT_BOOTABLE"
            )
        if request.disk_bytes or request.image not in ("", root.image):
            raise InvalidSpec(f"root {root.slug} determines image and disk_bytes; leave them unset")
        return root, mounts, root.image

    async def GetSandbox(self, request: pb.GetSandboxRequest, context: Context) -> pb.Sandbox:  # noqa: N802
        """See sandbox.proto."""
        return self._message(await self._sandboxes.inspect(request.id))

    async def ListSandboxes(  # noqa: N802
        self, request: pb.ListSandboxesRequest, context: Context
    ) -> pb.ListSandboxesResponse:
        """See sandbox.proto."""
        size = request.page_size or _DEFAULT_PAGE
        if not 1 <= size <= _MAX_PAGE:
            raise InvalidSpec(f"page_size is {size}; it must be from 1 to {_MAX_PAGE}")
        after = _parse_token(request.page_token)
        states = {STATE_OF.get(number) for number in request.states}
        labels = dict(request.labels)
        found = [
            record
            for record in self._sandboxes.list()
            if (record.create_time, record.id) > after
            and (not states or record.state in states)
            and (not request.tenant or record.net.tenant == request.tenant)
            and _matches(record, labels)
        ]
        page = found[:size]
        token = _page_token(page[-1]) if len(found) > size else ""
        return pb.ListSandboxesResponse(sandboxes=[self._message(record) for record in page], next_page_token=token)

    async def UpdateSandbox(self, request: pb.UpdateSandboxRequest, context: Context) -> pb.Sandbox:  # noqa: N802
        """See sandbox.proto."""
        network = None
        if request.HasField("network"):
            network = net_spec_from(request.network, self._sandboxes.get(request.id).net.tenant)
        change = PolicyChange(network, secrets_from(request.set_secrets), tuple(request.remove_secrets))
        record = await self._sandboxes.update(
            request.id,
            expire_time=unix_time_s(request.expire_time) if request.HasField("expire_time") else None,
            clear_expire_time=request.clear_expire_time,
            set_labels=request.set_labels,
            remove_labels=request.remove_labels,
            policy=change,
            end_lease=request.end_lease,
        )
        return self._message(record)

    async def DeleteSandbox(  # noqa: N802
        self, request: pb.DeleteSandboxRequest, context: Context
    ) -> pb.DeleteSandboxResponse:
        """See sandbox.proto."""
        try:
            await self._sandboxes.delete(request.id)
        except NotFound:
            if not request.allow_missing:
                raise
        return pb.DeleteSandboxResponse()

    async def PauseSandbox(self, request: pb.PauseSandboxRequest, context: Context) -> pb.Sandbox:  # noqa: N802
        """See sandbox.proto."""
        return self._message(await self._sandboxes.pause(request.id, to_disk=request.to_disk))

    async def ResumeSandbox(self, request: pb.ResumeSandboxRequest, context: Context) -> pb.Sandbox:  # noqa: N802
        """See sandbox.proto."""
        return self._message(await self._sandboxes.resume(request.id))

    async def ForkSandbox(  # noqa: N802
        self, request: pb.ForkSandboxRequest, context: Context
    ) -> pb.ForkSandboxResponse:
        """See sandbox.proto."""
        lifetime = None
        if request.HasField("lifetime"):
            lifetime = lifetime_from(request.lifetime)
            check_lifetime(lifetime)
        check_request_id(request.request_id, 120)
        records = await self._sandboxes.fork(
            request.id, request.count or 1, labels=request.labels, lifetime=lifetime, request_id=request.request_id
        )
        return pb.ForkSandboxResponse(sandboxes=[self._message(record) for record in records])

    async def KeepAlive(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.KeepAliveRequest], context: Context
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        """See sandbox.proto."""
        sandbox_id = ""
        async for request in request_iterator:
            sandbox_id = request.id or sandbox_id
            expire_time = await self._sandboxes.renew_lease(sandbox_id)
            yield pb.KeepAliveResponse(expire_time=timestamp(expire_time))

    async def WatchSandboxes(  # noqa: N802
        self, request: pb.WatchSandboxesRequest, context: Context
    ) -> AsyncIterator[pb.SandboxEvent]:
        """See sandbox.proto."""
        labels = dict(request.labels)

        def wanted(record: Record) -> bool:
            return request.id in ("", record.id) and _matches(record, labels)

        async for event in self._sandboxes.watch(wanted):
            yield event_message(event, self._settings.node.region)

    async def GetConsole(  # noqa: N802
        self, request: pb.GetConsoleRequest, context: Context
    ) -> AsyncIterator[pb.GetConsoleResponse]:
        """See sandbox.proto."""
        if request.tail_bytes < 0:
            raise InvalidSpec("tail_bytes must not be negative")
        limit = self._settings.vmm.console_limit_bytes
        seen = self._sandboxes.console(request.id, min(request.tail_bytes or limit, limit))
        for start in range(0, len(seen), _CONSOLE_CHUNK_BYTES):
            yield pb.GetConsoleResponse(data=seen[start : start + _CONSOLE_CHUNK_BYTES])
        while request.follow:
            await asyncio.sleep(_CONSOLE_POLL_S)
            try:
                now = self._sandboxes.console(request.id, limit)
                ended = self._sandboxes.get(request.id).state not in (State.CREATING, State.RUNNING)
            except NotFound:
                return
            if new := _appended(seen, now):
                yield pb.GetConsoleResponse(data=new)
                seen = now
            elif ended:
                return

    async def GetSandboxStats(  # noqa: N802
        self, request: pb.GetSandboxStatsRequest, context: Context
    ) -> pb.SandboxStats:
        """See sandbox.proto."""
        running = self._sandboxes.running(request.id)
        stats = await running.channel.call("sys.stats")
        load = stats.get("load")
        loads = {str(index): value for index, value in enumerate(load)} if isinstance(load, list) else {}
        usage = await asyncio.to_thread(running.usage)
        return pb.SandboxStats(
            memory_total_bytes=guest_int(stats, "memory_total"),
            memory_available_bytes=guest_int(stats, "memory_available"),
            load1=guest_float(loads, "0"),
            load5=guest_float(loads, "1"),
            load15=guest_float(loads, "2"),
            disk_total_bytes=guest_int(stats, "disk_total"),
            disk_available_bytes=guest_int(stats, "disk_available"),
            process_count=guest_int(stats, "processes", 0, 1 << 30),
            uptime=duration(guest_float(stats, "uptime_s")),
            vmm_cpu=duration(usage.cpu_s),
            vmm_pss_bytes=usage.pss_bytes,
            net_received_bytes=usage.net_received_bytes,
            net_sent_bytes=usage.net_sent_bytes,
            disk_read_bytes=usage.disk_read_bytes,
            disk_written_bytes=usage.disk_written_bytes,
        )


def _appended(before: bytes, now: bytes) -> bytes:
    """Return the bytes that `now` has after the end of `before`; both are the tail of the same growing log.

    If `before` is not in `now` any more, all of `now` is new.
    """
    if now.startswith(before):
        return now[len(before) :]
    mark = before[-256:]
    at = now.rfind(mark)
    return now if at < 0 else now[at + len(mark) :]


def _page_token(record: Record) -> str:
    return base64.urlsafe_b64encode(f"{record.create_time!r} {record.id}".encode()).decode()


def _parse_token(token: str) -> tuple[float, str]:
    if not token:
        return 0.0, ""
    try:
        create_time, _, sandbox_id = base64.urlsafe_b64decode(token).decode().partition(" ")
        return float(create_time), sandbox_id
    except (ValueError, binascii.Error):
        raise InvalidSpec("page_token is not from a ListSandboxes response; start with an empty page_token") from None
