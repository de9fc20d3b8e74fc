"""`template`: suspended VMs from which new sandboxes start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.connect import connected

if TYPE_CHECKING:
    from sandboxd.v1.node_pb2 import Template


async def ls() -> None:
    """List the templates of the node, most recently used first."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        templates = (await api.templates.ListTemplates(node_pb2.ListTemplatesRequest())).templates
    if output.json_enabled():
        for template in templates:
            output.print_json(output.to_json(template))
        return
    headers = ("NAME", "IMAGE", "CPUS", "RAM", "ON DISK", "AGE", "USED")
    output.print_table(headers, [_row(template) for template in templates])


def _row(template: Template) -> tuple[str, ...]:
    return (
        template.name, template.image, str(template.vcpus), formatting.size(template.ram_bytes),
        formatting.size(template.size_bytes), formatting.since(template.create_time),
        formatting.since(template.use_time),
    )  # fmt: skip


async def prepare(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image name. Default: the node's.")] = "",
    vcpus: Annotated[int | None, typer.Option(min=1, help="Number of virtual CPUs.")] = None,
    memory: Annotated[
        int | None, typer.Option(parser=options.parse_size, metavar="SIZE", help="Memory, such as 512MiB.")
    ] = None,
) -> None:
    """Build the template for a VM size unless it exists.

    The first create of that size is then as fast as later ones.
    """
    from sandboxd.v1 import node_pb2

    request = node_pb2.PrepareTemplateRequest(image=image, vcpus=vcpus or 0, memory_bytes=memory or 0)
    async with connected() as api:
        template = await api.templates.PrepareTemplate(request)
    output.print_result(output.to_json(template), template.name)


async def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Template name, as `template ls` prints it.")],
) -> None:
    """Delete a template that no sandbox uses."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        await api.templates.DeleteTemplate(node_pb2.DeleteTemplateRequest(name=name))
    output.print_result({"name": name, "deleted": True}, name)
