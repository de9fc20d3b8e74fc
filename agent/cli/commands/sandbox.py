"""`create`, `ls`, `inspect`, `rm`, `update`: sandboxes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli import output, text
from agent.cli.commands import network_options
from agent.cli.connect import connected, described_address
from agent.cli.errors import CliError, complain, from_rpc, warn
from agent.common.api_client import Api
from agent.common.model import State

if TYPE_CHECKING:
    import asyncio

    from sandboxd.v1.sandbox_pb2 import CreateSandboxRequest, Sandbox

_PAGE = 500
_DELETES_AT_ONCE = 8
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label; repeatable.")]
Size = typer.Option(parser=text.size_option, metavar="SIZE")
_SELECTED = typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only those with this label; repeatable.")


def _create_request(
    image: str,
    vcpus: int | None,
    memory: int | None,
    disk: int | None,
    env: dict[str, str],
    labels: dict[str, str],
    lifetime: float | None,
    lease: float | None,
    request_id: str,
) -> CreateSandboxRequest:
    from sandboxd.v1 import sandbox_pb2

    request = sandbox_pb2.CreateSandboxRequest(
        image=image, vcpus=vcpus or 0, memory_bytes=memory or 0, disk_bytes=disk or 0, env=env, labels=labels,
        request_id=request_id,
    )  # fmt: skip
    if lifetime is not None:
        request.lifetime.duration.FromMicroseconds(round(lifetime * 1e6))
    if lease is not None:
        request.lifetime.lease.FromMicroseconds(round(lease * 1e6))
    return request


async def create(
    image: Annotated[str, typer.Argument(help="Image; default: the node's.", show_default=False)] = "",
    vcpus: Annotated[int | None, typer.Option(min=1, help="Virtual CPUs.")] = None,
    memory: Annotated[int | None, typer.Option(parser=text.size_option, metavar="SIZE", help="Such as 512MiB.")] = None,
    disk: Annotated[int | None, typer.Option(parser=text.size_option, metavar="SIZE", help="Such as 4GiB.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Repeatable.")] = None,
    env_file: Annotated[Path | None, typer.Option(metavar="FILE", help="KEY=VALUE lines; --env goes first.")] = None,
    label: Labels = None,
    lifetime: Annotated[
        float | None, typer.Option(parser=text.duration_option, metavar="TIME", help="Deleted so long after, as 10m.")
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(parser=text.duration_option, metavar="TIME", help="Keep it until Ctrl-C; lapses so long after."),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        typer.Option(parser=text.duration_option, metavar="TIME", help="Deleted once nobody has used it so long."),
    ] = None,
    request_id: Annotated[str, typer.Option(help="Makes a repeated create find the first one's sandbox.")] = "",
    allow: network_options.Allow = None,
    no_network: network_options.NoNetwork = False,
    inspect: network_options.Inspect = False,
    secret: network_options.Secrets = None,
    tenant: Annotated[str, typer.Option(help="Whose it is; the operator may have set limits for it.")] = "",
) -> int | None:
    """Create a sandbox and print its id once it runs."""
    if lifetime is not None and lease is not None:
        raise typer.BadParameter("give --lifetime or --lease, not both")
    variables = (text.env_file(env_file) if env_file else {}) | text.pairs(env or (), "--env")
    labels = text.pairs(label or (), "--label")
    request = _create_request(image, vcpus, memory, disk, variables, labels, lifetime, lease, request_id)
    request.tenant = tenant
    if idle_timeout is not None:
        request.lifetime.idle_timeout.FromMicroseconds(round(idle_timeout * 1e6))
    if (policy := network_options.policy(allow, nothing=no_network, inspect=inspect)) is not None:
        request.network.CopyFrom(policy)
    for name, message in network_options.secrets(secret).items():
        request.secrets[name].CopyFrom(message)
    async with connected() as api:
        made = await _created(api, request)
        if output.json_wanted():
            output.emit(output.to_json(made))
        else:
            output.say(made.id)
        if lease is not None:
            from agent.cli.commands.lease import hold

            await hold(api, made.id, lease)
    return None


async def _created(api: Api, request: CreateSandboxRequest) -> Sandbox:
    """Creates. The daemon goes on when a caller leaves, so an interrupted create is waited for and deleted."""
    import asyncio

    work = asyncio.ensure_future(api.sandboxes.CreateSandbox(request))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        warn("waiting for the sandbox so that it can be deleted; once more to leave it")
        made = await work
        await delete(api, made.id)
        raise


async def listed(api: Api, labels: dict[str, str], states: list[str] | None = None) -> AsyncIterator[Sandbox]:
    """Yields the sandboxes that match, page by page. :raises typer.BadParameter: no such state."""
    from sandboxd.v1 import sandbox_pb2

    numbers = sandbox_pb2.Sandbox.State
    wanted = [numbers.Value(f"STATE_{State(state).name}") for state in states or ()]
    token = ""
    while True:
        request = sandbox_pb2.ListSandboxesRequest(labels=labels, states=wanted, page_size=_PAGE, page_token=token)
        page = await api.sandboxes.ListSandboxes(request)
        for sandbox in page.sandboxes:
            yield sandbox
        token = page.next_page_token
        if not token:
            return


async def ls(
    label: Annotated[list[str] | None, _SELECTED] = None,
    state: Annotated[list[State] | None, typer.Option(help="Only those in this state; repeatable.")] = None,
) -> None:
    """List sandboxes, oldest first."""
    labels = text.pairs(label or (), "--label", value_needed=False)
    states = [one.value for one in state or ()]
    async with connected() as api:
        if output.json_wanted():
            async for sandbox in listed(api, labels, states):
                output.emit(output.to_json(sandbox))
            return
        rows = [_row(sandbox) async for sandbox in listed(api, labels, states)]
    output.print_table(("ID", "STATE", "IMAGE", "CPU", "MEMORY", "AGE", "EXPIRES", "LABELS"), rows, fixed=2)


def state_word(sandbox: Any) -> str:
    """Returns "running" and so on."""
    return output.enum_word(sandbox.DESCRIPTOR.fields_by_name["state"].enum_type, sandbox.state)


def _row(sandbox: Sandbox) -> tuple[str, ...]:
    return (
        sandbox.id, state_word(sandbox), sandbox.image, str(sandbox.vcpus), text.size(sandbox.memory_bytes),
        output.since(sandbox.create_time),
        output.until(sandbox.expire_time) if sandbox.HasField("expire_time") else "-",
        output.labels_text(sandbox.labels) or "-",
    )  # fmt: skip


async def inspect(id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show all that is known of one sandbox."""
    from sandboxd.v1 import sandbox_pb2

    async with connected() as api:
        sandbox = await api.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=id))
    if output.json_wanted():
        output.emit(output.to_json(sandbox))
        return
    expires = f"in {output.until(sandbox.expire_time)}" if sandbox.HasField("expire_time") else "never"
    if sandbox.lifetime.HasField("lease"):
        expires += f" (lease of {sandbox.lifetime.lease.ToTimedelta().total_seconds():g}s)"
    facts = [
        ("id", sandbox.id), ("state", state_word(sandbox)), ("image", f"{sandbox.image} {sandbox.image_digest}"),
        ("vcpus", str(sandbox.vcpus)), ("memory", text.size(sandbox.memory_bytes)),
        ("disk", text.size(sandbox.disk_bytes)), ("vmm", sandbox.vmm), ("region", sandbox.region),
        ("created", f"{sandbox.create_time.ToJsonString()} ({output.since(sandbox.create_time)} ago)"),
        ("expires", expires), ("labels", output.labels_text(sandbox.labels) or "-"),
    ]  # fmt: skip
    facts += network_options.facts(sandbox)
    facts += [(f"  {phase.name}", f"{phase.duration.ToMicroseconds() / 1e3:.0f} ms") for phase in sandbox.phases]
    for name, value in facts:
        output.say(f"{name:<20}{value}")
    for line in sandbox.error.splitlines():
        output.say(f"{'error':<20}{line}")


