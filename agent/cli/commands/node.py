"""`node`, `drain`, `undrain` and `version`: the daemon and its machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.connect import connected
from agent.cli.errors import CliError

if TYPE_CHECKING:
    from sandboxd.v1.node_pb2 import Node, Resource


async def node(
    watch: Annotated[bool, typer.Option("--watch", help="Print it again after each change, until Ctrl-C.")] = False,
) -> None:
    """Show the node: its state, versions, images and resources."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        if not watch:
            _show(await api.nodes.GetNode(node_pb2.GetNodeRequest()))
            return
        async for message in api.nodes.WatchNode(node_pb2.WatchNodeRequest()):
            _show(message)


def _show(node: Node) -> None:
    if output.json_enabled():
        output.print_json(output.to_json(node))
        return
    state = formatting.enum_field(node, "state")
    facts = [
        ("name", f"{node.name} (region {node.region})"), ("state", f"{state} {node.state_reason}".strip()),
        ("sandboxd", f"{node.version}, up {formatting.since(node.start_time)}"),
        ("vmm", f"{node.vmm} {node.vmm_version} ({node.accelerator}: {node.vmm_reason})"),
        ("kernel", node.kernel), ("cpu", node.cpu_model), ("labels", formatting.labels(node.labels) or "-"),
        *(("degraded", sentence) for sentence in node.degraded),
        ("images", ", ".join(image.name for image in node.images) or "none"),
    ]  # fmt: skip
    output.print_facts(facts, width=10)
    rows = [
        _row("cpus", node.cpu_millis, lambda number: f"{number / 1000:g}"),
        _row("memory", node.memory_bytes, formatting.size),
        _row("disk", node.disk_bytes, formatting.size),
        _row("sandboxes", node.sandboxes, str),
    ]
    output.print_table(("", "TOTAL", "ALLOCATABLE", "ALLOCATED", "USED"), rows)


def _row(name: str, resource: Resource, shown: Callable[[int], str]) -> tuple[str, ...]:
    values = (resource.total, resource.allocatable, resource.allocated, resource.used)
    return (name, *(shown(value) for value in values))


async def drain(
    evict_after: Annotated[
        float | None,
        typer.Option(parser=options.parse_duration, metavar="TIME", help="Delete the remaining sandboxes after TIME."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return at once instead of waiting until the node is empty.")
    ] = False,
) -> None:
    """Reject new sandboxes and wait for the end of existing ones.

    Ctrl-C stops waiting, but the node keeps draining.
    """
    from sandboxd.v1 import node_pb2

    request = node_pb2.DrainNodeRequest()
    if evict_after is not None:
        request.evict_after.FromMicroseconds(round(evict_after * 1e6))
    async with connected() as api:
        async for progress in api.nodes.DrainNode(request):
            when = f", deleted in {formatting.until(progress.evict_time)}" if progress.HasField("evict_time") else ""
            output.print_result(output.to_json(progress), f"{progress.remaining} sandboxes left{when}")
            if no_wait:
                return


async def undrain() -> None:
    """Accept new sandboxes again."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        _show(await api.nodes.UndrainNode(node_pb2.UndrainNodeRequest()))


async def version() -> None:
    """Show the version of this command and of the daemon."""
    from importlib.metadata import version as installed_version

    import grpc

    from sandboxd.v1 import node_pb2

    daemon: str | None = None
    try:
        async with connected() as api:
            daemon = (await api.nodes.GetNode(node_pb2.GetNodeRequest(), timeout=3)).version
    except (CliError, grpc.aio.AioRpcError):
        daemon = None
    if output.json_enabled():
        output.print_json({"sandboxctl": installed_version("sandboxd"), "sandboxd": daemon})
        return
    output.print_line(f"sandboxctl {installed_version('sandboxd')}")
    output.print_line(f"sandboxd   {daemon or 'does not answer'}")
