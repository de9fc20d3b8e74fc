"""sandboxd-egress: `python -m agent.egress`, started by the agent, one per node.

It reads what hostile guests send, so it may do nothing else: another user than root, no capability, sockets only as the
agent hands them over. When it dies, everything that guests have open ends, and nothing goes out until it is back.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import socket
import sys

from agent.egress import privileges
from agent.egress.connection import Means
from agent.egress.control import Control, note
from agent.egress.dial import dial
from agent.egress.dns import DnsServer
from agent.egress.intercept import Interceptor
from agent.egress.resolver import Resolver, load_all, system_resolvers
from agent.egress.splice import Mover
from agent.egress.state import Sandbox
from agent.egress.tcp import TcpProxy
from agent.errors import AgentError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sandboxd-egress", description=__doc__)
    parser.add_argument("--control", type=int, required=True, help="descriptor of the listening control socket")
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--resolver", action="append", default=[], metavar="ADDRESS[:PORT]")
    parser.add_argument(
        "--ca-file", default=None, help="certificates that servers are verified with, besides the host's"
    )
    parser.add_argument("--identity", type=json.loads, default={}, help="said to the agent as it is")
    return parser.parse_args()


async def _run(arguments: argparse.Namespace, interceptor: Interceptor, owner_uid: int) -> None:
    resolver = Resolver(arguments.resolver or system_resolvers())
    mover = Mover()
    mover.start()
    means = Means(resolver, mover, interceptor)

    def servers(sandbox: Sandbox) -> tuple[DnsServer, TcpProxy]:
        return DnsServer(sandbox, resolver), TcpProxy(sandbox, means)

    with socket.socket(fileno=arguments.control) as listener:
        try:
            await Control(servers, arguments.identity, owner_uid).run(listener)
        finally:
            mover.stop()
            await resolver.aclose()


def _load_all() -> None:
    """Loads the code that would be loaded by its first use: another user may not be allowed to read it."""
    load_all()
    "example".encode("idna")
    importlib.import_module("idna")


def main() -> int:
    """Runs the process; returns its exit status."""
    arguments = _arguments()
    privileges.set_name("sandboxd-egress")
    privileges.raise_file_limit()
    interceptor = Interceptor(dial, arguments.ca_file)  # reads the host's certificates while it may read everything
    _load_all()
    owner_uid = os.getuid()  # the agent is whoever started this
    try:
        privileges.drop(arguments.uid, arguments.gid)
    except AgentError as error:
        note(error.message)
        return 1
    os.umask(0o077)
    asyncio.run(_run(arguments, interceptor, owner_uid))
    return 0


if __name__ == "__main__":
    sys.exit(main())