async def delete(api: Api, sandbox_id: str) -> None:
    """Deletes a sandbox. :raises grpc.aio.AioRpcError:"""
    from sandboxd.v1 import sandbox_pb2

    await api.sandboxes.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(id=sandbox_id))


async def rm(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", show_default=False)] = None,
    all: Annotated[bool, typer.Option("--all", help="Every sandbox of the node.")] = False,
    label: Annotated[list[str] | None, _SELECTED] = None,
) -> int:
    """Delete sandboxes and print their ids; goes on after an error and then ends with 1."""
    import asyncio

    if bool(ids) + all + bool(label) != 1:
        raise typer.BadParameter("give ids, --all or --label")
    labels = text.pairs(label or (), "--label", value_needed=False)
    async with connected() as api:
        chosen = list(ids or ()) or [sandbox.id async for sandbox in listed(api, labels)]
        limit = asyncio.Semaphore(_DELETES_AT_ONCE)
        results = await asyncio.gather(*(_removed(api, sandbox_id, limit) for sandbox_id in dict.fromkeys(chosen)))
    return 0 if all_true(results) else 1


def all_true(results: list[bool]) -> bool:
    """Whether each of the results is true; a name that the option --all does not hide."""
    return False not in results


async def _removed(api: Api, sandbox_id: str, limit: asyncio.Semaphore) -> bool:
    import grpc

    async with limit:
        try:
            await delete(api, sandbox_id)
        except grpc.aio.AioRpcError as error:
            complain(from_rpc(error, described_address()))
            return False
    if output.json_wanted():
        output.emit({"id": sandbox_id, "deleted": True})
    else:
        output.say(sandbox_id)
    return True


