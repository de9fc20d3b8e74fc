"""Serve TemplateService (node.proto)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from agent.common.config.settings import Settings
from agent.common.errors import InvalidState, ResourceExhausted
from agent.common.model import Lifetime
from agent.daemon.rpc.convert.node_messages import template_message
from agent.daemon.sandbox.service import SandboxService
from agent.daemon.sandbox.state.validation import complete
from agent.daemon.sandbox.templates.catalog import Templates
from sandboxd.v1 import node_pb2 as pb
from sandboxd.v1 import node_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TemplateServicer(node_pb2_grpc.TemplateServiceServicer):
    """Servicer of TemplateService."""

    def __init__(self, sandboxes: SandboxService, settings: Settings) -> None:
        self._sandboxes = sandboxes
        self._settings = settings

    def _templates(self) -> Templates:
        if self._sandboxes.templates is None:
            raise InvalidState(
                "templates are off on this node: templates.enabled is false, or vmm.link is vsock with QEMU",
                reason="TEMPLATES_OFF",
            )
        return self._sandboxes.templates

    async def ListTemplates(  # noqa: N802
        self, request: pb.ListTemplatesRequest, context: Context
    ) -> pb.ListTemplatesResponse:
        """See node.proto."""
        if self._sandboxes.templates is None:
            return pb.ListTemplatesResponse()
        present = await asyncio.to_thread(self._sandboxes.templates.list)
        return pb.ListTemplatesResponse(templates=[template_message(value) for value in present])

    async def PrepareTemplate(self, request: pb.PrepareTemplateRequest, context: Context) -> pb.Template:  # noqa: N802
        """See node.proto."""
        templates = self._templates()
        spec = complete(
            self._settings.sandbox, image=request.image or self._settings.images.default_image,
            vcpu_count=request.vcpus, memory_bytes=request.memory_bytes, disk_bytes=0, env={}, labels={},
            lifetime=Lifetime(), request_id="",
        )  # fmt: skip
        image = self._sandboxes.fitting_image(spec)
        if lacking := self._sandboxes.node.lacking([spec], ()):
            raise ResourceExhausted(
                f"a sandbox of this size does not fit on this node ({'; '.join(lacking)})", reason="NODE_FULL"
            )
        return template_message(await templates.get(image, spec.vcpu_count, spec.memory_bytes))

    async def DeleteTemplate(  # noqa: N802
        self, request: pb.DeleteTemplateRequest, context: Context
    ) -> pb.DeleteTemplateResponse:
        """See node.proto."""
        await asyncio.to_thread(self._templates().remove, request.name)
        return pb.DeleteTemplateResponse()
