"""`create`: a new sandbox, and its lease, which the command renews while it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import options, output
from agent.cli.commands import network_options
from agent.cli.commands.sandbox import Labels, delete_sandbox
from agent.cli.connect import connected
from agent.cli.errors import print_warning
from agent.common.api_client import Api

if TYPE_CHECKING:
    from sandboxd.v1.sandbox_pb2 import CreateSandboxRequest, KeepAliveRequest, Lifetime, Sandbox

_RENEWALS_PER_LEASE = 3  # two in a row may fail


async def create(
    image: Annotated[str, typer.Argument(help="Image name. Default: the node's.", show_default=False)] = "",
    vcpus: Annotated[int | None, typer.Option(min=1, help="Number of virtual CPUs.")] = None,
    memory: Annotated[
        int | None, typer.Option(parser=options.parse_size, metavar="SIZE", help="Memory, such as 512MiB.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(parser=options.parse_size, metavar="SIZE", help="Writable disk, such as 4GiB.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="KEY=VALUE", help="Set a variable for all processes; repeatable."),
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read KEY=VALUE lines; --env overrides them.")
    ] = None,
    label: Labels = None,
    lifetime: Annotated[
        float | None,
        typer.Option(parser=options.parse_duration, metavar="TIME", help="Delete the sandbox after TIME, such as 10m."),
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(
            parser=options.parse_duration,
            metavar="TIME",
            help="Keep the sandbox until Ctrl-C; delete it if this command is gone for TIME.",
        ),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        typer.Option(parser=options.parse_duration, metavar="TIME", help="Delete the sandbox after TIME without use."),
    ] = None,
    request_id: Annotated[
        str, typer.Option(help="Idempotency key: a repeated create returns the sandbox of the first one.")
    ] = "",
    allow: network_options.Allow = None,
    no_network: network_options.NoNetwork = False,
    inspect: network_options.Inspect = False,
    secret: network_options.Secrets = None,
    tenant: Annotated[str, typer.Option(help="Tenant that owns the sandbox; quotas may apply to it.")] = "",
) -> None:
    """Create a sandbox and print its id once it runs."""
    from sandboxd.v1 import sandbox_pb2

    if lifetime is not None and lease is not None:
        raise typer.BadParameter("give --lifetime or --lease, not both")
    request = sandbox_pb2.CreateSandboxRequest(
        image=image, vcpus=vcpus or 0, memory_bytes=memory or 0, disk_bytes=disk or 0,
        env=(options.read_env_file(env_file) if env_file else {}) | options.parse_pairs(env, "--env"),
        labels=options.parse_pairs(label, "--label"), lifetime=_lifetime(lifetime, lease, idle_timeout),
        network=network_options.policy(allow, nothing=no_network, inspect=inspect),
        secrets=network_options.secrets(secret), tenant=tenant, request_id=request_id,
    )  # fmt: skip
    async with connected() as api:
        made = await _create(api, request)
        output.print_result(output.to_json(made), made.id)
        if lease is not None:
            await _hold_lease(api, made.id, lease)


def _lifetime(duration_s: float | None, lease_s: float | None, idle_timeout_s: float | None) -> Lifetime | None:
    from sandboxd.v1 import sandbox_pb2

    message = sandbox_pb2.Lifetime()
    for field, seconds in (("duration", duration_s), ("lease", lease_s), ("idle_timeout", idle_timeout_s)):
        if seconds is not None:
            getattr(message, field).FromMicroseconds(round(seconds * 1e6))
    return message if message.ListFields() else None


async def _create(api: Api, request: CreateSandboxRequest) -> Sandbox:
    """Create the sandbox; on cancellation wait for it and delete it, since the daemon does not stop a create."""
    import asyncio

    work = asyncio.ensure_future(api.sandboxes.CreateSandbox(request))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        print_warning("waiting for the sandbox to delete it; press Ctrl-C again to leave it behind")
        made = await work
        await delete_sandbox(api, made.id)
        raise


async def _hold_lease(api: Api, sandbox_id: str, lease_s: float) -> None:
    """Renew the lease until cancelled, then delete the sandbox.

    :raises grpc.aio.AioRpcError: the sandbox is gone, or the daemon was unreachable for a whole lease.
    """
    import asyncio

    try:
        await _renew(api, sandbox_id, lease_s)
    except asyncio.CancelledError:
        await delete_sandbox(api, sandbox_id)
        raise


async def _renew(api: Api, sandbox_id: str, lease_s: float) -> None:
    import asyncio

    import grpc

    loop = asyncio.get_running_loop()
    renewed_at = loop.time()
    while True:
        try:
            async for _ in api.sandboxes.KeepAlive(_renewals(sandbox_id, lease_s)):
                renewed_at = loop.time()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or loop.time() - renewed_at > lease_s:
                raise
            print_warning("the daemon is unreachable; retrying until the lease expires")
        await asyncio.sleep(lease_s / _RENEWALS_PER_LEASE)


async def _renewals(sandbox_id: str, lease_s: float) -> AsyncIterator[KeepAliveRequest]:
    import asyncio

    from sandboxd.v1 import sandbox_pb2

    while True:
        yield sandbox_pb2.KeepAliveRequest(id=sandbox_id)
        await asyncio.sleep(lease_s / _RENEWALS_PER_LEASE)
