"""REST routes of volumes and snapshots, as far as the SDKs use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec
from aiohttp import web

from agent.common.config.gateway import GatewaySettings
from agent.gateway.errors import HttpError
from agent.gateway.middleware import TOKEN
from agent.gateway.nodes.nodes import Nodes
from agent.gateway.nodes.volumes import Volumes
from agent.gateway.rest.requests import capacity_bytes, json_body, page_cursor, page_limit
from sandboxd.v1 import volume_pb2 as pb

_BUILTIN = "builtin:debian-13"


class _NewVolume(msgspec.Struct):
    slug: str
    region: str
    capacity: int | str
    from_: str | None = msgspec.field(default=None, name="from")


class _NewSnapshot(msgspec.Struct):
    slug: str


def volume_json(volume: pb.Volume) -> dict[str, object]:
    """Return a volume in the SDKs' form."""
    base = volume.base_snapshot
    return {
        "id": volume.id, "slug": volume.slug, "region": volume.region, "capacity": volume.capacity_bytes,
        "estimated_allocated_size": volume.used_bytes, "estimated_flattened_size": volume.used_bytes,
        "is_bootable": bool(volume.image),
        "base_snapshot": {"id": base.id, "slug": base.slug} if volume.HasField("base_snapshot") else None,
    }  # fmt: skip


def snapshot_json(snapshot: pb.Snapshot) -> dict[str, object]:
    """Return a snapshot in the SDKs' form."""
    return {
        "id": snapshot.id, "slug": snapshot.slug, "region": snapshot.region, "allocated_size": snapshot.used_bytes,
        "flattened_size": snapshot.used_bytes, "is_bootable": bool(snapshot.image),
        "volume": {"id": snapshot.volume.id, "slug": snapshot.volume.slug},
    }  # fmt: skip


class VolumeRoutes:
    """Handlers of the routes."""

    def __init__(self, settings: GatewaySettings, nodes: Nodes, volumes: Volumes) -> None:
        self._settings = settings
        self._nodes = nodes
        self._volumes = volumes

    def routes(self) -> list[web.RouteDef]:
        """Return the route table."""
        return [
            web.get("/api/v2/volumes", self.list_volumes),
            web.post("/api/v2/volumes", self.create_volume),
            web.get("/api/v2/volumes/{id}", self.get_volume),
            web.delete("/api/v2/volumes/{id}", self.delete_volume),
            web.post("/api/v2/volumes/{id}/snapshot", self.create_snapshot),
            web.get("/api/v2/snapshots", self.list_snapshots),
            web.get("/api/v2/snapshots/{id}", self.get_snapshot),
            web.delete("/api/v2/snapshots/{id}", self.delete_snapshot),
        ]

    async def create_volume(self, request: web.Request) -> web.Response:
        """Create a volume: empty, bootable from the image, or from a snapshot."""
        body, org = await json_body(request, _NewVolume), request[TOKEN].org
        size = capacity_bytes(body.capacity)
        create = pb.CreateVolumeRequest(tenant=org, slug=body.slug, capacity_bytes=size)
        candidates = await self._nodes.candidates(body.region, request[TOKEN].regions)
        if body.from_ == _BUILTIN:
            create.image = self._settings.image
        elif body.from_ is not None:
            if body.from_.startswith("builtin:"):
                raise HttpError(400, "UNKNOWN_BASE", f"there is no {body.from_[:60]!r}; there is {_BUILTIN}")
            node, snapshot = await self._volumes.get_snapshot(body.from_, org)
            if node not in candidates:
                raise HttpError(400, "OTHER_REGION", f"the snapshot is in region {snapshot.region}")
            candidates, create.snapshot = [node], body.from_
        await self._volumes.check_slug_is_free(body.slug, org)
        return web.json_response(volume_json(await candidates[0].api.volumes.CreateVolume(create)))

    async def get_volume(self, request: web.Request) -> web.Response:
        """Return one volume."""
        _, volume = await self._volumes.get_volume(request.match_info["id"], request[TOKEN].org)
        return web.json_response(volume_json(volume))

    async def get_snapshot(self, request: web.Request) -> web.Response:
        """Return one snapshot."""
        _, snapshot = await self._volumes.get_snapshot(request.match_info["id"], request[TOKEN].org)
        return web.json_response(snapshot_json(snapshot))

    async def delete_volume(self, request: web.Request) -> web.Response:
        """Delete a volume that is not in use."""
        org = request[TOKEN].org
        node, volume = await self._volumes.get_volume(request.match_info["id"], org)
        await node.api.volumes.DeleteVolume(pb.DeleteVolumeRequest(tenant=org, id_or_slug=volume.id))
        return web.Response(status=204)

    async def delete_snapshot(self, request: web.Request) -> web.Response:
        """Delete a snapshot."""
        org = request[TOKEN].org
        node, snapshot = await self._volumes.get_snapshot(request.match_info["id"], org)
        await node.api.volumes.DeleteSnapshot(pb.DeleteSnapshotRequest(tenant=org, id_or_slug=snapshot.id))
        return web.Response(status=204)

    async def create_snapshot(self, request: web.Request) -> web.Response:
        """Create a snapshot of a volume that is not in use."""
        slug, org = (await json_body(request, _NewSnapshot)).slug, request[TOKEN].org
        node, volume = await self._volumes.get_volume(request.match_info["id"], org)
        await self._volumes.check_slug_is_free(slug, org)
        create = pb.CreateSnapshotRequest(tenant=org, volume=volume.id, slug=slug)
        return web.json_response(snapshot_json(await node.api.volumes.CreateSnapshot(create)))

    async def list_volumes(self, request: web.Request) -> web.Response:
        """Return one page of volumes."""
        limit = page_limit(request.query.get("limit"))
        found = await self._volumes.list_volumes(request[TOKEN].org, request.query.get("search", ""))
        return _page(request, found, limit, volume_json)

    async def list_snapshots(self, request: web.Request) -> web.Response:
        """Return one page of snapshots."""
        limit = page_limit(request.query.get("limit"))
        found = await self._volumes.list_snapshots(request[TOKEN].org, request.query.get("search", ""))
        return _page(request, found, limit, snapshot_json)


def _page(
    request: web.Request, found: Sequence[Any], limit: int, to_json: Callable[[Any], dict[str, object]]
) -> web.Response:
    """Return the page after the request's cursor, with a Link header if another page follows."""
    search, after = request.query.get("search", ""), page_cursor(request.query.get("cursor", ""))
    rest = [item for item in found if item.id > after]
    response = web.json_response([to_json(item) for item in rest[:limit]])
    if len(rest) > limit:
        query = {**({"search": search} if search else {}), "limit": limit, "cursor": rest[limit - 1].id}
        # Both SDKs require an absolute URL, and search the header for exactly these two parts.
        response.headers["Link"] = f'<{request.url.origin()}{request.path}?{urlencode(query)}>; rel="next"'
    return response
