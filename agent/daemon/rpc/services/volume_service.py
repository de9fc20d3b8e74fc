"""Serve VolumeService (volume.proto)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from agent.common.config.settings import Settings
from agent.common.errors import InvalidSpec
from agent.daemon.rpc.convert.times import timestamp
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.storage.volumes import SNAPSHOT, VOLUME, Volume
from sandboxd.v1 import volume_pb2 as pb
from sandboxd.v1 import volume_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_MAX_PAGE, _DEFAULT_PAGE = 1000, 100
_Message = TypeVar("_Message")


class VolumeServicer(volume_pb2_grpc.VolumeServiceServicer):
    """Servicer of VolumeService."""

    def __init__(self, sandboxes: SandboxService, settings: Settings) -> None:
        self._sandboxes = sandboxes
        self._volumes = sandboxes.volumes
        self._region = settings.node.region

    def _volume(self, volume: Volume) -> pb.Volume:
        base = None if volume.origin is None else pb.Origin(id=volume.origin[0], slug=volume.origin[1])
        return pb.Volume(
            id=volume.id, slug=volume.slug, tenant=volume.tenant, region=self._region, image=volume.image,
            capacity_bytes=volume.capacity_bytes, used_bytes=self._volumes.used_bytes(volume), base_snapshot=base,
            sandbox_id=self._volumes.user(volume), create_time=timestamp(volume.create_time),
        )  # fmt: skip

    def _snapshot(self, snapshot: Volume) -> pb.Snapshot:
        origin = snapshot.origin or ("", "")
        return pb.Snapshot(
            id=snapshot.id, slug=snapshot.slug, tenant=snapshot.tenant, region=self._region, image=snapshot.image,
            capacity_bytes=snapshot.capacity_bytes, used_bytes=self._volumes.used_bytes(snapshot),
            volume=pb.Origin(id=origin[0], slug=origin[1]), create_time=timestamp(snapshot.create_time),
        )  # fmt: skip

    async def CreateVolume(self, request: pb.CreateVolumeRequest, context: Context) -> pb.Volume:  # noqa: N802
        """See volume.proto."""
        image = self._sandboxes.images.get(request.image).name if request.image else ""
        made = await self._volumes.create(
            request.tenant, request.slug, request.capacity_bytes, image=image, base=request.snapshot
        )
        return self._volume(made)

    async def GetVolume(self, request: pb.GetVolumeRequest, context: Context) -> pb.Volume:  # noqa: N802
        """See volume.proto."""
        return self._volume(self._volumes.find(request.tenant, request.id_or_slug, VOLUME))

    async def ListVolumes(  # noqa: N802
        self, request: pb.ListVolumesRequest, context: Context
    ) -> pb.ListVolumesResponse:
        """See volume.proto."""
        page, token = _page(self._volumes.list(request.tenant, VOLUME, request.search), request, self._volume)
        return pb.ListVolumesResponse(volumes=page, next_page_token=token)

    async def DeleteVolume(  # noqa: N802
        self, request: pb.DeleteVolumeRequest, context: Context
    ) -> pb.DeleteVolumeResponse:
        """See volume.proto."""
        await self._volumes.delete(request.tenant, request.id_or_slug, VOLUME)
        return pb.DeleteVolumeResponse()

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> pb.Snapshot:  # noqa: N802
        """See volume.proto."""
        return self._snapshot(await self._volumes.snapshot(request.tenant, request.volume, request.slug))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Context) -> pb.Snapshot:  # noqa: N802
        """See volume.proto."""
        return self._snapshot(self._volumes.find(request.tenant, request.id_or_slug, SNAPSHOT))

    async def ListSnapshots(  # noqa: N802
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> pb.ListSnapshotsResponse:
        """See volume.proto."""
        page, token = _page(self._volumes.list(request.tenant, SNAPSHOT, request.search), request, self._snapshot)
        return pb.ListSnapshotsResponse(snapshots=page, next_page_token=token)

    async def DeleteSnapshot(  # noqa: N802
        self, request: pb.DeleteSnapshotRequest, context: Context
    ) -> pb.DeleteSnapshotResponse:
        """See volume.proto."""
        await self._volumes.delete(request.tenant, request.id_or_slug, SNAPSHOT)
        return pb.DeleteSnapshotResponse()


def _page(found: list[Volume], request: Any, message: Callable[[Volume], _Message]) -> tuple[list[_Message], str]:
    """Return one page of messages, and the token of the next page or "".

    :raises InvalidSpec: page_size is out of range, or page_token is not of this list.
    """
    size = request.page_size or _DEFAULT_PAGE
    if not 1 <= size <= _MAX_PAGE:
        raise InvalidSpec(f"page_size is {size}; it must be from 1 to {_MAX_PAGE}")
    if request.page_token:
        if request.page_token not in {volume.id for volume in found}:
            # The volume was deleted since, or the token was never one.
            raise InvalidSpec(
                "page_token is not valid any more; start with an empty page_token", reason="INVALID_PAGE_TOKEN"
            )
        start = next(index for index, volume in enumerate(found) if volume.id == request.page_token)
        found = found[start:]
    token = found[size].id if len(found) > size else ""
    return [message(volume) for volume in found[:size]], token
