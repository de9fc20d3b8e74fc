"""Volumes and snapshots over REST: what the SDKs' consoles have of them. They lie on the nodes."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import grpc
import msgspec
from aiohttp import web

from agent.common.config.gateway import GatewaySettings
from agent.gateway.errors import Refusal, refusal_from_rpc
from agent.gateway.jsonrpc.websockets import TOKEN
from agent.gateway.nodes.nodes import NodeLink, Nodes
from agent.gateway.rest.routes import body_of
from sandboxd.v1 import volume_pb2 as pb

_MIN_BYTES, _MAX_BYTES = 300 * 10**6, 20 * 2**30
_CAPACITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_FACTORS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20,
    "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_BUILTIN = "builtin:debian-13"
_DEFAULT_LIMIT, _MAX_LIMIT = 100, 1000


class _NewVolume(msgspec.Struct):
    slug: str
    region: str
    capacity: int | str
    from_: str | None = msgspec.field(default=None, name="from")


class _NewSnapshot(msgspec.Struct):
    slug: str


def capacity_bytes(value: int | str) -> int:
    """Returns the bytes of a number or of a text such as "10GB". :raises Refusal: neither, or out of range."""
    if isinstance(value, str):
        match = _CAPACITY.fullmatch(value)
        if match is None:
            raise Refusal(400, "INVALID_CAPACITY", f'capacity {value[:40]!r} is not a size such as "10GB" or "1GiB"')
        value = int(float(match[1]) * _FACTORS[match[2]])
    if not _MIN_BYTES <= value <= _MAX_BYTES:
        raise Refusal(400, "INVALID_CAPACITY", f"capacity is {value} bytes; it must be from 300 MB to 20 GB")
    return value


def volume_json(volume: pb.Volume) -> dict[str, object]:
    """Returns a volume as the SDKs read it."""
    base = volume.base_snapshot
    return {
        "id": volume.id, "slug": volume.slug, "region": volume.region, "capacity": volume.capacity_bytes,
        "estimated_allocated_size": volume.used_bytes, "estimated_flattened_size": volume.used_bytes,
        "is_bootable": bool(volume.image),
        "base_snapshot": {"id": base.id, "slug": base.slug} if volume.HasField("base_snapshot") else None,
    }  # fmt: skip


def snapshot_json(snapshot: pb.Snapshot) -> dict[str, object]:
    """Returns a snapshot as the SDKs read it."""
    return {
        "id": snapshot.id, "slug": snapshot.slug, "region": snapshot.region, "allocated_size": snapshot.used_bytes,
        "flattened_size": snapshot.used_bytes, "is_bootable": bool(snapshot.image),
        "volume": {"id": snapshot.volume.id, "slug": snapshot.volume.slug},
    }  # fmt: skip


class VolumeRest:
    """Handlers."""

    def __init__(self, settings: GatewaySettings, nodes: Nodes) -> None:
        self._settings = settings
        self._nodes = nodes

    def routes(self) -> list[web.RouteDef]:
        """Returns the routes."""
        return [
            web.get("/api/v2/volumes", self.list_volumes),
            web.post("/api/v2/volumes", self.create),
            web.get("/api/v2/volumes/{id}", self.get_volume),
            web.delete("/api/v2/volumes/{id}", self.delete_volume),
            web.post("/api/v2/volumes/{id}/snapshot", self.snapshot),
            web.get("/api/v2/snapshots", self.list_snapshots),
            web.get("/api/v2/snapshots/{id}", self.get_snapshot),
            web.delete("/api/v2/snapshots/{id}", self.delete_snapshot),
        ]

    # -- one ---------------------------------------------------------------------------------------------------------

    async def create(self, request: web.Request) -> web.Response:
        """Makes a volume: empty, bootable, or of a snapshot."""
        body, org = await body_of(request, _NewVolume), request[TOKEN].org
        size = capacity_bytes(body.capacity)
        wanted = pb.CreateVolumeRequest(tenant=org, slug=body.slug, capacity_bytes=size)
        links = await self._nodes.candidates(body.region, request[TOKEN].regions)
        if body.from_ == _BUILTIN:
            wanted.image = self._settings.image
        elif body.from_ is not None:
            if body.from_.startswith("builtin:"):
                raise Refusal(400, "UNKNOWN_BASE", f"there is no {body.from_[:60]!r}; there is {_BUILTIN}")
            link, snapshot = await self._snapshot(body.from_, org)
            if link not in links:
                raise Refusal(400, "OTHER_REGION", f"the snapshot lies in region {snapshot.region}")
            links, wanted.snapshot = [link], body.from_
        await self._refuse_slug(body.slug, org)
        return web.json_response(volume_json(await links[0].api.volumes.CreateVolume(wanted)))

    async def _refuse_slug(self, slug: str, org: str) -> None:
        """Slugs are one space over all nodes; each node looks after its own. :raises Refusal: it is taken."""
        for find in (self._volume, self._snapshot):
            try:
                await find(slug, org)
            except Refusal as refusal:
                if refusal.status == 404:
                    continue
                raise
            raise Refusal(409, "SLUG_IN_USE", f"there is a volume or snapshot {slug!r} already")

    async def find(self, id_or_slug: str, org: str) -> NodeLink:
        """Returns the node of a volume or snapshot. :raises Refusal: there is none."""
        try:
            return (await self._volume(id_or_slug, org))[0]
        except Refusal as refusal:
            if refusal.status != 404:
                raise
            return (await self._snapshot(id_or_slug, org))[0]

    async def _volume(self, id_or_slug: str, org: str) -> tuple[NodeLink, pb.Volume]:
        request = pb.GetVolumeRequest(tenant=org, id_or_slug=id_or_slug)
        found: tuple[NodeLink, pb.Volume] = await self._ask("GetVolume", request, "VOLUME_NOT_FOUND", id_or_slug)
        return found

    async def _snapshot(self, id_or_slug: str, org: str) -> tuple[NodeLink, pb.Snapshot]:
        request = pb.GetSnapshotRequest(tenant=org, id_or_slug=id_or_slug)
        found: tuple[NodeLink, pb.Snapshot] = await self._ask("GetSnapshot", request, "SNAPSHOT_NOT_FOUND", id_or_slug)
        return found

    async def _ask(self, call: str, request: Any, code: str, name: str) -> Any:
        """Returns (node, answer) of the node that has it. :raises Refusal: none has."""
        failure: Refusal | None = None
        for link in self._nodes.links:
            try:
                return link, await getattr(link.api.volumes, call)(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    failure = refusal_from_rpc(error)
        raise failure or Refusal(404, code, f"there is no {name[:80]!r}")

    async def get_volume(self, request: web.Request) -> web.Response:
        """One volume."""
        _, volume = await self._volume(request.match_info["id"], request[TOKEN].org)
        return web.json_response(volume_json(volume))

    async def get_snapshot(self, request: web.Request) -> web.Response:
        """One snapshot."""
        _, snapshot = await self._snapshot(request.match_info["id"], request[TOKEN].org)
        return web.json_response(snapshot_json(snapshot))

    async def delete_volume(self, request: web.Request) -> web.Response:
        """Deletes a volume that nobody uses."""
        org = request[TOKEN].org
        link, volume = await self._volume(request.match_info["id"], org)
        await link.api.volumes.DeleteVolume(pb.DeleteVolumeRequest(tenant=org, id_or_slug=volume.id))
        return web.Response(status=204)

    async def delete_snapshot(self, request: web.Request) -> web.Response:
        """Deletes a snapshot."""
        org = request[TOKEN].org
        link, snapshot = await self._snapshot(request.match_info["id"], org)
        await link.api.volumes.DeleteSnapshot(pb.DeleteSnapshotRequest(tenant=org, id_or_slug=snapshot.id))
        return web.Response(status=204)

    async def snapshot(self, request: web.Request) -> web.Response:
        """Makes a snapshot of a volume that nobody uses."""
        slug, org = (await body_of(request, _NewSnapshot)).slug, request[TOKEN].org
        link, volume = await self._volume(request.match_info["id"], org)
        await self._refuse_slug(slug, org)
        made = await link.api.volumes.CreateSnapshot(pb.CreateSnapshotRequest(tenant=org, volume=volume.id, slug=slug))
        return web.json_response(snapshot_json(made))

    # -- many --------------------------------------------------------------------------------------------------------

    async def list_volumes(self, request: web.Request) -> web.Response:
        """A page of volumes."""
        return await self._list(request, "ListVolumes", pb.ListVolumesRequest, "volumes", volume_json)

    async def list_snapshots(self, request: web.Request) -> web.Response:
        """A page of snapshots."""
        return await self._list(request, "ListSnapshots", pb.ListSnapshotsRequest, "snapshots", snapshot_json)

    async def _list(self, request: web.Request, call: str, kind: Any, field: str, as_json: Any) -> web.Response:
        org, search = request[TOKEN].org, request.query.get("search", "")
        limit = _number(request.query.get("limit"))
        pages = await asyncio.gather(*(_everything(link, call, kind, field, org, search) for link in self._nodes.links))
        found = sorted((item for page in pages for item in page), key=lambda item: item.id)
        after = _cursor(request.query.get("cursor", ""))
        rest = [item for item in found if item.id > after]
        response = web.json_response([as_json(item) for item in rest[:limit]])
        if len(rest) > limit:
            query = {**({"search": search} if search else {}), "limit": limit, "cursor": rest[limit - 1].id}
            # Both SDKs want an absolute address, and look for exactly these two parts.
            response.headers["Link"] = f'<{request.url.origin()}{request.path}?{urlencode(query)}>; rel="next"'
        return response


async def _everything(link: NodeLink, call: str, kind: Any, field: str, org: str, search: str) -> list[Any]:
    found: list[Any] = []
    token = ""
    while True:
        request = kind(tenant=org, search=search, page_size=_MAX_LIMIT, page_token=token)
        answer = await getattr(link.api.volumes, call)(request)
        found += getattr(answer, field)
        token = answer.next_page_token
        if not token:
            return found


def _number(text: str | None) -> int:
    if not text:
        return _DEFAULT_LIMIT
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MAX_LIMIT:
        raise Refusal(400, "INVALID_LIMIT", f"limit must be from 1 to {_MAX_LIMIT}")
    return int(text)


def _cursor(text: str) -> str:
    """Returns the id that a page ended with. The Python SDK sends the whole address of the next page."""
    if "://" in text:
        text = parse_qs(urlsplit(text).query).get("cursor", [""])[0]
    return text
