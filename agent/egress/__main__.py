"""sandboxd-egress: `python -m agent.egress`, one per node, started by the agent or by systemd.

It reads what hostile guests send, so it may do nothing else: another user than root, no capability, sockets only as the
agent hands them over. When it dies, everything that guests have open ends, and nothing goes out until it is back.
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
from agent.egress.http.intercept import Interceptor
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
    parser.add_argument("--owner-uid", type=int, default=os.getuid(), help="whom orders are taken from; default: us")
    parser.add_argument("--config", type=Path, help="TOML file that has the settings, instead of arguments")
    parser.add_argument("--uid", type=int, default=65534)
    parser.add_argument("--gid", type=int, default=65534)
    parser.add_argument("--resolver", action="append", default=[], metavar="ADDRESS[:PORT]")
    parser.add_argument(
        "--ca-file", default=None, help="certificates that servers are verified with, besides the host's"
    )
    parser.add_argument("--identity", default="", help="said to the agent as it is")
    arguments = parser.parse_args()
    if arguments.config is not None:
        settings = load(arguments.config if arguments.config.exists() else None).egress
        parser.parse_args(arguments_of(settings), arguments)
        arguments.identity = identity_of(settings)
    arguments.is_service = arguments.control is None
    if arguments.is_service:
        given = systemd.listeners()
        if not given:
            parser.error("--control is needed: the agent starts this, or systemd does, by sandboxd-egress.socket")
        arguments.control = next(iter(given.values())).detach()
    return arguments


async def _run(arguments: argparse.Namespace, interceptor: Interceptor) -> None:
    resolver = Resolver(arguments.resolver or system_resolvers())
    splice_relay = SpliceRelay()
    splice_relay.start()
    dependencies = Dependencies(resolver, splice_relay, interceptor)

    def servers(sandbox: SandboxState) -> tuple[DnsServer, TcpProxy]:
        return DnsServer(sandbox, resolver), TcpProxy(sandbox, dependencies)

    with socket.socket(fileno=arguments.control) as listener:
        try:
            async with Supervisor(LoopLog()) as supervisor:
                if arguments.is_service:  # else it is the agent whom systemd wants to hear
                    systemd.notify("READY=1")
                    supervisor.start("systemd-watchdog", systemd.keep_watchdog, QUICK)
                control = Control(servers, {"settings": arguments.identity}, arguments.owner_uid, supervisor)
                await control.run(listener)
        finally:
            splice_relay.stop()
            await resolver.aclose()


def _load_all() -> None:
    """Load the code that its first use would load: the user that the process becomes may not be allowed to read it.

    What a library loads at its first use is a detail of the library, so each such use is made once, and not listed.
    """
    load_all()
    "example".encode("idna")  # the codec of socket and ssl
    normalise("bücher.example")  # the tables of idna
    LocalCa.generate("none").context("example", ("h2",))  # keys, signatures and certificates


def main() -> int:
    """Runs the process; returns its exit status."""
    arguments = _arguments()
    privileges.set_name("sandboxd-egress")
    privileges.raise_file_limit()
    interceptor = Interceptor(dial, arguments.ca_file)  # reads the host's certificates while it may read everything
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
