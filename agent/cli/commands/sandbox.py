"""`ls`, `inspect`, `rm` and `update`: existing sandboxes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, options, output
from agent.cli.commands import network_options
from agent.cli.connect import connected, rpc_error
from agent.cli.errors import CliError, print_error
from agent.common.api_client import Api
from agent.common.model import State

if TYPE_CHECKING:
    import asyncio

    from sandboxd.v1.sandbox_pb2 import Sandbox, UpdateSandboxRequest

_PAGE_SIZE = 500
_CONCURRENT_DELETES = 8
SandboxId = Annotated[str, typer.Argument(metavar="ID", help="Sandbox id.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Set a label; repeatable.")
]
LabelFilter = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only sandboxes with this label; repeatable."),
]


async def list_sandboxes(api: Api, labels: dict[str, str], states: list[State] | None = None) -> AsyncIterator[Sandbox]:
    """Yield the sandboxes that have all `labels` ("" matches any value) and one of `states`, page by page."""
    from sandboxd.v1 import sandbox_pb2

    numbers = [sandbox_pb2.Sandbox.State.Value(f"STATE_{state.name}") for state in states or ()]
    token = ""
    while True:
        request = sandbox_pb2.ListSandboxesRequest(
            labels=labels, states=numbers, page_size=_PAGE_SIZE, page_token=token
        )
        page = await api.sandboxes.ListSandboxes(request)
        for sandbox in page.sandboxes:
            yield sandbox
        token = page.next_page_token
        if not token:
            return


async def ls(
    label: LabelFilter = None,
    state: Annotated[list[State] | None, typer.Option(help="Only sandboxes in this state; repeatable.")] = None,
) -> None:
    """List sandboxes, oldest first."""
    labels = options.parse_pairs(label, "--label", value_needed=False)
    async with connected() as api:
        if output.json_enabled():
            async for sandbox in list_sandboxes(api, labels, state):
                output.print_json(output.to_json(sandbox))
            return
        rows = [_row(sandbox) async for sandbox in list_sandboxes(api, labels, state)]
    output.print_table(("ID", "STATE", "IMAGE", "CPU", "MEMORY", "AGE", "EXPIRES", "LABELS"), rows, fixed=2)


def _row(sandbox: Sandbox) -> tuple[str, ...]:
    return (
        sandbox.id, formatting.enum_field(sandbox, "state"), sandbox.image, str(sandbox.vcpus),
        formatting.size(sandbox.memory_bytes), formatting.since(sandbox.create_time),
        formatting.until(sandbox.expire_time) if sandbox.HasField("expire_time") else "-",
        formatting.labels(sandbox.labels) or "-",
    )  # fmt: skip


async def inspect(id: SandboxId) -> None:
    """Show all details of one sandbox."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        sandbox = await api.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=id))
    if output.json_enabled():
        output.print_json(output.to_json(sandbox))
    else:
        output.print_facts(_facts(sandbox), width=20)


def _facts(sandbox: Sandbox) -> list[tuple[str, str]]:
    expires = f"in {formatting.until(sandbox.expire_time)}" if sandbox.HasField("expire_time") else "never"
    if sandbox.lifetime.HasField("lease"):
        expires += f" (lease of {sandbox.lifetime.lease.ToTimedelta().total_seconds():g}s)"
    return [
        ("id", sandbox.id), ("state", formatting.enum_field(sandbox, "state")),
        ("image", f"{sandbox.image} {sandbox.image_digest}"), ("vcpus", str(sandbox.vcpus)),
        ("memory", formatting.size(sandbox.memory_bytes)), ("disk", formatting.size(sandbox.disk_bytes)),
        ("vmm", sandbox.vmm), ("region", sandbox.region),
        ("created", f"{sandbox.create_time.ToJsonString()} ({formatting.since(sandbox.create_time)} ago)"),
        ("expires", expires), ("labels", formatting.labels(sandbox.labels) or "-"),
        *network_options.facts(sandbox),
        *((f"  {phase.name}", f"{phase.duration.ToMicroseconds() / 1e3:.0f} ms") for phase in sandbox.phases),
        *(("error", line) for line in sandbox.error.splitlines()),
    ]  # fmt: skip


