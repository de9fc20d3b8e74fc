"""Entry point of sandboxd-egress (`python -m agent.egress`), one process per node, started by the agent or by systemd.

The process parses bytes from hostile guests, so it runs without privileges: not as root, without capabilities, and with
no listening sockets but those that the agent passes to it. If it dies, all connections of guests end, and no traffic
leaves until it runs again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from pathlib import Path

from agent.common import systemd
from agent.common.background import QUICK, Supervisor
from agent.common.ca import LocalCa
from agent.common.config.loading import load
from agent.common.errors import AgentError
from agent.common.policy.hosts import normalise
from agent.egress import privileges
from agent.egress.control import Control
from agent.egress.dns.resolver import Resolver, load_all, system_resolvers
from agent.egress.dns.server import DnsServer
from agent.egress.http.intercept import HttpInterceptor
from agent.egress.launch import arguments_of, identity_of
from agent.egress.sandbox_state import SandboxState
from agent.egress.stderr_log import LoopLog, write_line
from agent.egress.tcp.connection import Dependencies
from agent.egress.tcp.proxy import TcpProxy
from agent.egress.transport.dial import dial
from agent.egress.transport.splice import SpliceRelay


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sandboxd-egress", description=__doc__)
    parser.add_argument("--control", type=int, help="descriptor of the listening control socket; default: systemd's")
    parser.add_argument(
        "--owner-uid", type=int, default=os.getuid(), help="user whose orders are accepted; default: the own one"
    )
    parser.add_argument("--config", type=Path, help="TOML file with the settings, instead of arguments")
    parser.add_argument("--uid", type=int, default=65534)
    parser.add_argument("--gid", type=int, default=65534)
    parser.add_argument("--resolver", action="append", default=[], metavar="ADDRESS[:PORT]")
    parser.add_argument("--ca-file", default=None, help="CA certificates to verify servers with, besides the host's")
    parser.add_argument("--identity", default="", help="identity to report to the agent")
    arguments = parser.parse_args()
    if arguments.config is not None:
        settings = load(arguments.config if arguments.config.exists() else None).egress
        parser.parse_args(arguments_of(settings), arguments)
        arguments.identity = identity_of(settings)
    arguments.is_service = arguments.control is None
    if arguments.is_service:
        given = systemd.listeners()
        if not given:
            parser.error("--control is missing: start this by the agent, or by systemd's sandboxd-egress.socket")
        arguments.control = next(iter(given.values())).detach()
    return arguments


async def _run(arguments: argparse.Namespace, interceptor: HttpInterceptor) -> None:
    resolver = Resolver(arguments.resolver or system_resolvers())
    splice_relay = SpliceRelay()
    splice_relay.start()
    dependencies = Dependencies(resolver, splice_relay, interceptor)

    def servers(sandbox: SandboxState) -> tuple[DnsServer, TcpProxy]:
        return DnsServer(sandbox, resolver), TcpProxy(sandbox, dependencies)

    with socket.socket(fileno=arguments.control) as listener:
        try:
            async with Supervisor(LoopLog()) as supervisor:
                if arguments.is_service:  # otherwise the agent is the service, and notifies systemd
                    systemd.notify("READY=1")
                    supervisor.start("systemd-watchdog", systemd.keep_watchdog, QUICK)
                control = Control(servers, {"settings": arguments.identity}, arguments.owner_uid, supervisor)
                await control.run(listener)
        finally:
            splice_relay.stop()
            await resolver.aclose()


def _load_all() -> None:
    """Load all code that would be loaded later: the user that the process becomes may not be allowed to read it.

    Which modules a library loads at its first use is a detail of the library, so this makes such a use of each.
    """
    load_all()
    "example".encode("idna")  # the codec of socket and ssl
    normalise("bücher.example")  # the tables of idna
    LocalCa.generate("none").context("example", ("h2",))  # keys, signatures and certificates


def main() -> int:
    """Run the process and return its exit status."""
    arguments = _arguments()
    privileges.set_name("sandboxd-egress")
    privileges.raise_file_limit()
    interceptor = HttpInterceptor(dial, arguments.ca_file)  # reads the host's CA certificates, as root
    _load_all()
    try:
        privileges.drop(arguments.uid, arguments.gid)
    except AgentError as error:
        write_line(error.message)
        return 1
    os.umask(0o077)
    asyncio.run(_run(arguments, interceptor))
    return 0


if __name__ == "__main__":
    sys.exit(main())
