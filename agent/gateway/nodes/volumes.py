"""Volumes and snapshots of an organization, looked up over all nodes. Each one lies on exactly one node."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from agent.gateway.errors import HttpError, http_error_from_rpc
from agent.gateway.nodes.nodes import Node, Nodes
from sandboxd.v1 import volume_pb2 as pb

_PAGE_SIZE = 1000


class Volumes:
    """Lookups over all nodes. An `id_or_slug` is the id, or the name that the client chose."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def node_of(self, id_or_slug: str, org: str) -> Node:
        """Return the node of a volume or snapshot.

        :raises HttpError: 404, no node has it.
        """
        try:
            return (await self.get_volume(id_or_slug, org))[0]
        except HttpError as error:
            if error.status != 404:
                raise
            return (await self.get_snapshot(id_or_slug, org))[0]

    async def get_volume(self, id_or_slug: str, org: str) -> tuple[Node, pb.Volume]:
        """Return a volume and its node.

        :raises HttpError: 404, no node has it.
        """
        request = pb.GetVolumeRequest(tenant=org, id_or_slug=id_or_slug)
        found: tuple[Node, pb.Volume] = await self._get("GetVolume", request, "VOLUME_NOT_FOUND", id_or_slug)
        return found

    async def get_snapshot(self, id_or_slug: str, org: str) -> tuple[Node, pb.Snapshot]:
        """Return a snapshot and its node.

        :raises HttpError: 404, no node has it.
        """
        request = pb.GetSnapshotRequest(tenant=org, id_or_slug=id_or_slug)
        found: tuple[Node, pb.Snapshot] = await self._get("GetSnapshot", request, "SNAPSHOT_NOT_FOUND", id_or_slug)
        return found

    async def _get(self, call: str, request: Any, code: str, name: str) -> Any:
        failure: HttpError | None = None
        for node in self._nodes.members:
            try:
                return node, await getattr(node.api.volumes, call)(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    failure = http_error_from_rpc(error)
        raise failure or HttpError(404, code, f"there is no {name[:80]!r}")

    async def check_slug_is_free(self, slug: str, org: str) -> None:
        """Check that no volume and no snapshot on any node has this slug; a node checks its own alone.

        :raises HttpError: 409, the slug is in use.
        """
        for get in (self.get_volume, self.get_snapshot):
            try:
                await get(slug, org)
            except HttpError as error:
                if error.status == 404:
                    continue
                raise
            raise HttpError(409, "SLUG_IN_USE", f"there is a volume or snapshot {slug!r} already")

    async def list_volumes(self, org: str, search: str) -> list[pb.Volume]:
        """Return all volumes of an organization that match `search`, ordered by id.

        :raises grpc.aio.AioRpcError: a node did not answer.
        """
        return await self._list("ListVolumes", pb.ListVolumesRequest, "volumes", org, search)

    async def list_snapshots(self, org: str, search: str) -> list[pb.Snapshot]:
        """Return all snapshots of an organization that match `search`, ordered by id.

        :raises grpc.aio.AioRpcError: a node did not answer.
        """
        return await self._list("ListSnapshots", pb.ListSnapshotsRequest, "snapshots", org, search)

    async def _list(self, call: str, kind: Any, field: str, org: str, search: str) -> list[Any]:
        pages = await asyncio.gather(
            *(_list_node(node, call, kind, field, org, search) for node in self._nodes.members)
        )
        return sorted((item for page in pages for item in page), key=lambda item: item.id)


async def _list_node(node: Node, call: str, kind: Any, field: str, org: str, search: str) -> list[Any]:
    found: list[Any] = []
    token = ""
    while True:
        request = kind(tenant=org, search=search, page_size=_PAGE_SIZE, page_token=token)
        answer = await getattr(node.api.volumes, call)(request)
        found += getattr(answer, field)
        token = answer.next_page_token
        if not token:
            return found