async def update(
    id: Annotated[str, typer.Argument(metavar="ID")],
    expire_in: Annotated[
        float | None, typer.Option(parser=text.duration_option, metavar="TIME", help="Delete it so long from now.")
    ] = None,
    no_expire: Annotated[bool, typer.Option("--no-expire", help="Keep it until it is deleted.")] = False,
    label: Labels = None,
    unlabel: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Remove a label; repeatable.")] = None,
    allow: network_options.Allow = None,
    no_network: network_options.NoNetwork = False,
    open_network: Annotated[bool, typer.Option("--open-network", help="Everything public may be reached.")] = False,
    inspect: network_options.Inspect = False,
    secret: network_options.Secrets = None,
    remove_secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Remove a secret; repeatable.")
    ] = None,
) -> None:
    """Change when a sandbox expires, its labels, what it may reach, or its secrets."""
    from sandboxd.v1 import sandbox_pb2

    if expire_in is not None and no_expire:
        raise typer.BadParameter("give --expire-in or --no-expire, not both")
    policy = network_options.policy(allow, nothing=no_network, inspect=inspect, everything=open_network)
    nothing = (expire_in is None, not no_expire, not label, not unlabel, policy is None, not secret, not remove_secret)
    if all_true(list(nothing)):
        raise typer.BadParameter("nothing to change: give --expire-in, --label, --allow, --secret or another option")
    request = sandbox_pb2.UpdateSandboxRequest(
        id=id, clear_expire_time=no_expire, set_labels=text.pairs(label or (), "--label"), remove_labels=unlabel or [],
        network=policy, set_secrets=network_options.secrets(secret), remove_secrets=remove_secret or [],
    )  # fmt: skip
    if expire_in is not None:
        try:
            request.expire_time.FromMicroseconds(round((time.time() + expire_in) * 1e6))
        except ValueError:
            raise CliError(
                f"--expire-in {expire_in:g} s is beyond any calendar", reason="INVALID_TIME", status=2
            ) from None
    async with connected() as api:
        sandbox = await api.sandboxes.UpdateSandbox(request)
    if output.json_wanted():
        output.emit(output.to_json(sandbox))
