"""`template`: frozen VMs that sandboxes start from."""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import output, text
from agent.cli.connect import connected


async def ls() -> None:
    """List the templates of the node, last used first."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        templates = (await api.templates.ListTemplates(node_pb2.ListTemplatesRequest())).templates
    if output.json_wanted():
        for template in templates:
            output.emit(output.to_json(template))
        return
    rows = [
        (
            template.name, template.image, str(template.vcpus), text.size(template.ram_bytes),
            text.size(template.size_bytes), output.since(template.create_time), output.since(template.use_time),
        )
        for template in templates
    ]  # fmt: skip
    output.print_table(("NAME", "IMAGE", "CPUS", "RAM", "ON DISK", "AGE", "USED"), rows)


async def prepare(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Default: the node's.")] = "",
    vcpus: Annotated[int | None, typer.Option(min=1, help="Virtual CPUs.")] = None,
    memory: Annotated[int | None, typer.Option(parser=text.size_option, metavar="SIZE", help="Such as 512MiB.")] = None,
) -> None:
    """Make the template of a size, unless it is there, so that the first create is as fast as the next."""
    from sandboxd.v1 import node_pb2

    request = node_pb2.PrepareTemplateRequest(image=image, vcpus=vcpus or 0, memory_bytes=memory or 0)
    async with connected() as api:
        template = await api.templates.PrepareTemplate(request)
    if output.json_wanted():
        output.emit(output.to_json(template))
    else:
        output.say(template.name)


async def rm(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Delete a template that no sandbox runs from."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        await api.templates.DeleteTemplate(node_pb2.DeleteTemplateRequest(name=name))
    if output.json_wanted():
        output.emit({"name": name, "deleted": True})
    else:
        output.say(name)
