"""`port-forward`: forward a local port to a port inside a sandbox."""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import output
from agent.cli.connect import connected
from agent.cli.errors import CliError, print_warning


def parse_ports(word: str) -> tuple[int, int]:
    """Return (local, remote) for "[LOCAL:]REMOTE"; for ":REMOTE" the local port is 0, any free one.

    :raises typer.BadParameter: `word` is not of that form, or a port is out of range.
    """
    local, separator, remote = word.rpartition(":")
    local = (local or "0") if separator else remote
    if not (local.isdecimal() and remote.isdecimal() and int(local) <= 65535 and 1 <= int(remote) <= 65535):
        raise typer.BadParameter(f"{word!r} is not [LOCAL:]REMOTE with ports from 1 to 65535", param_hint="PORTS")
    return int(local), int(remote)


async def port_forward(
    id: Annotated[str, typer.Argument(metavar="ID", help="Sandbox id.")],
    ports: Annotated[str, typer.Argument(metavar="[LOCAL:]REMOTE", help="Ports. LOCAL empty or 0: any free port.")],
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help="Local address to listen on.")] = "127.0.0.1",
    host: Annotated[str, typer.Option(metavar="HOST", help="Address inside the sandbox to connect to.")] = "127.0.0.1",
) -> None:
    """Forward a local port to a port inside a sandbox.

    Print the local address once it listens, and run until Ctrl-C.
    """
    import asyncio

    from agent.cli.transfer.forwarder import Forwarder
    from sandboxd.v1 import sandbox_pb2

    local, remote = parse_ports(ports)
    async with connected() as api:
        await api.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=id))
        forwarder = Forwarder(api, id, host, remote)
        try:
            server = await asyncio.start_server(forwarder.serve, bind, local)
        except OSError as error:
            raise CliError(
                f"cannot listen on {bind} port {local}: {error.strerror or error}", reason="CANNOT_LISTEN"
            ) from None
        async with server:
            _announce(server.sockets[0].getsockname()[:2], id, remote)
            try:
                await server.serve_forever()
            finally:
                await forwarder.aclose()


def _announce(address: tuple[str, int], sandbox_id: str, remote: int) -> None:
    from ipaddress import ip_address

    bound, port = address
    if not ip_address(bound).is_loopback:
        print_warning(f"{bound} is not loopback: other machines can connect to port {remote} of the sandbox")
    shown = f"[{bound}]:{port}" if ":" in bound else f"{bound}:{port}"
    value = {"address": shown, "host": bound, "port": port, "sandbox_id": sandbox_id, "remote_port": remote}
    output.print_result(value, f"forwarding {shown} to port {remote} of {sandbox_id}")