async def delete_sandbox(api: Api, sandbox_id: str) -> None:
    """Delete a sandbox.

    :raises grpc.aio.AioRpcError: the call failed.
    """
    from sandboxd.v1 import sandbox_pb2

    await api.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox_id))


async def rm(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Sandbox ids.", show_default=False)] = None,
    all: Annotated[bool, typer.Option("--all", help="Delete every sandbox of the node.")] = False,
    label: LabelFilter = None,
) -> int:
    """Delete sandboxes and print their ids.

    If one cannot be deleted, delete the others and exit with 1.
    """
    import asyncio

    if bool(ids) + all + bool(label) != 1:
        raise typer.BadParameter("give ids, --all or --label")
    labels = options.parse_pairs(label, "--label", value_needed=False)
    async with connected() as api:
        chosen = ids or [sandbox.id async for sandbox in list_sandboxes(api, labels)]
        limit = asyncio.Semaphore(_CONCURRENT_DELETES)
        results = await asyncio.gather(*(_remove(api, sandbox_id, limit) for sandbox_id in dict.fromkeys(chosen)))
    return 1 if False in results else 0


async def _remove(api: Api, sandbox_id: str, limit: asyncio.Semaphore) -> bool:
    """Delete a sandbox and print its id, or print the error; return whether it is deleted."""
    import grpc

    async with limit:
        try:
            await delete_sandbox(api, sandbox_id)
        except grpc.aio.AioRpcError as error:
            print_error(rpc_error(error))
            return False
    output.print_result({"id": sandbox_id, "deleted": True}, sandbox_id)
    return True


async def update(
    id: SandboxId,
    expire_in: Annotated[
        float | None,
        typer.Option(parser=options.parse_duration, metavar="TIME", help="Delete the sandbox TIME from now."),
    ] = None,
    no_expire: Annotated[bool, typer.Option("--no-expire", help="Keep the sandbox until it is deleted.")] = False,
    label: Labels = None,
    unlabel: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Remove a label; repeatable.")] = None,
    allow: network_options.Allow = None,
    no_network: network_options.NoNetwork = False,
    open_network: Annotated[bool, typer.Option("--open-network", help="Allow the whole public internet.")] = False,
    inspect: network_options.Inspect = False,
    secret: network_options.Secrets = None,
    remove_secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Remove a secret; repeatable.")
    ] = None,
) -> None:
    """Change expiry, labels, network or secrets of a sandbox."""
    from sandboxd.v1 import sandbox_pb2

    if expire_in is not None and no_expire:
        raise typer.BadParameter("give --expire-in or --no-expire, not both")
    policy = network_options.policy(allow, nothing=no_network, inspect=inspect, everything=open_network)
    if expire_in is None and policy is None and not any((no_expire, label, unlabel, secret, remove_secret)):
        raise typer.BadParameter("nothing to change: give --expire-in, --label, --allow, --secret or another option")
    request = sandbox_pb2.UpdateSandboxRequest(
        id=id, clear_expire_time=no_expire, set_labels=options.parse_pairs(label, "--label"),
        remove_labels=unlabel or [], network=policy, set_secrets=network_options.secrets(secret),
        remove_secrets=remove_secret or [],
    )  # fmt: skip
    if expire_in is not None:
        _set_expire_time(request, expire_in)
    async with connected() as api:
        sandbox = await api.sandboxes.UpdateSandbox(request)
    if output.json_enabled():
        output.print_json(output.to_json(sandbox))


def _set_expire_time(request: UpdateSandboxRequest, expire_in_s: float) -> None:
    try:
        request.expire_time.FromMicroseconds(round((time.time() + expire_in_s) * 1e6))
    except ValueError:
        raise CliError(
            f"--expire-in {expire_in_s:g} s is after the year 9999", reason="INVALID_TIME", status=2
        ) from None
